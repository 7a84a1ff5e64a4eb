"""MRR against the number of candidates: every query is ranked in smaller pools of its own.

The pool of query q with n candidates, P_q(n), holds all gold examples of q and none that is left
out of its ranking. A gold candidate's rank in it is

    1 + the number of m in P_q(n) whose score(q, m) is higher, or equal and from an earlier row.

Scores are those of the whole corpus: R_train and V are computed from all candidates, and R_eval
from all queries. So the size changes only the competition, and the rank in P_q(all) is the
report's. There are two kinds of pools:

* **random**: the gold examples, and the first n - |gold| other candidates in an order drawn by
  seed, query and example id.
* **a third BM25's best**: the gold examples, those of BM25's first ⌊n/3⌋ candidates for the query
  that are not gold, as far as there is room, and the first others in the same drawn order.

A smaller pool is a subset of a larger one of its kind, and neither depends on the candidates'
order: equal scores of BM25 are taken in the drawn order. Since pools are nested, a rank can only
grow with n.

TRAK's published kernel (ΦᵀΦ)⁻¹ is a sum over the candidates, which in a small pool are few. It is
measured in a row of its own, `TRAK, kernel of the pool`, with Φ the rows of P_q(n) alone, for pools
of at most `MOST_KERNEL_ROWS`. Between this row and TRAK's only the kernel differs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.baselines.trak import TRAK
from trackstar.corpus.digests import draw_bytes
from trackstar.errors import OptionError
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.facts import Evidence, Fact, evidence
from trackstar.evaluation.metrics import QueryMetrics, gold_ranks, metrics_of_ranks
from trackstar.evaluation.rankings import Rankings
from trackstar.evaluation.workspace import Workspace
from trackstar.text import one_line

PoolKind = Literal["random", "a third BM25's best"]
POOL_KINDS: tuple[PoolKind, ...] = get_args(PoolKind)

POOL_KERNEL = "TRAK, kernel of the pool"
"""TRAK with (ΦᵀΦ)⁻¹ over each query's pool instead of all candidates."""

MOST_KERNEL_ROWS = 500
"""Largest pool whose own kernel is computed: a query takes time that grows with the cube of its rows."""

