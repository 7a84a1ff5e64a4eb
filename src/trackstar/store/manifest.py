"""The manifest of an index: the settings that it was built with and, once it is finished, its content.

`manifest.json` is canonical: equal manifests have equal bytes, and a digest reveals any change made
by hand or by accident. The manifest contains no time and no path of the index, so two runs write
the same bytes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trackstar.choices import CODECS, LOW_BIT_CODECS, CodecName, Coordinates, Output
from trackstar.corpus import Query, in_template
from trackstar.corpus.digests import digest_of_bytes, digest_of_json
from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store.files.durable import file_size, read_bytes
from trackstar.store.files.places import Place, as_folder
from trackstar.store.manifest_entries import (
    ADDED_FIELDS,
    DESCRIPTIVE_FIELDS,
    CompletionEntry,
    CorpusEntry,
    CoverageEntry,
    LayerBlockEntry,
    ModelEntry,
    ProjectionEntry,
    SecondMomentEntry,
    TokenizerEntry,
    WhiteningEntry,
    WindowsEntry,
)
from trackstar.store.strict_json import FieldError, parse_object, read_strictly
from trackstar.text import Words, abridged, cut

FORMAT_VERSION = 6
OLDEST_FORMAT_VERSION = 3
"""The oldest version that is read; its indexes are never extended, only copied into the current one."""
DIGEST_FIELD = "digest"
LARGEST_MANIFEST = 256 * 2**20
_CONFIGURATIONS = ("model.configuration", "model.adapter")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The settings of an index, and its content once it is finished.

    Attributes:
        format_version: Version of the index's format: `FORMAT_VERSION`, or an older one that is read.
        trackstar_version: Version of trackstar that began the index.
        model: The model.
        tokenizer: The tokenizer.
        corpora: The corpora, one after the other; more than one if indexes were merged or extended.
        removed: Digest of the names of the examples that were removed; None if none were.
        windows: How long documents are split.
        second_moment: V.
        projection: P.
        layer_blocks: The blocks of a projected gradient, in the order of a row's dimensions.
        coverage: The part of the model that the gradient covers.
        output: The function that is differentiated.
        coordinates: The content of a row: φ, or u = W_train φ.
        whitening: W_train; None for projected coordinates.
        codec: How rows are stored.
        shard_examples: Number of examples in every shard but the last.
        completion: The content of a finished index; None until the index is finished.
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
    output: Output
    coordinates: Coordinates
    whitening: WhiteningEntry | None
    codec: CodecName
    shard_examples: int
    completion: CompletionEntry | None

    @property
    def dimensions(self) -> int:
        """Number of dimensions of a projected gradient: side² per layer block."""
        return self.projection.side**2 * len(self.layer_blocks)

    @property
    def chat_template(self) -> str | None:
        """The text of the template that rendered the conversations of the first corpus that has any."""
        return next((entry.chat_template_text for entry in self.corpora if entry.chat_template is not None), None)

    @property
    def instructions_in_template(self) -> bool:
        """Whether a corpus's instructions were rendered as conversations."""
        return any(entry.format == "instruction" and entry.chat_template is not None for entry in self.corpora)

    def in_template(self, queries: Sequence[Query]) -> list[Query]:
        """The queries in the chat template of the index's conversations; see `corpus.in_template`."""
        return in_template(queries, self.chat_template, instructions=self.instructions_in_template)

    def check(self) -> None:
        """Check what the fields' types do not guarantee.

        Raises:
            FieldError: A value is impossible for an index; the message names the field and the
                expected value.
        """
        _check_settings(self)
        if self.completion is not None:
            _check_completion(self, self.completion)

    def to_json(self) -> str:
        """The canonical text of manifest.json; the last field is the digest of the text without it."""
        fields = manifest_fields(self)
        return _layout(fields | {DIGEST_FIELD: _digest(_layout(fields))})

    @classmethod
    def from_json(cls, text: str, *, file: str = "manifest.json") -> "Manifest":
        """Parse a text that `to_json` wrote.

        Args:
            text: The text.
            file: The file's name for error messages.

        Raises:
            DamagedIndexError: `to_json` cannot have written the text; the message names the file
                and the field.
        """
        try:
            fields = read_strictly(text)
            _check_version(fields)
            digest = fields.pop(DIGEST_FIELD, None)
            manifest = parse_object(cls, with_absent_fields(fields))
            manifest.check()
        except FieldError as error:
            raise DamagedIndexError(
                f"{file}: {error}; restore the file from a copy, or build the index again in an empty folder"
            ) from error
        if manifest.to_json() != text:
            expected = _digest(_layout(manifest_fields(manifest)))
            raise DamagedIndexError(
                f"{file}: the text was changed after it was written (its digest is {abridged(digest)}, "
                f"its content's {expected!r}); restore the file from a copy, or build the index again in an "
                "empty folder"
            )
        return manifest

    def identity_digest(self) -> str:
        """Digest, of 256 bits, of every field that decides the index's content; each shard carries it.

        `completion` and the descriptive fields are left out.
        """
        identity = {
            name: value for name, value in _leaves(self) if not _is_descriptive(name) and not _is_absent(self, name)
        }
        return digest_of_json(identity, compact=True, bits=256)


