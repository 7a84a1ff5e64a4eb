"""The manifest of an index: what everything in it was made with, and once it is finished, what was made.

`manifest.json` is canonical: equal manifests are equal bytes, and any byte changed by hand or by accident is noticed.
Nothing in it depends on when or where it was written, so that two runs give the same bytes.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from trackstar.choices import CodecName, Coordinates, ProjectionKind
from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store.files.durable import file_size, read_bytes
from trackstar.store.files.places import Place, as_folder
from trackstar.store.strict_json import FieldError, parse_object, read_strictly
from trackstar.text import abridged, cut

FORMAT_VERSION = 3
DIGEST_FIELD = "digest"
LARGEST_MANIFEST = 256 * 2**20

# Where something came from, said for people to read. The digest beside each is what decides whether it is the same, so
# that a model or corpus that has been moved is still the same model or corpus.
DESCRIPTIVE_FIELDS = frozenset(
    {"model.source", "model.revision", "model.gguf_file", "corpora.source", "second_moment.source", "whitening.source"}
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """The model whose gradients the index holds.

    Attributes:
        source: The folder or hub name that it was loaded from (descriptive).
        revision: The hub revision asked for (descriptive).
        gguf_file: The GGUF file within the source, if any (descriptive).
        architecture: Its class, such as `LlamaForCausalLM`.
        digest: Digest of its weights.
        dtype: The number format in which gradients were computed.
    """

    source: str
    revision: str | None
    gguf_file: str | None
    architecture: str
    digest: str
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer: a digest of all that it depends on."""

    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEntry:
    """The corpus and how its records are read.

    Attributes:
        source: What the user named (descriptive).
        digest: Digest of its content.
        text_field: The field that holds a record's text.
        id_field: The field that holds a record's name; None where names are made from record numbers.
        limit: The most records that are read; None for all.
        first_record: The number of its first record among those of all corpora of the index.
    """

    source: str
    digest: str
    text_field: str
    id_field: str | None
    limit: int | None
    first_record: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WindowsEntry:
    """How long documents are split: `tokens` a window, the later window repeating `overlap` of the one before."""

    tokens: int
    overlap: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecondMomentEntry:
    """V.

    Attributes:
        kind: `none`, `factored` (rows and columns) or `elementwise`.
        source: Where it came from: an optimizer's file, or an estimate and its sample (descriptive).
        digest: `tensors_digest` of what is in second_moment.safetensors; None where V is not kept.
        floor: The smallest value of V, as a share of its mean, that a gradient is divided by.
    """

    kind: Literal["none", "factored", "elementwise"]
    source: str
    digest: str | None
    floor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WhiteningEntry:
    """W_train, by which the coordinates of a whitened store are u = W_train φ.

    Attributes:
        source: Which examples R_train is the mean of (descriptive).
        damping: The fraction of each block's mean eigenvalue that was added to R_train.
        digest: `tensors_digest` of what is in whitening.safetensors.
    """

    source: str
    damping: float
    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionEntry:
    """P: its seed, the side of a layer block's square, and a digest that pins the random numbers themselves.

    `kind` is `two-sided` (Eq. 4), or the dense projection of flattened gradients that it is compared with.
    """

    seed: int
    side: int
    digest: str
    kind: ProjectionKind = "two-sided"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MatrixEntry:
    """One weight matrix that entered the gradient; it maps `columns` inputs to `rows` outputs."""

    name: str
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlockEntry:
    """One layer block: side×side consecutive dimensions of every projected gradient, in the order of the list.

    Attributes:
        name: The block's name.
        kind: Attention or MLP.
        layers: Its first and last layer.
        matrices: The matrices pooled in it.
    """

    name: str
    kind: Literal["attention", "mlp"]
    layers: tuple[int, int]
    matrices: tuple[MatrixEntry, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CoverageEntry:
    """How much of the model the gradient covers.

    Attributes:
        matrices: Number of weight matrices.
        parameters: Number of parameters in them.
        total_parameters: Number of parameters in the model.
        left_out: Names, or patterns of names, of the parameters that are not covered.
    """

    matrices: int
    parameters: int
    total_parameters: int
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One finished shard file: its name under shards/, its number of examples, its digest."""

    file: str
    rows: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionEntry:
    """What a finished index holds.

    Attributes:
        rows: Number of examples.
        tokens: Number of tokens read by the model, over all examples.
        targets: Number of tokens whose cross-entropy counts.
        records: Number of the corpus's records that were read.
        skipped: Number of those without a scorable token.
        shards: The shard files in order.
        autocorrelation_digest: `tensors_digest` of what is in autocorrelation.safetensors; None for whitened
            coordinates, where R_train is in the whitening.
    """

    rows: int
    tokens: int
    targets: int
    records: int
    skipped: int
    shards: tuple[ShardEntry, ...]
    autocorrelation_digest: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that an index was made with; `completion` is None until it is finished.

    Attributes:
        format_version: The version of the folder's format, `FORMAT_VERSION`.
        trackstar_version: The version of trackstar that began the index.
        model: The model.
        tokenizer: The tokenizer.
        corpora: The corpora, one after the other; several where indexes were merged.
        removed: Digest of the names of the examples that were taken out; None where none were.
        windows: How long documents are split.
        second_moment: V.
        projection: P.
        layer_blocks: The blocks of a projected gradient, in the order in which they lie in a row.
        coverage: How much of the model the gradient covers.
        output: What is differentiated.
        coordinates: What a row holds: φ itself, or u = W_train φ.
        whitening: W_train; None for projected coordinates.
        codec: The number format of the codes.
        shard_examples: The number of examples in every shard but the last.
        completion: What the finished index holds.
    """

    format_version: int
    trackstar_version: str
    model: ModelEntry
    tokenizer: TokenizerEntry
    corpora: tuple[CorpusEntry, ...]
    removed: str | None
    windows: WindowsEntry
    second_moment: SecondMomentEntry
    projection: ProjectionEntry
    layer_blocks: tuple[LayerBlockEntry, ...]
    coverage: CoverageEntry
    output: Literal["loss", "margin", "logit"]
    coordinates: Coordinates
    whitening: WhiteningEntry | None
    codec: CodecName
    shard_examples: int
    completion: CompletionEntry | None

    @property
    def dimensions(self) -> int:
        """Number of dimensions of a projected gradient: side² a layer block."""
        return self.projection.side**2 * len(self.layer_blocks)

    def check(self) -> None:
        """Check what types alone do not say.

        Raises:
            FieldError: A value cannot be that of an index; the message names the field, what was found and what was
                expected.
        """
        _check_values(self)

    def to_json(self) -> str:
        """The canonical text of manifest.json, with the digest of itself as the last field."""
        fields = dataclasses.asdict(self)
        return _layout(fields | {DIGEST_FIELD: _digest(_layout(fields))})

    @classmethod
    def from_json(cls, text: str, *, file: str = "manifest.json") -> "Manifest":
        """The manifest that `to_json` wrote as `text`.

        Raises:
            DamagedIndexError: It is not such a text; the message names `file` and the field, what was found and what
                was expected.
        """
        try:
            fields = read_strictly(text)
            _check_version(fields)
            digest = fields.pop(DIGEST_FIELD, None)
            manifest = parse_object(cls, fields)
            manifest.check()
        except FieldError as error:
            raise DamagedIndexError(
                f"{file}: {error}; restore the file from a copy, or make the index again in an empty folder"
            ) from error
        if manifest.to_json() != text:
            expected = _digest(_layout(dataclasses.asdict(manifest)))
            raise DamagedIndexError(
                f"{file}: the text was changed after it was written (its digest is {abridged(digest)}, "
                f"its content's {expected!r}); restore the file from a copy, or make the index again"
            )
        return manifest

    def identity_digest(self) -> str:
        """BLAKE2b-256, in hexadecimal, of all that decides the index's content.

        Left out are `completion` and the descriptive fields. Every shard carries it.
        """
        identity = {name: value for name, value in _leaves(self) if not _descriptive(name)}
        return _digest(json.dumps(identity, separators=(",", ":")))


def load_manifest(path: str | Place) -> Manifest | None:
    """The manifest of the index at `path`, finished or not; None where there is none.

    Raises:
        DamagedIndexError: There is one, and it is not as it was written.
        StoreError: There is one, and it cannot be read.
    """
    file = as_folder(path) / "manifest.json"
    try:
        size = file_size(file)
        if size > LARGEST_MANIFEST:
            raise DamagedIndexError(
                f"{file}: {size} bytes, expected a manifest of at most {LARGEST_MANIFEST}; restore the file from a copy"
            )
        content = read_bytes(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror}); make it a file that can be read") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedIndexError(
            f"{file}: byte {error.start} is not UTF-8, expected JSON; restore the file from a copy"
        ) from error
    return Manifest.from_json(text, file=str(file))