Rows = Int64[np.ndarray, "_"]
PoolsOfKind = Mapping[int, Sequence[Rows]]
"""Size of the pools to each query's pool, as ascending rows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolSizes:
    """Ranks of the gold candidates in pools of several sizes.

    Attributes:
        sizes: Numbers of candidates, ascending; the last is that of all.
        methods: Names of the methods, in the order of tables; `gold` is left out.
        ranks: Kind of the pool, method and size to each query's gold ranks, ascending. The pool's
            own kernel has none for large pools.
    """

    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    ranks: Mapping[tuple[PoolKind, str, int], tuple[tuple[int, ...], ...]]

    def metrics(self, kind: PoolKind, method: str, size: int) -> QueryMetrics | None:
        """Reciprocal rank and recall@10 of each query; None if they were not measured."""
        ranks = self.ranks.get((kind, method, size))
        return None if ranks is None else metrics_of_ranks(ranks)


def ranks_by_pool_size(
    config: EvaluationConfig, facts: Sequence[Fact], rankings: Rankings, workspace: Workspace
) -> PoolSizes | None:
    """Rank every query in smaller pools with all methods but `gold`; saved per method.

    Args:
        config: Settings of the report; None is returned if `pool_sizes` is empty.
        facts: The facts to trace, with the first of the templates; questions without gold examples are left
            out, and None is returned if none has one.
        rankings: Rankings of the report.
        workspace: The report's folder.
    """
    if not config.pool_sizes:
        return None
    template, total = config.templates[0], len(rankings.pool)
    smaller = tuple(sorted(size for size in config.pool_sizes if size < total))
    every = evidence(facts, rankings.pool.row_of, strict=config.strict)
    scored = [number for number, gold in enumerate(every.gold) if gold]
    if not scored:
        return None
    found = Evidence(
        gold=tuple(every.gold[number] for number in scored),
        left_out=tuple(every.left_out[number] for number in scored),
    )
    of_scored = [facts[number] for number in scored]

    @functools.cache
    def pools() -> dict[PoolKind, PoolsOfKind]:
        nearness = rankings.scores("BM25", facts, template)[scored]
        return drawn_pools(of_scored, rankings.pool.example_ids, found, smaller, nearness, seed=config.seed)

    methods = [method for method in config.methods if method != "gold"]
    with_kernels = [POOL_KERNEL] if TRAK.name in methods else []
    ranks: dict[tuple[PoolKind, str, int], tuple[tuple[int, ...], ...]] = {}
    for method in (*methods, *with_kernels):
        sources = _sources(method, config, facts, rankings, smaller)
        compute = functools.partial(_compute, method, facts, scored, template, rankings, found, pools)
        saved = workspace.result(f"pools/{method} template {template}", sources, compute)
        ranks |= {(kind, method, size): tuple(map(tuple, of_queries)) for kind, size, of_queries in saved}
    for method in methods:
        whole = rankings.ranking(method, facts, template=template).ranks
        ranks |= {(kind, method, total): tuple(whole[number] for number in scored) for kind in POOL_KINDS}
    return PoolSizes(sizes=(*smaller, total), methods=(*methods, *with_kernels), ranks=ranks)


def check_pool_sizes(config: EvaluationConfig, facts: Sequence[Fact]) -> None:
    """Raise if a fact has more gold examples than the smallest pool has candidates.

    Raises:
        OptionError: There is such a fact; the message names it.
    """
    most, fact_id = max((len(fact.gold_strict if config.strict else fact.gold), fact.fact_id) for fact in facts)
    if config.pool_sizes and most > min(config.pool_sizes):
        raise OptionError(
            f"`pool_sizes`: expected at least {most}, the number of gold examples of fact {one_line(fact_id)}, found "
            f"{min(config.pool_sizes)}"
        )


def drawn_pools(
    facts: Sequence[Fact],
    example_ids: Sequence[str],
    found: Evidence,
    sizes: Sequence[int],
    nearness: Float[Tensor, "queries candidates"],
    *,
    seed: int,
) -> dict[PoolKind, PoolsOfKind]:
    """Both kinds of pools of every query, nested in the sizes.

    Args:
        facts: The facts to trace.
        example_ids: Ids of all candidates.
        found: Rows of each fact's gold candidates, and of those that are left out.
        sizes: Numbers of candidates, gold ones included; a query with fewer takes all.
        nearness: BM25's scores.
        seed: Seed of the drawn orders.
    """
    pools: dict[PoolKind, dict[int, list[Rows]]] = {kind: {size: [] for size in sizes} for kind in POOL_KINDS}
    for fact, gold, left_out, scores in zip(facts, found.gold, found.left_out, nearness.numpy(), strict=True):
        order = drawn_order(fact.fact_id, example_ids, seed)
        order = order[~np.isin(order, left_out)]
        nearest = order[np.argsort(-scores[order], kind="stable")]
        for size in sizes:
            pools["random"][size].append(_pool(size, gold, nearest[:0], order))
            pools["a third BM25's best"][size].append(_pool(size, gold, nearest[: size // 3], order))
    return dict(pools)


def drawn_order(query_id: str, example_ids: Sequence[str], seed: int) -> Rows:
    """Rows of all candidates in an order that depends on seed, query and example ids only."""
    key = f"trackstar pool {seed}"
    draws = [
        draw_bytes(f"{query_id}\0{name}".encode("utf-8", "surrogatepass"), key=key, bits=64) for name in example_ids
    ]
    return np.argsort(np.frombuffer(b"".join(draws), dtype="<u8"), kind="stable")


def _pool(size: int, gold: Sequence[int], near: Rows, order: Rows) -> Rows:
    """The gold rows, those of `near`, and the first others in the drawn order; `size` in all, ascending."""
    room = size - len(gold)
    near = near[~np.isin(near, gold)][:room]
    others = order[~np.isin(order, gold) & ~np.isin(order, near)][: room - len(near)]
    return np.sort(np.concatenate([np.array(gold, dtype=np.int64), near, others]))


def ranks_in_pools(
    scores: Sequence[Float[Tensor, "_"]], pools: Sequence[Rows], gold: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Ranks of each query's gold candidates in its pool, as `gold_ranks` counts them.

    Args:
        scores: Scores of each query's pool.
        pools: Rows of each query's pool, ascending.
        gold: Rows of each query's gold candidates, all of them in the pool.
    """
    return [
        gold_ranks(of_pool[None], [np.searchsorted(rows, correct).tolist()])[0]
        for of_pool, rows, correct in zip(scores, pools, gold, strict=True)
    ]


def _compute(
    method: str,
    facts: Sequence[Fact],
    scored: Sequence[int],
    template: int,
    rankings: Rankings,
    found: Evidence,
    pools: Callable[[], Mapping[PoolKind, PoolsOfKind]],
) -> list[Any]:
    """Kind, size and ranks of every pool, as JSON values."""
    kernels = method == POOL_KERNEL
    of_all = None if kernels else rankings.scores(method, facts, template)[scored]
    of_scored = [facts[number] for number in scored]
    results = []
    for kind, of_sizes in pools().items():
        for size, rows in of_sizes.items():
            if of_all is not None:
                scores = [row[torch.from_numpy(pool)] for row, pool in zip(of_all, rows, strict=True)]
            elif size <= MOST_KERNEL_ROWS:
                scores = rankings.scores_by_kernels_of_pools(of_scored, template, rows)
            else:
                continue
            results.append([kind, size, ranks_in_pools(scores, rows, found.gold)])
    return results


def _sources(
    method: str, config: EvaluationConfig, facts: Sequence[Fact], rankings: Rankings, sizes: Sequence[int]
) -> dict[str, Any]:
    """All that a method's ranks depend on, as JSON values."""
    ranking = rankings.sources(TRAK.name if method == POOL_KERNEL else method, facts, config.templates[0])
    return ranking | {"method": method, "sizes": list(sizes), "seed": config.seed}