def manifest_fields(manifest: Manifest) -> dict[str, Any]:
    """The fields of a manifest as JSON values, without those that its format version lacks."""
    fields = dataclasses.asdict(manifest)
    for entry in _old_entries(fields):
        for name in entry.added:
            del entry.fields[name]
    return fields


def with_absent_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The values that `manifest_fields` returned, with values for fields that their version lacks.

    Raises:
        FieldError: Such a field is there.
    """
    for entry in _old_entries(fields):
        unknown = next((name for name in entry.added if name in entry.fields), None)
        if unknown is not None:
            version = fields["format_version"]
            raise FieldError(unknown, Words("unknown"), f"no field of this name in format version {version}")
        entry.fields.update(entry.added)
    return fields


class _OldEntry(NamedTuple):
    """An entry of a manifest of an old format version, and the fields that were added to it since."""

    fields: dict[str, Any]
    added: Mapping[str, Any]


def _added_since(version: object) -> dict[str, dict[str, Any]]:
    """By entry, the fields that a format version lacks."""
    added: dict[str, dict[str, Any]] = {}
    if type(version) is int and version >= OLDEST_FORMAT_VERSION:
        for newer, entries in ADDED_FIELDS.items():
            for name, fields in entries.items() if version < newer else ():
                added.setdefault(name, {}).update(fields)
    return added


def _old_entries(fields: dict[str, Any]) -> list[_OldEntry]:
    """The entries that lack fields, by the manifest's own format version; damaged ones are left out."""
    entries = []
    for name, added in _added_since(fields.get("format_version")).items():
        value = fields.get(name)
        items = value if isinstance(value, (list, tuple)) else [value]
        entries += [_OldEntry(item, added) for item in items if isinstance(item, dict)]
    return entries


def load_manifest(path: str | Place) -> Manifest | None:
    """The manifest of the index at `path`, finished or not; None if there is no manifest.

    Raises:
        DamagedIndexError: The manifest is damaged.
        StoreError: The manifest cannot be read.
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
        raise StoreError(f"{file}: cannot be read ({error.strerror}); make it a readable file") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedIndexError(
            f"{file}: byte {error.start} is not UTF-8, expected JSON; restore the file from a copy"
        ) from error
    return Manifest.from_json(text, file=str(file))


def stores_autocorrelation(rows: int, side: int) -> bool:
    """Whether an index in projected coordinates stores R_train.

    With fewer examples than a third of a block's dimensions, their rows are a smaller form of R_train, and
    nothing else is stored.

    Args:
        rows: Number of examples.
        side: √d; a block has side² dimensions.
    """
    return 3 * rows >= side**2


def shard_file_name(number: int) -> str:
    """Name under shards/ of the file of shard `number`, counted from 0."""
    return f"{number:06d}.safetensors"


def differences(found: Manifest, expected: Manifest) -> list[tuple[str, object, object]]:
    """The fields in which two manifests describe different indexes, as (field, found, expected).

    Fields are named like `layer_blocks[3].matrices[0].rows`. `completion` and the descriptive
    fields are left out. A field that only one of the manifests has is None in the other. A field of
    the model's configuration must be in both: another version of Transformers may know more fields.
    """
    found_leaves, expected_leaves = dict(_leaves(found)), dict(_leaves(expected))
    names = list(expected_leaves) + [name for name in found_leaves if name not in expected_leaves]
    return [
        (name, found_leaves.get(name), expected_leaves.get(name))
        for name in names
        if not _is_descriptive(name)
        and found_leaves.get(name) != expected_leaves.get(name)
        and not (_is_configuration(name) and (name not in found_leaves or name not in expected_leaves))
    ]


def different_configuration(found: Mapping[str, str] | None, expected: Mapping[str, str] | None) -> list[str]:
    """Names of the fields that two configurations of a model have in common with different values."""
    found, expected = found or {}, expected or {}
    return [name for name in expected if name in found and found[name] != expected[name]]


def _is_configuration(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in _CONFIGURATIONS)


def _is_absent(manifest: Manifest, name: str) -> bool:
    """Whether a field does not exist in the manifest's format version."""
    entry, _, field = re.sub(r"\[[0-9]+\]", "", name).partition(".")
    return field.split(".")[0] in _added_since(manifest.format_version).get(entry, {})


def _is_descriptive(name: str) -> bool:
    return re.sub(r"\[[0-9]+\]", "", name) in DESCRIPTIVE_FIELDS


def _leaves(manifest: Manifest) -> Iterator[tuple[str, object]]:
    """Name and value of every leaf but those of `completion`."""
    for field in dataclasses.fields(manifest):
        if field.name != "completion":
            yield from _leaves_of(field.name, getattr(manifest, field.name))


