"""What commands share: options of all that compute, of clusters, and how a value or a place is checked."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trackstar.cli.framework import RareOption
from trackstar.errors import OptionError

if TYPE_CHECKING:
    from trackstar.workers.protocol import Workers

Function = TypeVar("Function", bound=Callable[..., Any])


def rare(*names: str, **settings: Any) -> Callable[[Function], Function]:
    """An option that only `--help-all` shows."""
    return click.option(*names, cls=RareOption, **settings)


def shared(function: Function) -> Function:
    """Options of every command that computes."""
    device = click.option("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1; auto: all GPUs.  [cpu]")
    threads = rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
    return device(threads(function))


def clustered(function: Function) -> Function:
    """Options of the commands that a cluster can do."""
    for option in (
        rare("--ray-gpus", type=float, metavar="N", help="GPUs of a worker.  [1 where there are any]"),
        rare("--ray-cpus", type=int, metavar="N", help="CPU cores of a worker.  [1]"),
        rare("--ray-workers", type=int, metavar="N", help="Most workers.  [all that have room]"),
        rare("--ray", metavar="ADDRESS", help="Compute on a Ray cluster: auto, local, HOST:PORT."),
    ):
        function = option(function)
    return function


@contextlib.contextmanager
def chosen_workers(
    ray: str | None, ray_workers: int | None, ray_cpus: int | None, ray_gpus: float | None
) -> "Iterator[Workers]":
    """Who computes: this process, or a cluster's workers.

    Raises:
        OptionError: Options of a cluster without one, or a cluster that cannot be had.
    """
    if ray is None:
        if any(value is not None for value in (ray_workers, ray_cpus, ray_gpus)):
            raise OptionError("--ray-workers, --ray-cpus, --ray-gpus: belong to a cluster; say which with --ray")
        from trackstar.workers.protocol import THIS_PROCESS

        yield THIS_PROCESS
        return
    from trackstar.workers import RayWorkers

    with RayWorkers(ray, workers=ray_workers, cpus=1 if ray_cpus is None else ray_cpus, gpus=ray_gpus) as workers:
        yield workers


def on_this_machine(out: str) -> None:
    """Refuse a URL where a folder is to be written.

    Raises:
        OptionError: `out` is a URL.
    """
    from trackstar.store import is_url

    if is_url(out):
        raise OptionError(f"--out {out}: a URL, expected a folder of this machine: only indexes can be elsewhere")


def one_of(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        OptionError: It is none.
    """
    if value not in choices:
        raise OptionError(f"{option} {value}: expected one of {', '.join(choices)}")


def note(line: str) -> None:
    """Print a line beside the results, on stderr, whatever it quotes."""
    from trackstar.progress import printable

    click.echo(printable(line), err=True)
