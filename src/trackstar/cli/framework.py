"""What every command shares: help pages, errors as one line, exit statuses, interrupts.

Exit status: 0 done, 1 an error that the user can fix, 2 an option that is missing, unknown or not a
number, 130 interrupted (Ctrl-C), 143 terminated.
"""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import click

from trackstar.cli.wording import Wording
from trackstar.errors import OptionError, TrackstarError, check_at_least
from trackstar.progress import reworded
from trackstar.text import abridged, cut, printable, shortened, system_reason

ERROR, WRONG_OPTIONS, INTERRUPTED, TERMINATED = 1, 2, 130, 143
HELP_WIDTH = 100
_FLAG_COLUMNS = 36
_MOST_THREADS = 32  # that a machine of few cores accepts
_LONGEST_VALUE = 4096  # bytes of a value; no path is longer
_LONGEST_USAGE = 1000
_TEXTS = frozenset({"prompt", "completion"})
_INTERRUPTED = "interrupted"
_RESUME = "interrupted; run the same command again to resume"


class RareOption(click.Option):
    """An option that only `--help-all` shows."""


class FirstArgument(click.Argument):
    """An argument that an option can give as well.

    Args:
        option: The option's name.
        needed: Whether one of them must be given.
    """

    def __init__(self, *args: Any, option: str, needed: bool, **kwargs: Any) -> None:
        super().__init__(*args, required=False, **kwargs)
        self.option = option
        self.needed = needed


class MistakeError(Exception):
    """An error that the user can fix, in the words of the command line."""


class Command(click.Command):
    """A command whose `--help` fits a screen and ends with an example; `--help-all` adds the rare
    options.

    Args:
        example: Lines to type in a shell, such as `trackstar verify demo-out/index`.
        resumes: Whether the same command resumes an interrupted run; a function of the options'
            values if it depends on them.
    """

    def __init__(
        self,
        *args: Any,
        example: str = "",
        resumes: bool | Callable[[Mapping[str, Any]], bool] = False,
        **kwargs: Any,
    ) -> None:
        settings = {
            "help_option_names": ["-h", "--help"],
            "max_content_width": HELP_WIDTH,
            "show_default": True,
            **(kwargs.pop("context_settings", None) or {}),
        }
        super().__init__(*args, context_settings=settings, **kwargs)
        self.example = example
        self.resumes = resumes
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; all required parameters that are missing are named at once.

        Raises:
            click.UsageError: A parameter is missing, unknown or of another type.
        """
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.MissingParameter:
            raise click.UsageError(_missing(self._missing(ctx, given)), ctx) from None
        missing = self._missing(ctx, given) if not ctx.resilient_parsing else []
        if missing:
            raise click.UsageError(_missing(missing), ctx)
        return rest

    def _missing(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Required parameters without a value, as click's messages name them."""
        values, _, _ = self.make_parser(ctx).parse_args(args=args)

        def lacks(name: str | None) -> bool:
            return values.get(str(name)) in (None, ()) or not isinstance(values.get(str(name)), (str, list, tuple))

        return [
            parameter.get_error_hint(ctx)
            for parameter in sorted(self.get_params(ctx), key=lambda one: isinstance(one, click.Option))
            if (parameter.required and lacks(parameter.name))
            or (
                isinstance(parameter, FirstArgument)
                and parameter.needed
                and lacks(parameter.name)
                and lacks(parameter.option)
            )
        ]

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
                _check_values(self, ctx.params)
                return super().invoke(ctx)
            except TrackstarError as error:
                raise MistakeError(wording(str(error))) from error
            except (KeyboardInterrupt, Terminated) as stop:
                resumes = self.resumes if isinstance(self.resumes, bool) else self.resumes(ctx.params)
                stop.args = (_RESUME,) if resumes else ()
                raise


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
        OptionError: `threads` is less than 1, or far above the machine's number of cores.
    """
    # Threads that spin long while they wait slow each other down by a large factor if another
    # process is busy. A short spin has no measurable cost otherwise.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of other libraries
    if sys.platform == "darwin":  # what Apple's GPUs cannot compute runs on the CPU, with torch's warning
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    check_at_least("threads", threads)
    cores = os.cpu_count() or 1
    if threads is not None and threads > max(_MOST_THREADS, 4 * cores):
        raise OptionError(f"`threads`: expected at most the number of cores, {cores} on this machine, found {threads}")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


class Terminated(BaseException):
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
    try:
        status = command.main(
            args=list(arguments) if arguments is not None else None, prog_name="trackstar", standalone_mode=False
        )
        sys.stdout.flush()
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "trackstar"
        _write(f"{path}: {shortened(' '.join(error.format_message().split()), _LONGEST_USAGE)} See {path} --help.")
        return WRONG_OPTIONS
    except (MistakeError, TrackstarError) as error:
        _write(f"trackstar: {error}")
        return ERROR
    except (KeyboardInterrupt, click.Abort) as error:
        _write(f"trackstar: {_advice(error.__cause__ or error)}")
        return INTERRUPTED
    except Terminated as error:
        _write(f"trackstar: {_advice(error)}")
        return TERMINATED
    except BrokenPipeError:
        # The reader of stdout is gone, as with `head`; a message, or the flush at exit, would fail
        # as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except OSError as error:
        # Such as a full disk, a name that is too long, or a file that has gone meanwhile.
        name = error.filename if isinstance(error.filename, str) else "a file or a connection"
        _write(f"trackstar: {name}: {system_reason(error)}; check the path, its permissions and the free space")
        return ERROR
    except MemoryError:
        _write("trackstar: the memory does not suffice; choose smaller sizes, or free memory")
        return ERROR
    return status if isinstance(status, int) else 0


def _missing(hints: Sequence[str]) -> str:
    """click's message for parameters that are missing."""
    options = [hint for hint in hints if "-" in hint]
    arguments = [hint for hint in hints if "-" not in hint]
    kinds = (("argument", arguments), ("option", options))
    parts = [f"{kind}{'s' if len(names) > 1 else ''} {', '.join(names)}" for kind, names in kinds if names]
    return f"Missing {' and '.join(parts)}."


