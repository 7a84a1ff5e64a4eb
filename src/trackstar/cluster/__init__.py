"""The same work on a Ray cluster: gradients and scans by a pool of workers, each with the model (the extra `ray`).

    with trackstar.cluster.RayWorkers("auto") as workers:
        trackstar.build_index(model, corpus, "s3://bucket/index", workers=workers)

This process leads: it reads and tokenizes the corpus, hands out groups of examples, writes shards in their order and
sums R_train, so that the index is that of one process alone. See docs/how-to/clusters.md.
"""

from trackstar.cluster.ray_workers import RayWorkers

__all__ = ["RayWorkers"]
