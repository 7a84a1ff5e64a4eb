"""The stages in order: corpus and model to index, index and queries to ranked training examples (Eq. 1-4).

∇Loss(z)            gradients.py
∇Loss(z)/√V         second_moment.py, folded in by projection.py
φ = P(∇Loss/√V)     projection.py
R                   curvature.py: R_train while indexing, R_eval and their mixing here
Ḡ = R^(-1/2)φ/‖·‖   curvature.py, retrieval.py
Ḡ(z_m)·Ḡ(z_q)       retrieval.py; reranking.py computes the best candidates' again
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.arrays import Share, index_share
from trackstar.audit_record import Asked, QuestionEntry
from trackstar.batching import plan_batches
from trackstar.correction import task_correction
from trackstar.curvature import check_autocorrelation_size
from trackstar.errors import OptionError
from trackstar.examples import Corpus, Query, open_corpus, tokenize_query
from trackstar.gradients import Output
from trackstar.index_job import IndexJob, IndexSettings, prepare
from trackstar.index_settings import check_positive, chosen_windows
from trackstar.model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.projecting import projected
from trackstar.provenance import model_of_index, second_moment_of_index
from trackstar.reranking import RERANKED, ExactScores, exact_top, rerank
from trackstar.results import QueryReport, QueryResult, Ranked
from trackstar.retrieval import top_candidates, trackstar_scorer, unit_queries
from trackstar.second_moment import SecondMoment
from trackstar.store import (
    CodecName,
    Coordinates,
    Index,
    IndexWriter,
    Place,
    ProjectionKind,
    as_folder,
    check_codec,
    check_quantizable,
    quantized_bits,
    row_bytes,
)
from trackstar.workers import THIS_PROCESS, GradientSetup, ThisProcess, Workers

# A shard's codes: large enough to scan well, small enough to be held in memory and lost to a kill.
_SHARD_BYTES = 64 << 20


def build_index(
    model: LanguageModel | str | Path,
    data: object,
    out: str | Place,
    *,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    window_tokens: int | None = None,
    overlap: int = 1,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
    layer_blocks: int = 8,
    second_moment: str | Path | SecondMoment = "auto",
    second_moment_kind: Literal["factored", "elementwise"] = "factored",
    second_moment_examples: int = 256,
    side: int = 64,
    seed: int = 0,
    codec: CodecName = "1-bit",
    coordinates: Coordinates | None = None,
    whitening_examples: int = 16_384,
    damping: float | None = None,
    shard_examples: int | None = None,
    batch_tokens: int = 2048,
    output: Output = "loss",
    projection: ProjectionKind = "two-sided",
    share: Share | str | None = None,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> Index:
    """Index a corpus: φ = P(∇Loss/√V) of every training example, and R_train (Eq. 2-4).

    A run that was interrupted goes on where it was when the same call is made again; a finished index is opened.

    Args:
        model: A loaded model, or where to load one from.
        data: The corpus; see `open_corpus`.
        out: The index's folder.
        text_field: The field that holds the text.
        id_field: The field that names an example; None finds it.
        limit: Most records to read.
        window_tokens: Longer documents are split into windows of this many tokens; None is the model's context or
            `batch_tokens`, whichever is shorter.
        overlap: Tokens that a window repeats from the one before, as context only.
        revision: Of a hub's model.
        gguf_file: Of GGUF weights.
        dtype: Of the gradients' computation, `float32` or `bfloat16`.
        device: Where gradients are computed.
        attention_pattern: See `find_layer_blocks`.
        mlp_pattern: See `find_layer_blocks`.
        layer_blocks: Blocks for each of attention and MLP (8 in the paper).
        second_moment: V: `auto` reads the optimizer's state beside the model's weights and estimates V where there is
            none; `estimate`, `none`, a file or folder of optimizer state, or a `SecondMoment`.
        second_moment_kind: `factored` folds into the projections at no cost; `elementwise` is exact and slower.
        second_moment_examples: How many examples V is estimated from.
        side: √d, rows and columns of a block of φ (64 in the paper).
        seed: Of the projections and of the sample that V is estimated from.
        codec: How a row is stored: `float32`, `bfloat16`, `float16`, `int8`, `4-bit`, `2-bit` or `1-bit`. The default,
            with the paper's 65,536 dimensions, is the best that 8 KB an example buy (docs/stores.md).
        coordinates: `projected` stores φ; `whitened` stores u = W_train φ, which codes of few bits are made for. None
            is `whitened` for int8 and fewer bits, which cannot be projected: R_train is that of the rows as stored.
        whitening_examples: How many records R_train comes from where coordinates are whitened, drawn with `seed`: a
            first pass, whose gradients are not computed again. A corpus of no more is taken whole.
        damping: Where coordinates are whitened, the fraction of a block's mean eigenvalue added to R_train; None is
            chosen by `shrinkage_damping`.
        shard_examples: Examples of a shard; None makes shards of about 64 MiB, 4,096 examples at most.
        batch_tokens: Most tokens of a batch, padding included; peak memory follows it.
        output: What is differentiated: the `loss`, or to be compared with it TRAK's `margin` or the `logit`.
        projection: `two-sided` (Eq. 4), or to be compared with it, `one-sided`: one dense matrix for flattened
            gradients, for small models alone.
        share: `i/n`: as the i-th of n independent runs that make one index; see `arrays.py`. `finish_index` completes
            it.
        workers: Who computes: this process, or a cluster's (`trackstar.cluster.RayWorkers`).
        progress: Whether progress is shown where stderr is a terminal.

    Returns:
        The finished index, opened; with `share`, what is there of it.

    Raises:
        TrackstarError: Something cannot be read, used or written; see `trackstar.errors`.
    """
    if not isinstance(model, LanguageModel):
        model = load_model(
            model,
            revision=revision,
            gguf_file=gguf_file,
            dtype=dtype,
            device=device,
            attention_pattern=attention_pattern,
            mlp_pattern=mlp_pattern,
            layer_blocks=layer_blocks,
        )
    share = Share.parsed(share) if isinstance(share, str) else share
    folder = as_folder(out)
    check_codec(codec)
    if coordinates is None:
        coordinates = "projected" if quantized_bits(codec) is None else "whitened"
    check_quantizable(codec, side)
    if coordinates == "projected" and quantized_bits(codec) is not None:
        raise OptionError(
            f"--coordinates projected: goes with float32, bfloat16 and float16, found --codec {codec}, whose codes are "
            "too coarse to take R_train from; take one of these, or leave --coordinates out"
        )
    if damping is not None and coordinates == "projected":
        raise OptionError(
            f"--damping {damping}: goes with whitened coordinates; where rows are projected, R is damped in a query "
            "(trackstar query --damping)"
        )
    if damping is not None and not 0 <= damping < math.inf:
        raise OptionError(f"--damping {damping}: expected 0 or more, as a fraction of the mean eigenvalue")
    check_positive("--shard-examples", shard_examples)
    check_positive("--whitening-examples", whitening_examples)
    check_positive("--side", side)
    check_positive("--second-moment-examples", second_moment_examples)
    check_autocorrelation_size(len(model.blocks), side, model.device)
    corpus = open_corpus(data, text_field=text_field, id_field=id_field, limit=limit)
    windows = chosen_windows(model, window_tokens=window_tokens, overlap=overlap, batch_tokens=batch_tokens)
    with Progress("Indexing", unit="examples", total=_count(corpus, progress and share is None), shown=progress) as bar:
        settings = IndexSettings(
            second_moment=second_moment,
            second_moment_kind=second_moment_kind,
            second_moment_examples=second_moment_examples,
            side=side,
            seed=seed,
            codec=codec,
            coordinates=coordinates,
            whitening_examples=whitening_examples,
            damping=damping,
            shard_examples=shard_examples or default_shard_examples(len(model.blocks), side, codec),
            output=output,
            projection=projection,
        )

        def prepared() -> IndexJob:
            return prepare(
                folder, corpus, model, windows, settings,
                batch_tokens=batch_tokens, workers=workers, bar=bar, progress=progress,
            )  # fmt: skip

        if share is not None:
            index_share(folder, prepared, share, bar)
            return Index.open(folder, allow_incomplete=True)
        job = prepared()
        with IndexWriter.open(folder, job.manifest, on_note=bar.note) as writer:
            completion = writer.manifest.completion
            if completion is not None:
                bar.note(f"{out}: the index is complete, with {completion.rows} examples")
            else:
                bar.advance(writer.resume_point.record)
                job.begin(writer, bar)
                job.fill(writer, bar)
    return Index.open(folder)


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


def default_shard_examples(blocks: int, side: int, codec: CodecName) -> int:
    """Examples of a shard where nothing else is asked: about 64 MiB, 4,096 examples at most and 64 at least."""
    return min(4096, max(64, _SHARD_BYTES // row_bytes(codec, blocks * side**2, blocks)))


def _count(corpus: Corpus, progress: bool) -> int | None:
    """How many records there are, for the time left; only where somebody watches."""
    return corpus.count() if progress and sys.stderr.isatty() else None
