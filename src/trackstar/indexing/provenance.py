"""The manifest of a new index: model, tokenizer, corpus, V, projections and layer blocks, with
their digests.
"""

import dataclasses
from importlib.metadata import version

from trackstar.choices import CodecName
from trackstar.corpus import Corpus
from trackstar.errors import OptionError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import DEFAULT_FLOOR, SecondMoment
from trackstar.indexing.settings import ChosenSettings, IndexSettings
from trackstar.model.configuration import libraries
from trackstar.model.language_model import LanguageModel
from trackstar.store import (
    FORMAT_VERSION,
    CorpusEntry,
    CoverageEntry,
    LayerBlockEntry,
    Manifest,
    MatrixEntry,
    ModelEntry,
    Place,
    ProjectionEntry,
    SecondMomentEntry,
    TokenizerEntry,
    WhiteningEntry,
    WindowsEntry,
    row_bytes,
    tensors_digest,
)
from trackstar.store.locations import IN_MEMORY, Recorded, recorded_corpus, recorded_path

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
    if settings.pack is not None and settings.pack > tokens:
        raise OptionError(
            f"`pack`: expected at most the {tokens} tokens of a window, found {settings.pack}; pass "
            f"`window_tokens={settings.pack}` and as many `batch_tokens`, or pack shorter rows"
            if settings.pack <= model.context_tokens
            else f"`pack`: expected at most the {model.context_tokens} tokens that the model reads, found "
            f"{settings.pack}"
        )
    return WindowsEntry(tokens=tokens, overlap=settings.overlap, truncate=settings.truncate, pack=settings.pack)


def default_shard_examples(blocks: int, side: int, codec: CodecName) -> int:
    """Examples per shard by default: about 64 MiB of codes, from 64 to 4,096 examples."""
    return min(4096, max(64, _SHARD_BYTES // row_bytes(codec, blocks * side**2, blocks)))


def make_manifest(
    model: LanguageModel,
    corpus: Corpus,
    moment: SecondMoment,
    settings: ChosenSettings,
    *,
    out: Place | None = None,
    whitening: WhiteningEntry | None = None,
) -> Manifest:
    """The manifest of a new index: everything that decides its content.

    Args:
        model: The model.
        corpus: The corpus; all of it is read and checked for its digest, see `Corpus.survey`.
        moment: V.
        settings: What the index is asked to be.
        out: The index's folder, which paths are recorded relative to; None if there is none.
        whitening: W_train; None if rows are stored in projected coordinates, or W_train is not
            computed yet.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        trackstar_version=version("trackstar-tda"),
        model=model_entry(model, out),
        tokenizer=TokenizerEntry(digest=model.tokenizer_digest()),
        corpora=(corpus_entry(corpus, out),),
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


def model_entry(model: LanguageModel, out: Place | None) -> ModelEntry:
    """A model's entry in the manifest of the index at `out`; all of its weights are read for their digest."""
    if model.source == IN_MEMORY:
        place = Recorded(source=model.source, location="memory")
    elif model.folder is not None:
        place = recorded_path(model.source, out)
    else:
        place = Recorded(source=model.source, location="hub")
    of_hub = place.location == "hub" and model.adapter is None  # the configuration is else the base model's
    commit = getattr(model.module.config, "_commit_hash", None) if of_hub else None
    return ModelEntry(
        source=place.source,
        location=place.location,
        revision=model.revision if commit is None else commit,
        gguf_file=model.gguf_file,
        libraries=libraries(),
        architecture=model.architecture,
        configuration=model.configuration(),
        digest=model.digest(),
        dtype=model.dtype_name,
        parameters=model.parameters,
        adapter=None if model.adapter is None else model.adapter.configuration,
    )


def _projection_entry(model: LanguageModel, settings: ChosenSettings) -> ProjectionEntry:
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


def corpus_entry(corpus: Corpus, out: Place | None) -> CorpusEntry:
    """A corpus's entry in the manifest of the index at `out`; reads all of the corpus, and checks every name.

    Raises:
        CorpusError: A record cannot be read, or two have the same name; see `Corpus.survey`.
    """
    place = recorded_corpus(corpus.name, out, on_disk=not corpus.in_memory)
    return CorpusEntry(
        source=place.source,
        location=place.location,
        digest=corpus.survey().digest,
        chat_template_text=None if corpus.chat is None else corpus.chat.text,
        **dataclasses.asdict(corpus.reading),
    )