def _leaves_of(name: str, value: object) -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves_of(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{name}.{key}", item
    elif isinstance(value, tuple):
        yield f"{name}.length", len(value)
        for index, item in enumerate(value):
            yield from _leaves_of(f"{name}[{index}]", item)
    else:
        yield name, value


def _layout(fields: Mapping[str, object]) -> str:
    return json.dumps(fields, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _digest(text: str) -> str:
    return digest_of_bytes(text.encode("ascii"), bits=256)


def _check_version(fields: dict[str, object]) -> None:
    version = fields.get("format_version")
    if type(version) is int and 0 < version < OLDEST_FORMAT_VERSION:
        raise FieldError(
            "format_version",
            version,
            f"{OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}: an older trackstar built the index in another format; "
            "build it again",
        )
    if type(version) is int and version > FORMAT_VERSION:
        built_by = fields.get("trackstar_version")
        shown = cut(built_by) if isinstance(built_by, str) else abridged(built_by)
        raise FieldError(
            "format_version",
            version,
            f"at most {FORMAT_VERSION}: a newer trackstar ({shown}) built the index, install that version",
        )


def _check_settings(manifest: Manifest) -> None:
    version = manifest.format_version
    known = OLDEST_FORMAT_VERSION <= version <= FORMAT_VERSION
    _expect("format_version", version, known, f"{OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}")
    _check_model(manifest)
    _expect("shard_examples", manifest.shard_examples, manifest.shard_examples >= 1, "at least 1")
    side, seed = manifest.projection.side, manifest.projection.seed
    _expect("projection.side", side, side >= 1, "at least 1")
    fills_bytes = side % 8 == 0 or manifest.codec not in LOW_BIT_CODECS
    _expect("projection.side", side, fills_bytes, f"a multiple of 8 for {manifest.codec}")
    _expect("projection.seed", seed, 0 <= seed < 2**64, "at least 0 and below 2^64")
    _expect("layer_blocks", manifest.layer_blocks, len(manifest.layer_blocks) >= 1, "at least one layer block")
    floor = manifest.second_moment.floor
    _expect("second_moment.floor", floor, math.isfinite(floor) and floor >= 0, "a finite number, at least 0")
    _expect("codec", manifest.codec, manifest.codec in CODECS, f"one of {', '.join(CODECS)}")
    if manifest.coordinates == "whitened":
        _expect("whitening", None, manifest.whitening is not None, "the whitening of whitened coordinates")
        rank = None if manifest.whitening is None else manifest.whitening.rank
        fits = rank is None or 0 <= rank <= side**2
        _expect("whitening.rank", rank, fits, f"null, or 0 to {side**2}, the dimensions of a block")
    else:
        _expect("whitening", manifest.whitening, manifest.whitening is None, "null for projected coordinates")
    _expect("corpora", manifest.corpora, len(manifest.corpora) >= 1, "at least one corpus")
    starts = [corpus.first_record for corpus in manifest.corpora]
    _expect("corpora.first_record", starts, starts[0] == 0 and starts == sorted(starts), "numbers that rise from 0")
    _expect("windows.tokens", manifest.windows.tokens, manifest.windows.tokens >= 2, "at least 2")
    pack = manifest.windows.pack
    fits = pack is None or 2 <= pack <= manifest.windows.tokens
    _expect("windows.pack", pack, fits, f"null, or 2 to {manifest.windows.tokens}, the tokens of a window")


def _check_model(manifest: Manifest) -> None:
    """Check the fields that format version 4 has added."""
    if manifest.format_version == OLDEST_FORMAT_VERSION:
        return
    model = manifest.model
    _expect("model.configuration", None, model.configuration is not None, "a JSON object of strings")
    _expect("model.libraries", None, model.libraries is not None, "a string")
    for field, location in [("model", model.location), *(("corpora", corpus.location) for corpus in manifest.corpora)]:
        _expect(f"{field}.location", None, location is not None, "what the source is")


def _check_completion(manifest: Manifest, completion: CompletionEntry) -> None:
    full = manifest.shard_examples
    for number, shard in enumerate(completion.shards):
        field = f"completion.shards[{number}]"
        # This check also prevents a manifest from naming a file outside the index.
        _expect(f"{field}.file", shard.file, shard.file == shard_file_name(number), shard_file_name(number))
        last = number == len(completion.shards) - 1
        fits = 1 <= shard.rows <= full if last else shard.rows == full
        _expect(f"{field}.rows", shard.rows, fits, f"1 to {full}" if last else str(full))
    digest = completion.autocorrelation_digest
    needed = manifest.coordinates == "projected" and (
        manifest.format_version < 6 or stores_autocorrelation(completion.rows, manifest.projection.side)
    )
    expected = "a digest" if needed else "null"
    _expect("completion.autocorrelation_digest", digest, (digest is not None) == needed, expected)
    rows = sum(shard.rows for shard in completion.shards)
    _expect("completion.rows", completion.rows, completion.rows == rows, f"{rows}, the sum over the shards")
    for name in ("tokens", "targets", "records", "skipped"):
        value = getattr(completion, name)
        _expect(f"completion.{name}", value, value >= 0, "at least 0")


def _expect(field: str, found: object, holds: bool, expected: str) -> None:
    if not holds:
        raise FieldError(field, found, expected)
