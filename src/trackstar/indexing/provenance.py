"""What an index was made with: written into its manifest, and checked when the index is asked."""

from importlib.metadata import version

from trackstar.choices import CodecName, Output, ProjectionKind
from trackstar.corpus import Corpus
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import DEFAULT_FLOOR, SecondMoment
from trackstar.model.language_model import LanguageModel, dtype_name, matrix_shapes
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
    tensors_digest,
)


def make_manifest(
    model: LanguageModel,
    corpus: Corpus,
    windows: WindowsEntry,
    moment: SecondMoment,
    *,
    seed: int,
    side: int,
    codec: CodecName,
    shard_examples: int,
    whitening: WhiteningEntry | None = None,
    output: Output = "loss",
    projection: ProjectionKind = "two-sided",
) -> Manifest:
    """The manifest of an index that is about to be made: all that decides its content."""
    covered = model.coverage
    return Manifest(
        format_version=FORMAT_VERSION,
        trackstar_version=version("trackstar-tda"),
        model=ModelEntry(
            source=model.source,
            revision=model.revision,
            gguf_file=model.gguf_file,
            architecture=model.architecture,
            digest=model.digest(),
            dtype=dtype_name(model),
        ),
        tokenizer=TokenizerEntry(digest=model.tokenizer_digest()),
        corpora=(corpus_entry(corpus),),
        removed=None,
        windows=windows,
        second_moment=second_moment_entry(moment),
        projection=ProjectionEntry(
            seed=seed,
            side=side,
            digest=projection_digest(matrix_shapes(model), seed=seed, side=side),
            kind=projection,
        ),
        layer_blocks=tuple(
            LayerBlockEntry(
                name=block.name,
                kind=block.kind,
                layers=(block.first_layer, block.last_layer),
                matrices=tuple(
                    MatrixEntry(name=matrix.name, rows=matrix.rows, columns=matrix.columns) for matrix in block.matrices
                ),
            )
            for block in model.blocks
        ),
        coverage=CoverageEntry(
            matrices=covered.matrices,
            parameters=covered.parameters,
            total_parameters=covered.total_parameters,
            left_out=covered.left_out,
        ),
        output=output,
        coordinates="projected" if whitening is None else "whitened",
        whitening=whitening,
        codec=codec,
        shard_examples=shard_examples,
        completion=None,
    )


def second_moment_entry(moment: SecondMoment) -> SecondMomentEntry:
    """What a manifest says of V."""
    return SecondMomentEntry(
        kind=moment.kind,
        source=moment.source,
        digest=None if moment.kind == "none" else tensors_digest(moment.tensors()),
        floor=moment.floor if moment.kind != "none" else DEFAULT_FLOOR,
    )


def corpus_entry(corpus: Corpus) -> CorpusEntry:
    """What a manifest says of a corpus; reads all of it for its digest."""
    return CorpusEntry(
        source=corpus.name,
        digest=corpus.digest(),
        text_field=corpus.text_field,
        id_field=corpus.id_field,
        limit=corpus.limit,
    )
