"""The command line: each command turns options into one call of the Python interface and prints its result.

Messages of the library appear with flags and commands in place of parameters and functions (`wording`).
Nothing heavy is imported before a command runs, so that `trackstar --help` is instant.
"""

from trackstar.cli.commands import main, trackstar

__all__ = ["main", "trackstar"]
