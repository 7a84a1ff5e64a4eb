"""The entries of a manifest, one dataclass per JSON object; their fields are the fields in manifest.json.

A descriptive attribute tells people where something came from. The digest beside it decides whether
two things are the same, so a model or corpus that has moved is still the same model or corpus.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from trackstar.choices import Join, Parameters, ProjectionKind, RecordFormat, SecondMomentKind, TrainOn
from trackstar.corpus.reading import Reading

Location = Literal["absolute", "relative", "hub", "url", "memory", "typed"]
"""What a `source` is: an absolute path, a path relative to the index's folder, a name on the hub, a
URL, nothing that can be opened, or, in an index that was converted from format version 3, whatever
its user typed."""

DESCRIPTIVE_FIELDS = frozenset(
    {
        "model.source",
        "model.location",
        "model.revision",
        "model.gguf_file",
        "model.libraries",
        "corpora.source",
        "corpora.location",
        "corpora.chat_template_text",
        "second_moment.source",
        "whitening.source",
    }
)

ADDED_FIELDS: Mapping[int, Mapping[str, Mapping[str, Any]]] = {
    4: {"model": {"location": None, "configuration": None, "libraries": None}, "corpora": {"location": None}},
    5: {
        "model": {"parameters": None, "adapter": None},
        "corpora": {
            "format": "text",
            "train_on": "all",
            "join": "auto",
            "chat_template": None,
            "metadata": [],
            "chat_template_text": None,
        },
        "windows": {"truncate": False, "pack": None},
    },
    6: {"whitening": {"rank": None}},
}
"""By format version and entry, the fields that it added, and what they are in an older manifest."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """The model whose gradients the index holds.

    Attributes:
        source: Folder or hub name that it was loaded from (descriptive).
        location: What `source` is (descriptive); None in an index of format version 3, which has
            the path as the user typed it.
        revision: Revision on the hub (descriptive).
        gguf_file: GGUF file within the source, if any (descriptive).
        libraries: Libraries that computed with it, and their versions (descriptive); None in format
            version 3.
        architecture: Name of the model's class, such as `LlamaForCausalLM`.
        configuration: The fields of its configuration that decide its function, as JSON texts by
            name; None in format version 3.
        digest: Digest of the weights, with those of an adapter.
        dtype: Number format in which gradients were computed.
        parameters: Whether gradients are the merged network's or the adapter's; None for a model
            without adapter.
        adapter: The fields of the adapter's configuration that decide its function, as JSON texts by
            name; None for a model without adapter.
    """

    source: str
    location: Location | None
    revision: str | None
    gguf_file: str | None
    libraries: str | None
    architecture: str
    configuration: Mapping[str, str] | None
    digest: str
    dtype: str
    parameters: Parameters | None
    adapter: Mapping[str, str] | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer, as the digest of its whole definition."""

    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEntry:
    """A corpus and how its records are read.

    Attributes:
        source: Where the corpus is (descriptive).
        location: What `source` is (descriptive); None in an index of format version 3, which has
            the path as the user typed it.
        digest: Digest of its content and of how it is read.
        text_field: Field that holds a record's text, messages or token ids.
        id_field: Field that holds a record's name; None if names are made from record numbers.
        limit: Largest number of records that are read; None for all.
        format: Form of the records.
        train_on: Which tokens are targets.
        join: What is put between a prompt and its completion.
        chat_template: Digest of the chat template and the special tokens that rendered
            conversations; None if none did.
        metadata: Fields that are kept as metadata; None for every field that is not read otherwise.
        first_record: Number of its first record among the records of all corpora of the index.
        chat_template_text: The template's text, for queries (descriptive, as `chat_template` is its
            digest); None if there is no template, or conversations with tools have one of their own.
    """

    source: str
    location: Location | None
    digest: str
    text_field: str
    id_field: str | None
    limit: int | None
    format: RecordFormat = "text"
    train_on: TrainOn = "all"
    join: Join = "auto"
    chat_template: str | None = None
    metadata: tuple[str, ...] | None = ()
    first_record: int = 0
    chat_template_text: str | None = None

    @property
    def reading(self) -> Reading:
        """How the records are read."""
        names = [field.name for field in dataclasses.fields(Reading)]
        return Reading(**{name: getattr(self, name) for name in names})

    @property
    def options(self) -> dict[str, Any]:
        """The options of `open_corpus` that read the records in this way, but for the chat template."""
        options = dataclasses.asdict(self.reading)
        del options["chat_template"]
        return options | {"metadata": "all" if self.metadata is None else self.metadata or "none"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WindowsEntry:
    """How documents become examples.

    Attributes:
        tokens: Most tokens of a window.
        overlap: Tokens that a window repeats from the previous one.
        truncate: Whether a longer document is cut, and not split into windows.
        pack: Tokens of a row that documents are packed into; None if they are not packed.
    """

    tokens: int
    overlap: int
    truncate: bool = False
    pack: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecondMomentEntry:
    """V.

    Attributes:
        kind: `none`, `factored` (rows and columns) or `elementwise`.
        source: Where V came from: an optimizer's file, or an estimate and its sample (descriptive).
        digest: `tensors_digest` of the tensors in second_moment.safetensors; None if V is not
            stored.
        floor: Least value of V that a gradient is divided by, as a fraction of V's mean.
    """

    kind: Literal["none", SecondMomentKind]
    source: str
    digest: str | None
    floor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WhiteningEntry:
    """W_train, which turns φ into the coordinates u = W_train φ of a whitened index.

    Attributes:
        source: The examples that R_train is the mean of (descriptive).
        damping: Ridge added to R_train, as a fraction of R_train's mean eigenvalue per block.
        digest: `tensors_digest` of the tensors in whitening.safetensors.
        rank: Number of directions per layer block if W_train is stored in low-rank form, as it is if
            R_train is the mean of few examples; None for square matrices.
    """

    source: str
    damping: float
    digest: str
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionEntry:
    """P, the random projection.

    Attributes:
        seed: Seed of the random numbers.
        side: √d: rows and columns of a layer block of φ.
        digest: Digest of the random numbers, so that another generator is noticed.
        kind: `two-sided` (Eq. 4), or `one-sided`: one dense matrix for flattened gradients, for
            comparisons.
    """

    seed: int
    side: int
    digest: str
    kind: ProjectionKind = "two-sided"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MatrixEntry:
    """A weight matrix that the gradient covers; it maps `columns` inputs to `rows` outputs."""

    name: str
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlockEntry:
    """A layer block: side² consecutive dimensions of every projected gradient.

    Attributes:
        name: Name of the block.
        kind: Attention or MLP.
        layers: First and last layer.
        matrices: Weight matrices that are pooled in the block.
    """

    name: str
    kind: Literal["attention", "mlp"]
    layers: tuple[int, int]
    matrices: tuple[MatrixEntry, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CoverageEntry:
    """The part of the model that the gradient covers.

    Attributes:
        matrices: Number of weight matrices covered.
        parameters: Number of parameters in these matrices.
        total_parameters: Number of parameters of the model.
        left_out: Names, or patterns of names, of the parameters that are not covered.
    """

    matrices: int
    parameters: int
    total_parameters: int
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A finished shard: its file's name under shards/, its number of examples and its digest."""

    file: str
    rows: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionEntry:
    """Content of a finished index.

    Attributes:
        rows: Number of examples.
        tokens: Number of tokens of all examples.
        targets: Number of target tokens, whose cross-entropy is summed in the loss.
        records: Number of records that were read from the corpora.
        skipped: Number of these records without a target token.
        shards: The shards in order.
        autocorrelation_digest: `tensors_digest` of the tensors in autocorrelation.safetensors; None
            for whitened coordinates, whose W_train already contains R_train.
    """

    rows: int
    tokens: int
    targets: int
    records: int
    skipped: int
    shards: tuple[ShardEntry, ...]
    autocorrelation_digest: str | None
