"""Compute gradients (Eq. 1-4) and scan indexes, in this process or on a Ray cluster.

In: parts of work that do not depend on which worker computes them. Out: their results in the parts'
order, with the same bits on any number of workers of the same hardware. `RayWorkers` is imported on
first use, so that nothing else here needs Ray, which the extra `ray` installs:

    import trackstar
    from trackstar.workers import RayWorkers

    with RayWorkers("auto") as workers:
        trackstar.build_index(model, corpus, "s3://bucket/index", workers=workers)

The calling process reads and tokenizes the corpus, distributes groups of examples, writes shards in
order and sums R_train; the index is the one that it would build alone. See docs/how-to/clusters.md.
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
