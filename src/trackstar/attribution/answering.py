"""The stages in order: corpus and model to index, index and queries to ranked training examples (Eq. 1-4).

∇Loss(z)            gradients.py
∇Loss(z)/√V         second_moment.py, folded in by projection.py
φ = P(∇Loss/√V)     projection.py
R                   curvature.py: R_train while indexing, R_eval and their mixing here
Ḡ = R^(-1/2)φ/‖·‖   curvature.py, retrieval.py
Ḡ(z_m)·Ḡ(z_q)       retrieval.py; reranking.py computes the best candidates' again
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.attribution.question import Asked, QuestionEntry
from trackstar.attribution.results import QueryReport, QueryResult, Ranked
from trackstar.corpus import Query, tokenize_query
from trackstar.curvature.task import task_correction
from trackstar.errors import OptionError
from trackstar.gradients.projector import projected
from trackstar.indexing.settings import check_positive
from trackstar.model.batching import plan_batches
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.retrieval.reranking import RERANKED, ExactScores, exact_top, rerank
from trackstar.retrieval.scoring import trackstar_scorer, unit_queries
from trackstar.retrieval.top_candidates import top_candidates
from trackstar.store import (
    Index,
    Place,
)
from trackstar.workers.made_with import model_of_index, second_moment_of_index
from trackstar.workers.protocol import THIS_PROCESS, ThisProcess, Workers
from trackstar.workers.setups import GradientSetup


def answer_queries(
    index: Index | str | Place,
    queries: Sequence[Query],
    *,
    model: LanguageModel | str | Path | None = None,
    k: int = 10,
    mixing: float | None = None,
    damping: float | None = None,
    task: Sequence[Query] | None = None,
    reranked: int | None = None,
    exact: bool = False,
    device: str = "cpu",
    batch_tokens: int = 2048,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> QueryReport:
    """Rank an index's training examples by their influence on each query (Eq. 1-3).

    Args:
        index: The index.
        queries: What to explain.
        model: The model that was indexed, loaded or where to load it from; None is where the index says it was.
        k: How many proponents and opponents to give.
        mixing: λ; None follows the paper's rule from the task's queries, or is 0 where there are fewer than
            `MIN_TASK_QUERIES`.
        damping: Fraction of a block's mean eigenvalue added to R; None is chosen by `shrinkage_damping`.
        task: The queries that R_eval and λ are taken from; None is `queries`.
        reranked: How many of each query's best and worst candidates by the store are ranked again from recomputed
            gradients; None is the codec's `RERANKED`, 0 is none.
        exact: Whether every candidate's gradient is computed again, and the store is not asked. It goes on where an
            interrupted run was.
        device: Where gradients are computed and the store is scanned.
        batch_tokens: Most tokens of a batch, padding included.
        workers: Who computes gradients and goes through the store.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        IndexMismatchError: The model is not the one that was indexed.
        TrackstarError: See `trackstar.errors`.
    """
    if not queries:
        raise OptionError("queries: found none, expected one or more")
    check_positive("--top", k)
    if exact and reranked is not None:
        raise OptionError(f"--rerank {reranked}: --exact ranks every candidate from its gradient; give one of them")
    index = index if isinstance(index, Index) else Index.open(index)
    model = model_of_index(index, model, device=device)
    shown = {"batch_tokens": batch_tokens, "workers": workers, "progress": progress}
    phi, losses = query_gradients(index, model, queries, **shown)
    task_phi = query_gradients(index, model, task, **shown)[0] if task is not None else phi
    correction = task_correction(index, task_phi, mixing=mixing, damping=damping)
    queries_in = correction.coordinates(phi)
    setup = GradientSetup(
        manifest=index.manifest, second_moment=second_moment_of_index(index), batch_tokens=batch_tokens
    )
    missed: tuple[float | None, ...] = (None,) * len(queries)
    recomputed = 0
    count = reranked
    if count is None:
        count = RERANKED[index.manifest.codec]
        count = max(count, k) if count else 0
    if exact:
        vectors = unit_queries(queries_in, correction.whitening)
        again = ExactScores(index, model, setup, correction, vectors, workers=workers, progress=progress)
        top = exact_top(index, again, k, key=correction.key)
        count = recomputed = index.rows
    else:
        scorer = trackstar_scorer(
            index, queries_in, correction.whitening, key=correction.key, workers=workers, progress=progress
        )
        vectors = scorer.vectors
        if isinstance(workers, ThisProcess):  # others' scans are on their own devices
            scorer = dataclasses.replace(scorer, vectors=vectors.to(model.device))
        if count:
            again = ExactScores(index, model, setup, correction, vectors, workers=workers, progress=progress)
            ranking = rerank(index, scorer, again, k, reranked=count, workers=workers, progress=progress)
            top, missed, recomputed = ranking.top, ranking.missed, ranking.recomputed
        else:
            top = top_candidates(index, scorer, k, workers=workers, progress=progress)
    results = tuple(
        QueryResult(
            query=query,
            loss=float(losses[number]),
            proponents=_ranked(index, top.proponents[number], top.proponent_scores[number]),
            opponents=_ranked(index, top.opponents[number], top.opponent_scores[number]),
            missed=missed[number],
        )
        for number, query in enumerate(queries)
    )
    return QueryReport(
        results=results,
        mixing=correction.mixing,
        damping=correction.damping,
        damping_rule=correction.damping_rule,
        candidates=index.rows,
        codec=index.manifest.codec,
        reranked=min(count, index.rows),
        recomputed=recomputed,
        index=str(index.path),
        model=model.source,
        coverage=str(model.coverage),
        second_moment=f"{index.manifest.second_moment.kind}, {index.manifest.second_moment.source}",
        asked=Asked.of_index(
            index,
            QuestionEntry.of(
                task,
                top=k,
                mixing=mixing,
                damping=damping,
                reranked=reranked,
                exact=exact,
                batch_tokens=batch_tokens,
            ),
            device=device,
        ),
    )


def query_gradients(
    index: Index,
    model: LanguageModel,
    queries: Sequence[Query],
    *,
    batch_tokens: int = 2048,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> tuple[Float[Tensor, "queries dimensions"], Float[Tensor, "queries"]]:
    """φ of each query, with the index's V and projections, and each completion's loss in nats."""
    setup = GradientSetup(
        manifest=index.manifest, second_moment=second_moment_of_index(index), batch_tokens=batch_tokens
    )
    examples = [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]
    # A part is a batch, so that the same are run whoever runs them.
    batches = plan_batches([len(example.token_ids) for example in examples], batch_tokens)
    parts = ([examples[place] for place in batch] for batch in batches)
    phi, losses = torch.empty(len(examples), index.dimensions), torch.empty(len(examples))
    with Progress("Queries' gradients", unit="queries", total=len(examples), shown=progress) as bar:
        found = workers.gradients(model, setup, projected, parts, advance=bar.advance, note=bar.note)
        for batch, (batch_phi, batch_losses) in zip(batches, found, strict=True):
            phi[torch.tensor(batch)], losses[torch.tensor(batch)] = batch_phi, batch_losses
    return phi, losses


def _ranked(index: Index, rows: Tensor, scores: Tensor) -> tuple[Ranked, ...]:
    ranked = []
    for stored, score in zip(index.some_examples(rows.tolist()), scores.tolist(), strict=True):
        row, example = stored.row, stored.example
        ranked.append(
            Ranked(
                row=row,
                example_id=example.example_id,
                parent_id=example.parent_id,
                influence=score,
                text=example.text,
            )
        )
    return tuple(ranked)
