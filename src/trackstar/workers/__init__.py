"""Where gradients are computed and stores are scanned: this process, or a Ray cluster.

In: parts of work that do not depend on who does them. Out: their results, in the parts' order, with the same bits
whoever computed them. `RayWorkers` needs the extra `ray`, and is imported when it is first used:

    with trackstar.workers.RayWorkers("auto") as workers:
        trackstar.build_index(model, corpus, "s3://bucket/index", workers=workers)

The process that calls leads: it reads and tokenizes the corpus, hands out groups of examples, writes shards in their
order and sums R_train, so that the index is that of one process alone. See docs/how-to/clusters.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackstar.workers.ray_workers import RayWorkers

__all__ = ["RayWorkers"]


def __getattr__(name: str) -> Any:
    if name == "RayWorkers":
        from trackstar.workers.ray_workers import RayWorkers

        return RayWorkers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
