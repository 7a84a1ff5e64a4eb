"""What every command shares: help in two levels, errors as one line with a non-zero exit, interrupts.

Exit status: 0 done, 1 an error that the user can mend, 2 options that cannot be read, 130 interrupted (Ctrl-C), 143
terminated.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from trackstar.errors import OptionError, TrackstarError

ERROR, WRONG_OPTIONS, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class RareOption(click.Option):
    """An option that only `--help-all` shows."""


class Command(click.Command):
    """A command whose `--help` fits a screen; `--help-all` shows the rare options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(isinstance(parameter, RareOption) for parameter in self.params):
            self.params.append(
                click.Option(
                    ["--help-all"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=_show_all,
                    help="Show the rare options too.",
                )
            )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that this level of help shows."""
        everything = ctx.meta.get("trackstar.help_all", False)
        common = [p for p in self.get_params(ctx) if not isinstance(p, RareOption)]
        rare = [p for p in self.get_params(ctx) if isinstance(p, RareOption)] if everything else []
        for title, parameters in (("Options", common), ("Rare options", rare)):
            records = [record for p in parameters if (record := p.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=34)


class Group(click.Group):
    """The commands, listed in the order in which they are used."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of their definition."""
        return list(self.commands)


def _show_all(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["trackstar.help_all"] = True
        click.echo(ctx.get_help())
        ctx.exit()


def prepare(threads: int | None) -> None:
    """Settle what must be settled before anything heavy is imported."""
    # Idle threads that spin for long slow each other many times over beside another busy process; a short spin costs
    # nothing measurable when there is none.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars
    if threads is not None:
        if threads < 1:
            raise OptionError(f"--threads {threads}: expected 1 or more")
        import torch

        torch.set_num_threads(threads)


class _Terminated(BaseException):
    """SIGTERM came: what is open is closed as for Ctrl-C."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command; users' mistakes become one line on stderr. Returns the exit status."""
    # From a thread other than the main one no handler can be set, and no signal comes.
    previous = None
    with contextlib.suppress(ValueError):
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(command, arguments)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _run(command: click.Command, arguments: Sequence[str] | None) -> int:
    again = "interrupted; run the same command again to go on from what is finished"
    try:
        status = command.main(
            args=list(arguments) if arguments is not None else None, prog_name="trackstar", standalone_mode=False
        )
        sys.stdout.flush()
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "trackstar"
        _say(f"{path}: {' '.join(error.format_message().split())} See {path} --help.")
        return WRONG_OPTIONS
    except TrackstarError as error:
        _say(f"trackstar: {error}")
        return ERROR
    except (KeyboardInterrupt, click.Abort):
        _say(f"trackstar: {again}")
        return INTERRUPTED
    except _Terminated:
        _say(f"trackstar: {again}")
        return TERMINATED
    except BrokenPipeError:
        # Whoever read stdout has gone, as `head` does: there is nobody to tell, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    return status if isinstance(status, int) else 0


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _say(line: str) -> None:
    from trackstar.progress import printable

    sys.stderr.write(printable(line) + "\n")
