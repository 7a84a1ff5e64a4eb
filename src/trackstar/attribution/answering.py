"""Answers to a set of queries: an index's candidates, ranked by their influence (Eq. 1-3).

The stages in order, and the modules that hold them:

    ∇Loss(z)                      gradients/per_example.py
    V                             gradients/second_moment.py
    φ = P(∇Loss/√V)               gradients/projection.py        (Eq. 4)
    R                             curvature/autocorrelation.py, curvature/mixing.py  (Eq. 3)
    Ḡ = R^(-1/2)φ / ‖R^(-1/2)φ‖   curvature/whitening.py, curvature/task.py          (Eq. 2)
    Ḡ(z_m)·Ḡ(z_q)                 retrieval/                     (Eq. 1)
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.attribution.question import Provenance, QuestionEntry
from trackstar.attribution.results import QueryReport, QueryResult, Ranked
from trackstar.attribution.verdicts import Verdict, verdicts
from trackstar.attribution.writing import check_queries_as_json
from trackstar.choices import JOINS, DeviceMap
from trackstar.corpus import Query, query_text, query_with_texts, tokenize_query
from trackstar.corpus.tokenization import leading_token
from trackstar.curvature.task import TaskCorrection, check_choices, task_correction
from trackstar.errors import OptionError, check_at_least, check_choice
from trackstar.gradients.projector import projected
from trackstar.model.batching import plan_batches
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.retrieval.ranking import Ranking, RankingOptions, rank_candidates
from trackstar.store import Index, Place
from trackstar.text import abridged
from trackstar.workers.index_model import model_of_index, second_moment_of_index
from trackstar.workers.protocol import THIS_PROCESS, Workers
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
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
    batch_tokens: int = 2048,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> QueryReport:
    """Rank an index's training examples by their influence on each query (Eq. 1-3).

    Args:
        index: The index, opened, or its path or URL.
        queries: The prompts and completions to attribute.
        model: The model that was indexed, loaded, or its path if it has moved; None loads it from
            the path in the index.
        k: Number of proponents and of opponents per query.
        mixing: λ, the weight of R_eval; None follows the paper's rule, or is 0 with fewer task
            queries than `MIN_TASK_QUERIES`.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block; None is
            chosen by `shrinkage_damping`. A whitened index has the damping that it was built with.
        task: The queries that R_eval and λ are computed from; None is the facts among `queries`, so
            that λ is 0 for other kinds, as in Appendix A.5.
        reranked: Candidates per query, at each end of the store's ranking, that are re-ranked by
            recomputed gradients; None is the codec's `RERANKED`, 0 is none.
        exact: Whether every candidate's gradient is recomputed and the store's codes are not used.
            The same call resumes an interrupted run.
        device: Device that computes gradients and scans the store, if the model is not loaded yet; see
            `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
        batch_tokens: Most tokens per batch, padding included.
        workers: This process, or a cluster's workers.
        progress: Whether progress is shown.

    Raises:
        IndexMismatchError: The model is not the one that was indexed.
        TrackstarError: See `trackstar.errors`.
    """
    queries = checked_queries(queries)
    check_at_least("k", k)
    check_at_least("reranked", reranked, 0)
    check_at_least("batch_tokens", batch_tokens)
    if exact and reranked is not None:
        raise OptionError(
            f"`reranked`: expected none with `exact=True`, which re-ranks every candidate, found {reranked}"
        )
    check_queries_as_json(queries)
    index = Index.of(index)
    check_choices(index, mixing=mixing, damping=damping)
    model = model_of_index(index, model, device=device, device_map=device_map)
    in_template = index.manifest.in_template(queries)
    judged = verdicts(model, in_template, batch_tokens=batch_tokens, progress=progress)
    queries = [query_with_texts(query, model.tokenizer) for query in in_template]
    setup = gradient_setup(index, batch_tokens)
    phi, losses = gradients_of_queries(model, setup, queries, workers=workers, progress=progress)
    if task is None:
        task_phi = phi[facts_among(queries)]
    else:
        task_phi, _ = gradients_of_queries(model, setup, task, workers=workers, progress=progress)
    correction = task_correction(index, task_phi, mixing=mixing, damping=damping)
    options = RankingOptions(k=k, reranked=reranked, exact=exact)
    ranking = rank_candidates(index, model, setup, correction, phi, options, workers=workers, progress=progress)
    question = QuestionEntry.of(
        task, top=k, mixing=mixing, damping=damping, reranked=reranked, exact=exact, batch_tokens=batch_tokens
    )
    provenance = Provenance.of_index(index, question, device=model.device_names)
    report = _report(index, model, queries, losses.tolist(), correction, ranking, provenance)
    return with_kinds(report, judged, question)


def facts_among(queries: Sequence[Query]) -> list[int]:
    """Numbers of the queries that R_eval is computed from if no task is given: those that ask for a fact.

    The paper's R is task-specific for facts only (Appendix A.5).
    """
    return [number for number, query in enumerate(queries) if query.asks_for_fact]


def with_kinds(report: QueryReport, judged: Sequence[Verdict | None], question: QuestionEntry) -> QueryReport:
    """The report with the verdicts on its queries and, if they are their own task, a note on their kinds."""
    own_task = question.task is None and question.mixing is None
    results = tuple(
        dataclasses.replace(result, verdict=verdict) for result, verdict in zip(report.results, judged, strict=True)
    )
    report = dataclasses.replace(report, results=results)
    facts, others = report.mixing.queries, [r.query for r in results if not r.query.asks_for_fact]
    if not own_task or not others:
        return report
    if not facts:
        rule = "R_train alone, as no query asks for a fact: R is specific to the task of facts only (Appendix A.5)"
        return dataclasses.replace(report, mixing=dataclasses.replace(report.mixing, rule=rule))
    if report.mixing.value == 0:
        return report
    note = (
        f"R_eval is that of the {facts:,} facts among the queries, and {len(others):,} of other kinds are ranked with "
        "it, too; ask them alone, or give `mixing` as 0, to rank them as in Appendix A.5"
    )
    return dataclasses.replace(report, notes=(*report.notes, note))


def checked_queries(queries: object) -> list[Query]:
    """Queries as a list, checked.

    Raises:
        OptionError: They are not a series of queries with texts, or there is none.
    """
    if isinstance(queries, (Query, str)) or not isinstance(queries, Iterable):
        raise OptionError(f"`queries`: expected a sequence of queries, found {abridged(queries)}; pass it in a list")
    found = list(queries)
    for query in found:
        if isinstance(query, Query):
            check_choice("join", query.join, JOINS)
        texts = (query.query_id, query.prompt, query.completion) if isinstance(query, Query) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise OptionError(
                f"`queries`: expected queries whose name, prompt and completion are strings, found {abridged(query)}; "
                "make each with `Query`"
            )
    if not found:
        raise OptionError("`queries`: expected one or more, found none")
    return found


def query_notes(queries: Sequence[Query], model: LanguageModel) -> tuple[str, ...]:
    """Notes for the user on how queries were read."""
    notes = []
    token = leading_token(model.tokenizer)
    count = sum(query.token_ids is None and query_text(query).startswith(token) for query in queries) if token else 0
    if count:
        notes.append(
            f"{count:,} of {len(queries):,} queries spell out {token}, which the tokenizer adds; each has it once"
        )
    long = sum(_is_cut(query, model) for query in queries)
    if long:
        notes.append(
            f"{long:,} of {len(queries):,} queries are longer than the model's context of {model.context_tokens:,} "
            "tokens; the beginning of each is not asked"
        )
    return tuple(notes)


def _is_cut(query: Query, model: LanguageModel) -> bool:
    """Whether the model's context does not hold all of a query."""
    example = tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens)
    if query.token_ids is not None:
        return len(example.token_ids) < len(query.token_ids)
    return len(example.text) < len(query_text(query))


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
    setup = gradient_setup(index, batch_tokens)
    return gradients_of_queries(model, setup, queries, workers=workers, progress=progress)


def gradients_of_queries(
    model: LanguageModel,
    setup: GradientSetup,
    queries: Sequence[Query],
    *,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> tuple[Float[Tensor, "queries dimensions"], Float[Tensor, "queries"]]:
    """`query_gradients` from an opened setup, so that V is read once for several sets of queries."""
    queries = setup.manifest.in_template(queries)
    examples = [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]
    # A part is a batch, so that every kind of worker computes the same batches.
    batches = plan_batches([len(example.token_ids) for example in examples], setup.batch_tokens)
    parts = ([examples[place] for place in batch] for batch in batches)
    phi, losses = torch.empty(len(examples), setup.manifest.dimensions), torch.empty(len(examples))
    with Progress("Queries' gradients", unit="queries", total=len(examples), shown=progress) as bar:
        results = workers.gradients(model, setup, projected, parts, advance=bar.advance, note=bar.note)
        for batch, (batch_phi, batch_losses) in zip(batches, results, strict=True):
            phi[torch.tensor(batch)], losses[torch.tensor(batch)] = batch_phi, batch_losses
    return phi, losses


def gradient_setup(index: Index, batch_tokens: int) -> GradientSetup:
    """How φ is computed with an index's V and projections."""
    return GradientSetup(
        manifest=index.manifest, second_moment=second_moment_of_index(index), batch_tokens=batch_tokens
    )


def _report(
    index: Index,
    model: LanguageModel,
    queries: Sequence[Query],
    losses: Sequence[float],
    correction: TaskCorrection,
    ranking: Ranking,
    provenance: Provenance | None,
) -> QueryReport:
    """The report on queries to an index."""
    top = ranking.top
    results = tuple(
        QueryResult(
            query=query,
            loss=losses[number],
            proponents=_ranked(index, top.proponents[number], top.proponent_scores[number]),
            opponents=_ranked(index, top.opponents[number], top.opponent_scores[number]),
            missed=ranking.missed[number],
        )
        for number, query in enumerate(queries)
    )
    manifest = index.manifest
    return QueryReport(
        results=results,
        mixing=correction.mixing,
        damping=correction.damping,
        damping_rule=correction.damping_rule,
        candidates=index.rows,
        codec=manifest.codec,
        reranked=ranking.reranked,
        recomputed=ranking.recomputed,
        index=str(index.path),
        model=model.source,
        coverage=str(model.coverage),
        second_moment=f"{manifest.second_moment.kind}, {manifest.second_moment.source}",
        provenance=provenance,
        notes=(*index.notes, *query_notes(queries, model)),
    )


def _ranked(index: Index, rows: Tensor, influences: Tensor) -> tuple[Ranked, ...]:
    """Candidates with their names and texts."""
    return tuple(
        Ranked(
            row=stored.row,
            example_id=stored.example.example_id,
            parent_id=stored.example.parent_id,
            influence=influence,
            text=stored.example.text,
        )
        for stored, influence in zip(index.some_examples(rows.tolist()), influences.tolist(), strict=True)
    )
