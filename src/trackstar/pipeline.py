"""The stages in order: corpus and model to index, index and queries to ranked training examples (Eq. 1-4).

∇Loss(z)            gradients.py
∇Loss(z)/√V         second_moment.py, folded in by projection.py
φ = P(∇Loss/√V)     projection.py
R                   curvature.py: R_train while indexing, R_eval and their mixing here
Ḡ = R^(-1/2)φ/‖·‖   curvature.py, retrieval.py
Ḡ(z_m)·Ḡ(z_q)       retrieval.py; reranking.py computes the best candidates' again
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.correction import task_correction
from trackstar.curvature import check_autocorrelation_size
from trackstar.errors import OptionError
from trackstar.examples import Corpus, Query, open_corpus, tokenize_query
from trackstar.first_pass import TrainWhitening, whitening_of_sample
from trackstar.gradients import Output
from trackstar.indexing import GradientProjector, RowMaker, chosen_second_moment, projector_of, write_shards
from trackstar.model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.projection import floored_entries
from trackstar.provenance import make_manifest, model_of_index, second_moment_of_index
from trackstar.reranking import RERANKED, ExactScores, exact_top, rerank
from trackstar.results import QueryReport, QueryResult, Ranked
from trackstar.retrieval import top_candidates, trackstar_scorer, unit_queries
from trackstar.second_moment import SecondMoment
from trackstar.store import (
    PART_FOLDER,
    CodecName,
    Coordinates,
    Index,
    IndexWriter,
    ProjectionKind,
    WindowsEntry,
    check_codec,
    check_quantizable,
    load_manifest,
    quantized_bits,
    row_bytes,
)

# A shard's codes: large enough to scan well, small enough to be held in memory and lost to a kill.
_SHARD_BYTES = 64 << 20


def build_index(
    model: LanguageModel | str | Path,
    data: object,
    out: str | Path,
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
            is `whitened` for int8 and fewer bits.
        whitening_examples: How many records R_train comes from where coordinates are whitened, drawn with `seed`: a
            first pass, whose gradients are not computed again. A corpus of no more is taken whole.
        damping: Where coordinates are whitened, the fraction of a block's mean eigenvalue added to R_train; None is
            chosen by `shrinkage_damping`.
        shard_examples: Examples of a shard; None makes shards of about 64 MiB, 4,096 examples at most.
        batch_tokens: Most tokens of a batch, padding included; peak memory follows it.
        output: What is differentiated: the `loss`, or to be compared with it TRAK's `margin` or the `logit`.
        projection: `two-sided` (Eq. 4), or to be compared with it, `one-sided`: one dense matrix for flattened
            gradients, for small models alone.
        progress: Whether progress is shown where stderr is a terminal.

    Returns:
        The finished index, opened.

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
    check_codec(codec)
    if coordinates is None:
        coordinates = "projected" if quantized_bits(codec) is None else "whitened"
    check_quantizable(codec, side)
    _positive("--shard-examples", shard_examples)
    _positive("--whitening-examples", whitening_examples)
    _positive("--batch-tokens", batch_tokens)
    _positive("--side", side)
    _positive("--second-moment-examples", second_moment_examples)
    check_autocorrelation_size(len(model.blocks), side, model.device)
    corpus = open_corpus(data, text_field=text_field, id_field=id_field, limit=limit)
    window_tokens = window_tokens or min(model.context_tokens, batch_tokens)
    if window_tokens > model.context_tokens:
        raise OptionError(
            f"--window-tokens {window_tokens}: the model reads at most {model.context_tokens} tokens; give no more"
        )
    windows = WindowsEntry(tokens=window_tokens, overlap=overlap)
    with Progress("Indexing", unit="examples", total=_count(corpus, progress), shown=progress) as bar:
        moment = chosen_second_moment(
            second_moment,
            model,
            corpus,
            windows,
            kind=second_moment_kind,
            examples=second_moment_examples,
            seed=seed,
            batch_tokens=batch_tokens,
            out=Path(out),
            note=bar.note,
        )
        rows = shard_examples or _shard_rows(len(model.blocks), side, codec)
        manifest = make_manifest(
            model, corpus, windows, moment, seed=seed, side=side, codec=codec, shard_examples=rows, output=output,
            projection=projection,
        )  # fmt: skip

        def projector() -> GradientProjector:
            return projector_of(manifest, model, moment, batch_tokens=batch_tokens, note=bar.note)

        train = None
        if coordinates == "whitened":
            train = whitening_of_sample(
                Path(out), manifest, corpus, model, moment, projector, examples=whitening_examples, seed=seed,
                damping=damping, note=bar.note, progress=progress,
            )  # fmt: skip
            manifest = dataclasses.replace(manifest, coordinates=coordinates, whitening=train.entry)
        with IndexWriter.open(out, manifest, on_note=bar.note) as writer:
            completion = writer.manifest.completion
            if completion is not None:
                bar.note(f"{out}: the index is complete, with {completion.rows} examples")
            else:
                bar.advance(writer.resume_point.record)
                part = Path(out) / PART_FOLDER
                # Projected rows are all computed: what an earlier attempt left in there is not of this index.
                known = Index.open(part) if train is not None and load_manifest(part) is not None else None
                _fill(writer, corpus, model, moment, train, known, batch_tokens=batch_tokens, bar=bar)
    return Index.open(out)


def _fill(
    writer: IndexWriter,
    corpus: Corpus,
    model: LanguageModel,
    moment: SecondMoment,
    train: TrainWhitening | None,
    known: Index | None,
    *,
    batch_tokens: int,
    bar: Progress,
) -> None:
    bar.note(f"model: {model.architecture}, {model.coverage}")
    bar.note(f"second moment: {moment.source if moment.kind == 'none' else f'{moment.kind}, {moment.source}'}")
    manifest = writer.manifest
    blocks = len(manifest.layer_blocks)
    kib = row_bytes(manifest.codec, manifest.dimensions, blocks) / 1024
    mib = blocks * manifest.projection.side**4 * 4 / 2**20
    bar.note(
        f"{manifest.coordinates}: {manifest.dimensions:,} dimensions, {manifest.codec}, {kib:,.1f} KiB an example; R: "
        f"{mib:,.1f} MiB (--side)"
    )
    raised = floored_entries(moment)
    if raised:
        bar.note(
            f"second moment: {sum(raised.values())} entries of {len(raised)} matrices below {moment.floor:g} of their "
            "mean were raised to it"
        )
    if moment.kind != "none":
        writer.write_tensors("second_moment", moment.tensors())
    if train is not None:
        writer.write_tensors("whitening", {"whitening": train.whitening.factors})
    with projector_of(manifest, model, moment, batch_tokens=batch_tokens, note=bar.note) as projector:
        maker = RowMaker(projector, manifest, train.whitening if train is not None else None, known)
        end = write_shards(writer, corpus, model, maker, advance=bar.advance)
    if end.skipped:
        bar.note(f"{end.skipped} of {end.record} records have no token to score and were left out")
    writer.finish(records=end.record, skipped=end.skipped)


def answer_queries(
    index: Index | str | Path,
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
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        IndexMismatchError: The model is not the one that was indexed.
        TrackstarError: See `trackstar.errors`.
    """
    if not queries:
        raise OptionError("queries: found none, expected one or more")
    _positive("--top", k)
    index = index if isinstance(index, Index) else Index.open(index)
    model = model_of_index(index, model, device=device)
    phi, losses = query_gradients(index, model, queries, batch_tokens=batch_tokens, progress=progress)
    task_phi = phi
    if task is not None:
        task_phi, _ = query_gradients(index, model, task, batch_tokens=batch_tokens, progress=progress)
    correction = task_correction(index, task_phi, mixing=mixing, damping=damping)
    queries_in = correction.coordinates(phi)
    moment = second_moment_of_index(index)

    def projector() -> GradientProjector:
        return projector_of(index.manifest, model, moment, batch_tokens=batch_tokens)

    missed: tuple[float | None, ...] = (None,) * len(queries)
    count = reranked
    if count is None:
        count = RERANKED[index.manifest.codec]
        count = max(count, k) if count else 0
    if exact:
        vectors = unit_queries(queries_in, correction.whitening)
        again = ExactScores(index, projector, correction, vectors, progress=progress)
        top = exact_top(index, again, k, key=correction.key)
        count = index.rows
    else:
        scorer = trackstar_scorer(index, queries_in, correction.whitening, key=correction.key, progress=progress)
        vectors = scorer.vectors
        scorer = dataclasses.replace(scorer, vectors=vectors.to(device))
        if count:
            again = ExactScores(index, projector, correction, vectors, progress=progress)
            ranking = rerank(index, scorer, again, k, reranked=count, progress=progress)
            top, missed = ranking.top, ranking.missed
        else:
            top = top_candidates(index, scorer, k, progress=progress)
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
        index=str(index.path),
        model=model.source,
        coverage=str(model.coverage),
        second_moment=f"{index.manifest.second_moment.kind}, {index.manifest.second_moment.source}",
    )