def _check_values(command: click.Command, values: Mapping[str, Any]) -> None:
    """Raise if a value cannot be meant, whatever the option.

    Raises:
        OptionError: A number has more than 64 bits or is not finite; a text is empty, longer than
            any path, not UTF-8, or holds a NUL byte. Prompts and completions may be empty or long.
    """
    for parameter in command.params:
        given = values.get(str(parameter.name))
        flag = parameter.opts[0] if isinstance(parameter, click.Option) else (parameter.metavar or "").strip("[]")
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, int) and abs(value) >= 2**64:
                raise OptionError(f"{flag}: expected a number of at most 64 bits, found {abridged(value)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise OptionError(f"{flag}: expected a finite number, found {value}")
            if isinstance(value, str):
                _check_text(flag, value, is_name=parameter.name not in _TEXTS)


def _check_text(flag: str, value: str, *, is_name: bool) -> None:
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise OptionError(f"{flag}: expected text in UTF-8, found {abridged(value)}; rename the file") from None
    if "\0" in value:
        raise OptionError(f"{flag}: expected text without NUL bytes, found {abridged(value)}")
    if is_name and not value.strip():
        raise OptionError(f"{flag}: expected a value, found an empty text; leave the option out, or give a value")
    if is_name and size > _LONGEST_VALUE:
        raise OptionError(f"{flag}: expected at most {_LONGEST_VALUE:,} bytes, found {size:,} ({cut(value)})")


def _advice(stop: BaseException | None) -> str:
    """The line about an interrupt, which the interrupted command has put into it."""
    return str(stop.args[0]) if stop is not None and stop.args else _INTERRUPTED


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
    raise Terminated


def _write(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")
