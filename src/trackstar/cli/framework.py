"""What every command shares: help pages, errors as one line, exit statuses, interrupts.

Exit status: 0 done, 1 an error that the user can fix, 2 an option that is missing, unknown or not a
number, 130 interrupted (Ctrl-C), 143 terminated.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from trackstar.cli.wording import Wording
from trackstar.errors import TrackstarError, check_at_least
from trackstar.progress import reworded
from trackstar.text import printable

ERROR, WRONG_OPTIONS, INTERRUPTED, TERMINATED = 1, 2, 130, 143
HELP_WIDTH = 100
_FLAG_COLUMNS = 36


class RareOption(click.Option):
    """An option that only `--help-all` shows."""


class MistakeError(Exception):
    """An error that the user can fix, in the words of the command line."""


class Command(click.Command):
    """A command whose `--help` fits a screen and ends with an example; `--help-all` adds the rare options.

    Args:
        example: Lines to type in a shell, such as `trackstar verify demo-out/index`.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        settings = {
            "help_option_names": ["-h", "--help"],
            "max_content_width": HELP_WIDTH,
            "show_default": True,
            **(kwargs.pop("context_settings", None) or {}),
        }
        super().__init__(*args, context_settings=settings, **kwargs)
        self.example = example
        if any(isinstance(parameter, RareOption) for parameter in self.params):
            self.params.append(
                click.Option(
                    ["--help-all"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=_show_all,
                    help="Show this message with the rare options and exit.",
                )
            )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that this level of help shows."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        rare = [option for option in options if isinstance(option, RareOption)]
        shown_rare = rare if ctx.meta.get("trackstar.help_all", False) else []
        common = [option for option in options if option not in rare]
        for title, shown in (("Options", common), ("Rare options", shown_rare)):
            records = [record for option in shown if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=_FLAG_COLUMNS)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        _write_example(self.example, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors and notes of the library appear in the words of the command line."""
        group = ctx.find_root().command
        wording = Wording(command=ctx.info_name, commands=group.commands if isinstance(group, click.Group) else {})
        with reworded(wording):
            try:
                return super().invoke(ctx)
            except TrackstarError as error:
                raise MistakeError(wording(str(error))) from error


class Group(click.Group):
    """Commands, listed in sections; without a command it shows its help."""

    command_class = Command

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH}
        super().__init__(*args, context_settings=settings, invoke_without_command=True, **kwargs)
        self.example = example
        self.sections: dict[str, list[str]] = {}

    def add_section(self, title: str, commands: Sequence[click.Command]) -> None:
        """Add commands under a title of the help page."""
        for command in commands:
            self.add_command(command)
        self.sections[title] = [str(command.name) for command in commands]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help page."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one line per command, by section."""
        width = max(map(len, self.commands))
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<{width}}", self.commands[name].get_short_help_str(HELP_WIDTH)) for name in names]
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        _write_example(self.example, formatter)


def prepare(threads: int | None) -> None:
    """Set the environment and the number of CPU threads, before anything heavy is imported.

    Raises:
        OptionError: `threads` is less than 1.
    """
    # Threads that spin long while they wait slow each other down by a large factor if another process
    # is busy. A short spin has no measurable cost otherwise.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of other libraries
    check_at_least("threads", threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


class _Terminated(BaseException):
    """SIGTERM arrived; open files are closed as for Ctrl-C."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a user's mistake is one line on stderr."""
    # Only the main thread can set a signal handler, and only it receives signals.
    previous = None
    with contextlib.suppress(ValueError):
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(command, arguments)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _run(command: click.Command, arguments: Sequence[str] | None) -> int:
    resume = "interrupted; run the same command again to resume"
    try:
        status = command.main(
            args=list(arguments) if arguments is not None else None, prog_name="trackstar", standalone_mode=False
        )
        sys.stdout.flush()
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "trackstar"
        _write(f"{path}: {' '.join(error.format_message().split())} See {path} --help.")
        return WRONG_OPTIONS
    except (MistakeError, TrackstarError) as error:
        _write(f"trackstar: {error}")
        return ERROR
    except (KeyboardInterrupt, click.Abort):
        _write(f"trackstar: {resume}")
        return INTERRUPTED
    except _Terminated:
        _write(f"trackstar: {resume}")
        return TERMINATED
    except BrokenPipeError:
        # The reader of stdout is gone, as with `head`; a message, or the flush at exit, would fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    return status if isinstance(status, int) else 0


def _show_all(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["trackstar.help_all"] = True
        click.echo(ctx.get_help())
        ctx.exit()


def _write_example(example: str, formatter: click.HelpFormatter) -> None:
    if example:
        with formatter.section("Example"):
            for line in example.splitlines():
                formatter.write(f"  {line}\n")


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _write(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")