def query_gradients(
    index: Index,
    model: LanguageModel,
    queries: Sequence[Query],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> tuple[Float[Tensor, "queries dimensions"], Float[Tensor, "queries"]]:
    """φ of each query, with the index's V and projections, and each completion's loss in nats."""
    moment = second_moment_of_index(index)
    examples = [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]
    phi = torch.empty(len(examples), index.dimensions)
    losses = torch.empty(len(examples))
    with (
        Progress("Queries' gradients", unit="queries", total=len(examples), shown=progress) as bar,
        projector_of(index.manifest, model, moment, batch_tokens=batch_tokens, note=bar.note) as projector,
    ):
        for places, batch_phi, batch_losses in projector.batches(examples):
            phi[torch.tensor(places)] = batch_phi.cpu()
            losses[torch.tensor(places)] = batch_losses.cpu()
            bar.advance(len(places))
    return phi, losses


def _ranked(index: Index, rows: Tensor, scores: Tensor) -> tuple[Ranked, ...]:
    ranked = []
    for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
        example = index.example(row).example
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


def _shard_rows(blocks: int, side: int, codec: CodecName) -> int:
    return min(4096, max(64, _SHARD_BYTES // row_bytes(codec, blocks * side**2, blocks)))


def _count(corpus: Corpus, progress: bool) -> int | None:
    """How many records there are, for the time left; only where somebody watches."""
    return corpus.count() if progress and sys.stderr.isatty() else None


def _positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise OptionError(f"{option} {value}: expected 1 or more")