def differences(found: Manifest, expected: Manifest) -> list[tuple[str, object, object]]:
    """Where two manifests would not make the same index, as (field, found, expected).

    Fields are named like `layer_blocks[3].matrices[0].rows`; `completion` and the descriptive fields do not count.
    A field that only one side has is None on the other.
    """
    found_leaves, expected_leaves = dict(_leaves(found)), dict(_leaves(expected))
    names = list(expected_leaves) + [name for name in found_leaves if name not in expected_leaves]
    return [
        (name, found_leaves.get(name), expected_leaves.get(name))
        for name in names
        if not _descriptive(name) and found_leaves.get(name) != expected_leaves.get(name)
    ]


def _descriptive(name: str) -> bool:
    return re.sub(r"\[[0-9]+\]", "", name) in DESCRIPTIVE_FIELDS


def _leaves(manifest: Manifest) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(manifest):
        if field.name != "completion":
            yield from _leaves_of(field.name, getattr(manifest, field.name))


def _leaves_of(name: str, value: object) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves_of(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple):
        yield f"{name}.length", len(value)
        for index, item in enumerate(value):
            yield from _leaves_of(f"{name}[{index}]", item)
    else:
        yield name, value


def _layout(fields: Mapping[str, object]) -> str:
    return json.dumps(fields, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()


def shard_file_name(number: int) -> str:
    """The name under shards/ of shard `number`, counted from 0."""
    return f"{number:06d}.safetensors"


def _check_version(fields: dict[str, object]) -> None:
    version = fields.get("format_version")
    if type(version) is int and 0 < version < FORMAT_VERSION:
        raise FieldError(
            "format_version",
            version,
            f"{FORMAT_VERSION}: the index was made by an older trackstar in another format, index again",
        )
    if type(version) is int and version > FORMAT_VERSION:
        raise FieldError(
            "format_version",
            version,
            f"at most {FORMAT_VERSION}: the index was made by a newer trackstar "
            f"({_shown(fields.get('trackstar_version'))}), "
            "install that version",
        )


def _shown(value: object) -> str:
    return cut(value) if isinstance(value, str) else abridged(value)


def _check_values(manifest: Manifest) -> None:
    _expect("format_version", manifest.format_version, manifest.format_version == FORMAT_VERSION, str(FORMAT_VERSION))
    _expect("shard_examples", manifest.shard_examples, manifest.shard_examples >= 1, "at least 1")
    _expect("projection.side", manifest.projection.side, manifest.projection.side >= 1, "at least 1")
    whole_bytes = manifest.projection.side % 8 == 0 or manifest.codec in ("float32", "bfloat16", "float16")
    _expect("projection.side", manifest.projection.side, whole_bytes, f"a multiple of 8 for {manifest.codec}")
    seed = manifest.projection.seed
    _expect("projection.seed", seed, 0 <= seed < 2**64, "at least 0 and below 2^64")
    _expect("layer_blocks", manifest.layer_blocks, len(manifest.layer_blocks) >= 1, "at least one layer block")
    floor = manifest.second_moment.floor
    _expect("second_moment.floor", floor, math.isfinite(floor) and floor >= 0, "a finite number, at least 0")
    _expect("codec", manifest.codec, manifest.codec in get_args(CodecName), f"one of {', '.join(get_args(CodecName))}")
    whitened = manifest.coordinates == "whitened"
    _expect("whitening", manifest.whitening, (manifest.whitening is not None) == whitened, _WHITENING[whitened])
    _expect("corpora", manifest.corpora, len(manifest.corpora) >= 1, "at least one corpus")
    starts = [corpus.first_record for corpus in manifest.corpora]
    _expect("corpora.first_record", starts, starts[0] == 0 and starts == sorted(starts), "numbers that rise from 0")
    _expect("windows.tokens", manifest.windows.tokens, manifest.windows.tokens >= 2, "at least 2")
    completion = manifest.completion
    if completion is None:
        return
    for number, shard in enumerate(completion.shards):
        field = f"completion.shards[{number}]"
        # Also what keeps a manifest from naming a file outside of the index.
        _expect(f"{field}.file", shard.file, shard.file == shard_file_name(number), shard_file_name(number))
        last = number == len(completion.shards) - 1
        full = manifest.shard_examples
        fits = 1 <= shard.rows <= full if last else shard.rows == full
        _expect(f"{field}.rows", shard.rows, fits, f"1 to {full}" if last else str(full))
    has_autocorrelation = completion.autocorrelation_digest is not None
    _expect(
        "completion.autocorrelation_digest",
        completion.autocorrelation_digest,
        has_autocorrelation != whitened,
        "null" if whitened else "a digest",
    )
    rows = sum(shard.rows for shard in completion.shards)
    _expect("completion.rows", completion.rows, completion.rows == rows, f"{rows}, the sum over its shards")
    for name in ("tokens", "targets", "records", "skipped"):
        value = getattr(completion, name)
        _expect(f"completion.{name}", value, value >= 0, "at least 0")


_WHITENING = {True: "the whitening of whitened coordinates", False: "null for projected coordinates"}


def _expect(field: str, found: object, holds: bool, expected: str) -> None:
    if not holds:
        raise FieldError(field, found, expected)
