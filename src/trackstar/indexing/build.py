"""Build an index: corpus and model to projected gradients and R_train (Eq. 2-4)."""

import math
import sys
from pathlib import Path
from typing import Literal

from trackstar.choices import CodecName, Coordinates, Output, ProjectionKind
from trackstar.corpus import Corpus, open_corpus
from trackstar.curvature.autocorrelation import check_autocorrelation_size
from trackstar.errors import OptionError
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.array_tasks import Share, index_share
from trackstar.indexing.job import IndexJob, prepare
from trackstar.indexing.settings import IndexSettings, check_positive, chosen_windows
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.store import (
    Index,
    IndexWriter,
    Place,
    as_folder,
    check_codec,
    check_quantizable,
    quantized_bits,
    row_bytes,
)
from trackstar.workers.protocol import THIS_PROCESS, Workers

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
        workers: Who computes: this process, or a cluster's (`trackstar.workers.RayWorkers`).
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


def default_shard_examples(blocks: int, side: int, codec: CodecName) -> int:
    """Examples of a shard where nothing else is asked: about 64 MiB, 4,096 examples at most and 64 at least."""
    return min(4096, max(64, _SHARD_BYTES // row_bytes(codec, blocks * side**2, blocks)))


def _count(corpus: Corpus, progress: bool) -> int | None:
    """How many records there are, for the time left; only where somebody watches."""
    return corpus.count() if progress and sys.stderr.isatty() else None
