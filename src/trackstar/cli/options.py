"""Options and arguments that several commands share, and checks of their values."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import click

from trackstar.choices import DEVICE_MAPS, DUPLICATE_IDS, JOINS, RECORD_FORMATS, STOPS, TRAIN_ON
from trackstar.cli.framework import FirstArgument, RareOption
from trackstar.errors import OptionError
from trackstar.indexing.settings import IndexSettings
from trackstar.model.generation_settings import GenerationSettings
from trackstar.progress import reworded_line

if TYPE_CHECKING:
    from trackstar.workers.protocol import Workers

Function = TypeVar("Function", bound=Callable[..., Any])

CORPUS_HELP = "Corpus: JSON, CSV, Parquet, Arrow or text files, a saved dataset, or hf:NAME."
BATCH_HELP = "Most tokens per batch, padding included; peak memory follows it."
DAMPING_HELP = "Ridge added to R_train, as a fraction of its mean eigenvalue per block."


class Choice(click.Choice):  # pyright: ignore[reportMissingTypeArgument] - click 8.1 takes none
    """One of a few values; the error for any other value names the flag and all choices."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, or raise if it is not one of the choices."""
        if value not in self.choices:
            flag = param.opts[0] if param is not None else "value"
            raise OptionError(f"{flag}: expected one of {', '.join(map(str, self.choices))}, found {value}")
        return value


def choice(flag: str, choices: Sequence[str], *, rare: bool = False, **settings: Any) -> Callable[[Function], Function]:
    """Add an option with a few possible values, which its metavar shows."""
    shown = choices if len(choices) <= 4 else (choices[0], "...", choices[-1])
    return click.option(
        flag,
        cls=RareOption if rare else click.Option,
        type=Choice(choices),
        metavar=f"[{'|'.join(shown)}]",
        **settings,
    )


def rare(*names: str, **settings: Any) -> Callable[[Function], Function]:
    """Add an option that only `--help-all` shows."""
    return click.option(*names, cls=RareOption, **settings)


def threads_option(function: Function) -> Function:
    """Add `--threads`."""
    return rare("--threads", type=int, metavar="N", show_default="torch's choice", help="Number of CPU threads.")(
        function
    )


def device_option(function: Function) -> Function:
    """Add `--device`."""
    return click.option(
        "--device", default="auto", metavar="NAME", help="auto (the best there is), cpu, cuda, cuda:1 or mps."
    )(function)


def device_options(function: Function) -> Function:
    """Add `--device`, `--device-map` and `--threads`, for commands that compute with a model."""
    spread = choice(
        "--device-map",
        DEVICE_MAPS,
        rare=True,
        show_default="one device",
        help="Spread one model over all GPUs: evenly, or filling one after the other.",
    )
    return device_option(spread(threads_option(function)))


def chosen_device(
    device: str, device_map: str | None = None, *, ray: str | None = None, has_workers: bool = False
) -> str:
    """The device to compute on; a note says which if the user named none.

    Args:
        device: Value of `--device`.
        device_map: Value of `--device-map`.
        ray: Address of the cluster that computes, whose workers have the GPUs.
        has_workers: Whether the command has `--ray`.
    """
    from trackstar.model.devices import AUTO, announced_device

    if ray is not None and device == AUTO and device_map is None:
        note("device: cpu for this process; each worker of the cluster has its own")
        return "cpu"
    return announced_device(device, device_map, note, has_workers=has_workers)


def duplicate_ids_option(function: Function) -> Function:
    """Add `--duplicate-ids`."""
    return choice(
        "--duplicate-ids",
        DUPLICATE_IDS,
        rare=True,
        default="refuse",
        help="A second record of a name: refuse it, or name it NAME~2.",
    )(function)


def corpus_options(usual_template: str = "the tokenizer's") -> Callable[[Function], Function]:
    """Add options that say how records of a corpus are read, and what is kept of them."""

    def add(function: Function) -> Function:
        metadata = rare(
            "--metadata",
            default="all",
            metavar="FIELDS",
            help="Other fields to keep with the index: all, none, or names with commas.",
        )
        join = choice("--join", JOINS, rare=True, default="auto", help="What is put between prompt and completion.")
        template = chat_template_option("Chat template of the training run.", usual=usual_template)
        return record_options("", rare_ones=False)(template(join(metadata(function))))

    return add


def record_options(condition: str, *, rare_ones: bool) -> Callable[[Function], Function]:
    """Add options that say which fields of a corpus's records are read, and which tokens are targets.

    Args:
        condition: Beginning of their help texts.
        rare_ones: Whether all of them are listed with the rarely used options.
    """
    usual = rare if rare_ones else click.option

    def decorated(function: Function) -> Function:
        for option in (
            duplicate_ids_option,
            choice(
                "--train-on",
                TRAIN_ON,
                rare=True,
                show_default="as the format's training does",
                help=f"{condition}Tokens that are targets.",
            ),
            choice(
                "--format",
                RECORD_FORMATS,
                rare=rare_ones,
                show_default="found in the records",
                help=f"{condition}Form of the records: {', '.join(RECORD_FORMATS)}.",
            ),
            usual("--limit", type=int, metavar="N", help=f"{condition}Read only the first N records."),
            usual(
                "--id-field",
                metavar="NAME",
                show_default="found in the records",
                help=f"{condition}Field that names an example.",
            ),
            usual("--text-field", default="text", metavar="NAME", help=f"{condition}Field that holds the text."),
        ):
            function = option(function)
        return function

    return decorated


