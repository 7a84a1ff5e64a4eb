"""The command line. Nothing heavy is imported before a command runs, so that `trackstar --help` is instant."""

from trackstar.cli.commands import main, trackstar

__all__ = ["main", "trackstar"]
