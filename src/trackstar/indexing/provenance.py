"""The manifest of a new index: model, tokenizer, corpus, V, projections and layer blocks, with
their digests.
"""

from importlib.metadata import version

from trackstar.choices import CodecName
from trackstar.corpus import Corpus
from trackstar.errors import OptionError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import DEFAULT_FLOOR, SecondMoment
from trackstar.indexing.settings import IndexSettings
from trackstar.model.language_model import LanguageModel
from trackstar.store import (
    FORMAT_VERSION,
    CorpusEntry,
    CoverageEntry,
    LayerBlockEntry,
    Manifest,
    MatrixEntry,
    ModelEntry,
    ProjectionEntry,
    SecondMomentEntry,
    TokenizerEntry,
    WhiteningEntry,
    WindowsEntry,
    row_bytes,
    tensors_digest,
)

# Bytes of a shard's codes: large enough to scan well, small enough to be held in memory and lost to
# a kill.
_SHARD_BYTES = 64 << 20


def windows_entry(model: LanguageModel, settings: IndexSettings) -> WindowsEntry:
    """How long documents are split: as the settings ask, or into windows that fit the model and a
    batch.

    Raises:
        OptionError: The model reads fewer tokens than a window is asked to have.
    """
    tokens = settings.window_tokens
    if tokens is None:
        tokens = min(model.context_tokens, settings.batch_tokens)
    if tokens > model.context_tokens:
        raise OptionError(
            f"`window_tokens`: expected at most the {model.context_tokens} tokens that the model reads, found {tokens}"
        )
    return WindowsEntry(tokens=tokens, overlap=settings.overlap)


def default_shard_examples(blocks: int, side: int, codec: CodecName) -> int:
    """Examples per shard by default: about 64 MiB of codes, from 64 to 4,096 examples."""
    return min(4096, max(64, _SHARD_BYTES // row_bytes(codec, blocks * side**2, blocks)))


def make_manifest(
    model: LanguageModel,
    corpus: Corpus,
    moment: SecondMoment,
    settings: IndexSettings,
    *,
    whitening: WhiteningEntry | None = None,
) -> Manifest:
    """The manifest of a new index: everything that decides its content.

    Args:
        model: The model.
        corpus: The corpus; all of it is read for its digest.
        moment: V.
        settings: What the index is asked to be.
        whitening: W_train; None if rows are stored in projected coordinates, or W_train is not
            computed yet.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        trackstar_version=version("trackstar-tda"),
        model=_model_entry(model),
        tokenizer=TokenizerEntry(digest=model.tokenizer_digest()),
        corpora=(corpus_entry(corpus),),
        removed=None,
        windows=windows_entry(model, settings),
        second_moment=second_moment_entry(moment),
        projection=_projection_entry(model, settings),
        layer_blocks=_layer_block_entries(model),
        coverage=_coverage_entry(model),
        output=settings.output,
        coordinates="projected" if whitening is None else "whitened",
        whitening=whitening,
        codec=settings.codec,
        shard_examples=settings.shard_examples
        or default_shard_examples(len(model.blocks), settings.side, settings.codec),
        completion=None,
    )


def _model_entry(model: LanguageModel) -> ModelEntry:
    return ModelEntry(
        source=model.source,
        revision=model.revision,
        gguf_file=model.gguf_file,
        architecture=model.architecture,
        digest=model.digest(),
        dtype=model.dtype_name,
    )


def _projection_entry(model: LanguageModel, settings: IndexSettings) -> ProjectionEntry:
    return ProjectionEntry(
        seed=settings.seed,
        side=settings.side,
        digest=projection_digest(model.matrix_shapes, seed=settings.seed, side=settings.side),
        kind=settings.projection,
    )


def _layer_block_entries(model: LanguageModel) -> tuple[LayerBlockEntry, ...]:
    return tuple(
        LayerBlockEntry(
            name=block.name,
            kind=block.kind,
            layers=(block.first_layer, block.last_layer),
            matrices=tuple(
                MatrixEntry(name=matrix.name, rows=matrix.rows, columns=matrix.columns) for matrix in block.matrices
            ),
        )
        for block in model.blocks
    )


def _coverage_entry(model: LanguageModel) -> CoverageEntry:
    coverage = model.coverage
    return CoverageEntry(
        matrices=coverage.matrices,
        parameters=coverage.parameters,
        total_parameters=coverage.total_parameters,
        left_out=coverage.left_out,
    )


def second_moment_entry(moment: SecondMoment) -> SecondMomentEntry:
    """V's entry in a manifest."""
    return SecondMomentEntry(
        kind=moment.kind,
        source=moment.source,
        digest=None if moment.kind == "none" else tensors_digest(moment.tensors()),
        floor=moment.floor if moment.kind != "none" else DEFAULT_FLOOR,
    )


def corpus_entry(corpus: Corpus) -> CorpusEntry:
    """A corpus's entry in a manifest; reads all of the corpus for its digest."""
    return CorpusEntry(
        source=corpus.name,
        digest=corpus.digest(),
        text_field=corpus.text_field,
        id_field=corpus.id_field,
        limit=corpus.limit,
    )