def chat_template_option(text: str, *, usual: str = "the tokenizer's") -> Callable[[Function], Function]:
    """Add `--chat-template` with a help text; `usual` is the template without the option."""
    return rare("--chat-template", metavar="FILE", show_default=usual, help=text)


def generation_options(condition: str, *, temperature: float | None = None) -> Callable[[Function], Function]:
    """Add options that say how the model answers.

    Args:
        condition: Beginning of their help texts.
        temperature: Default of the temperature; None is that of `GenerationSettings`.
    """

    def usual(name: str) -> Any:
        given = temperature if name == "temperature" else None
        return GenerationSettings.default(name) if given is None else given

    def said(text: str) -> str:
        return f"{condition}{text}" if condition else f"{text[0].upper()}{text[1:]}"

    numbers: tuple[tuple[str, type, str, str], ...] = (
        ("sampling_seed", int, "N", "seed of the answers."),
        ("top_p", float, "P", "sample from this share of the probability."),
        ("temperature", float, "T", "sample at this temperature; 0 is the most probable token."),
        ("max_new_tokens", int, "N", "most tokens of an answer."),
    )

    def decorated(function: Function) -> Function:
        function = rare("--chat", is_flag=True, help=said("prompts are users' messages in the chat template."))(
            function
        )
        stop = said("end at the line's end, or only where the model does.")
        function = choice("--stop", STOPS, rare=True, default=usual("stop"), help=stop)(function)
        for name, kind, metavar, text in numbers:
            flag = f"--{name.replace('_', '-')}"
            function = rare(flag, type=kind, default=usual(name), metavar=metavar, help=said(text))(function)
        return function

    return decorated


def cluster_options(function: Function) -> Function:
    """Add the options of a Ray cluster."""
    for option in (
        rare("--ray-gpus", type=float, metavar="N", show_default="1 if there is any", help="GPUs per worker."),
        rare("--ray-cpus", type=int, metavar="N", show_default="1", help="CPU cores per worker."),
        rare("--ray-workers", type=int, metavar="N", show_default="as fit", help="Maximum number of workers."),
        rare("--ray", metavar="ADDRESS", help="Compute on a Ray cluster: auto, local or HOST:PORT."),
    ):
        function = option(function)
    return function


def index_argument(*, required: bool = True) -> Callable[[Function], Function]:
    """Add the argument INDEX; `--index INDEX` means the same.

    Raises:
        OptionError: Both are given.
    """

    def decorated(function: Function) -> Function:
        @functools.wraps(function)
        def command(*, index: str | None, index_option: str | None, **options: Any) -> Any:
            if index is not None and index_option is not None:
                raise OptionError(f"found both INDEX {index} and --index {index_option}; give one of them")
            path = index if index is not None else index_option
            return function(index=path, **options)

        argument = click.argument(
            "index",
            cls=FirstArgument,
            option="index_option",
            needed=required,
            metavar="INDEX" if required else "[INDEX]",
        )
        option = rare("--index", "index_option", metavar="INDEX", help="The same as the argument INDEX.")
        return argument(option(command))  # pyright: ignore[reportReturnType] - the signature differs on purpose

    return decorated


@contextlib.contextmanager
def chosen_workers(
    ray: str | None, ray_workers: int | None, ray_cpus: int | None, ray_gpus: float | None
) -> "Iterator[Workers]":
    """The workers that compute: this process, or those of a cluster.

    Raises:
        OptionError: Options of a cluster are given without one, or the cluster cannot be reached.
    """
    if ray is None:
        if any(value is not None for value in (ray_workers, ray_cpus, ray_gpus)):
            raise OptionError("--ray-workers, --ray-cpus, --ray-gpus: need a cluster; name one with --ray ADDRESS")
        from trackstar.workers.protocol import THIS_PROCESS

        yield THIS_PROCESS
        return
    from trackstar.workers import RayWorkers

    with RayWorkers(ray, workers=ray_workers, cpus=1 if ray_cpus is None else ray_cpus, gpus=ray_gpus) as workers:
        yield workers


def check_local(out: str) -> None:
    """Raise if the output folder is a URL.

    Raises:
        OptionError: `out` is a URL.
    """
    from trackstar.store import is_url

    if is_url(out):
        raise OptionError(f"--out: expected a folder on this machine, found {out}; only indexes can be at a URL")


def note(line: str) -> None:
    """Print a line on stderr, with flags and commands in place of parameters and functions."""
    click.echo(reworded_line(line), err=True)


@runtime_checkable
class Plan(Protocol):
    """A plan of some work."""

    def lines(self) -> Sequence[str]:
        """The plan, a line for each subject."""
        ...

    def check(self) -> None:
        """Raise if memory or disk do not suffice."""
        ...


def print_plan(plan: Plan) -> None:
    """Print the plan of a dry run.

    Raises:
        OptionError: Memory or disk do not suffice.
    """
    for line in plan.lines():
        click.echo(reworded_line(line))
    plan.check()


def default(name: str) -> Any:
    """The default of a setting of an index."""
    return IndexSettings.default(name)
