"""The stages in order: corpus and model to index, index and queries to ranked training examples (Eq. 1-4).

∇Loss(z)            gradients.py
∇Loss(z)/√V         second_moment.py, folded in by projection.py
φ = P(∇Loss/√V)     projection.py
R                   curvature.py: R_train while indexing, R_eval and their mixing here
Ḡ = R^(-1/2)φ/‖·‖   curvature.py, retrieval.py
Ḡ(z_m)·Ḡ(z_q)       retrieval.py
"""

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
from trackstar.gradients import Output
from trackstar.indexing import GradientProjector, chosen_second_moment, write_shards
from trackstar.model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.projection import floored_entries
from trackstar.provenance import make_manifest, model_of_index, second_moment_of_index
from trackstar.results import QueryReport, QueryResult, Ranked
from trackstar.retrieval import top_candidates, trackstar_scorer
from trackstar.second_moment import SecondMoment
from trackstar.store import CodecName, Index, IndexWriter, ProjectionKind, WindowsEntry, codec_dtype

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
    codec: CodecName = "float16",
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
        codec: What φ is stored as: `float32`, `bfloat16` or `float16`.
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
    codec_dtype(codec)
    _positive("--shard-examples", shard_examples)
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
        rows = shard_examples or _shard_rows(len(model.blocks) * side**2, codec)
        manifest = make_manifest(
            model, corpus, windows, moment, seed=seed, side=side, codec=codec, shard_examples=rows, output=output,
            projection=projection,
        )  # fmt: skip
        with IndexWriter.open(out, manifest, on_note=bar.note) as writer:
            completion = writer.manifest.completion
            if completion is not None:
                bar.note(f"{out}: the index is complete, with {completion.rows} examples")
            else:
                bar.advance(writer.resume_point.record)
                _fill(writer, corpus, model, moment, batch_tokens=batch_tokens, bar=bar)
    return Index.open(out)


def _fill(
    writer: IndexWriter, corpus: Corpus, model: LanguageModel, moment: SecondMoment, *, batch_tokens: int, bar: Progress
) -> None:
    bar.note(f"model: {model.architecture}, {model.coverage}")
    bar.note(f"second moment: {moment.source if moment.kind == 'none' else f'{moment.kind}, {moment.source}'}")
    manifest = writer.manifest
    kib = manifest.dimensions * codec_dtype(manifest.codec).itemsize / 1024
    mib = len(manifest.layer_blocks) * manifest.projection.side**4 * 4 / 2**20
    bar.note(f"φ: {manifest.dimensions:,} dimensions, {kib:,.1f} KiB an example; R: {mib:,.1f} MiB (--side)")
    raised = floored_entries(moment)
    if raised:
        bar.note(
            f"second moment: {sum(raised.values())} entries of {len(raised)} matrices below {moment.floor:g} of their "
            "mean were raised to it"
        )
    if moment.kind != "none":
        writer.write_tensors("second_moment", moment.tensors())
    projection = writer.manifest.projection
    with GradientProjector(
        model,
        moment,
        seed=projection.seed,
        side=projection.side,
        batch_tokens=batch_tokens,
        note=bar.note,
        output=writer.manifest.output,
        kind=projection.kind,
    ) as projector:
        end = write_shards(writer, corpus, model, projector, advance=bar.advance)
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
        device: Where the queries' gradients are computed.
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
    scorer = trackstar_scorer(index, phi, correction.whitening, key=correction.key, progress=progress)
    top = top_candidates(index, scorer, k, progress=progress)
    results = tuple(
        QueryResult(
            query=query,
            loss=float(losses[number]),
            proponents=_ranked(index, top.proponents[number], top.proponent_scores[number]),
            opponents=_ranked(index, top.opponents[number], top.opponent_scores[number]),
        )
        for number, query in enumerate(queries)
    )
    return QueryReport(
        results=results,
        mixing=correction.mixing,
        damping=correction.damping,
        damping_rule=correction.damping_rule,
        candidates=index.rows,
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
    manifest = index.manifest
    moment = second_moment_of_index(index)
    examples = [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]
    phi = torch.empty(len(examples), index.dimensions)
    losses = torch.empty(len(examples))
    projection = manifest.projection
    with (
        Progress("Queries' gradients", unit="queries", total=len(examples), shown=progress) as bar,
        GradientProjector(
            model,
            moment,
            seed=projection.seed,
            side=projection.side,
            batch_tokens=batch_tokens,
            note=bar.note,
            output=manifest.output,
            kind=projection.kind,
        ) as projector,
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


def _shard_rows(dimensions: int, codec: str) -> int:
    return min(4096, max(64, _SHARD_BYTES // (dimensions * codec_dtype(codec).itemsize)))


def _count(corpus: Corpus, progress: bool) -> int | None:
    """How many records there are, for the time left; only where somebody watches."""
    return corpus.count() if progress and sys.stderr.isatty() else None


def _positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise OptionError(f"{option} {value}: expected 1 or more")
