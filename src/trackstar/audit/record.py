"""The audit record of an answer, as data and as the file `STEM.audit.json` beside the result file.

The record holds everything that decides the answer, by value or by digest. Fields listed under
`descriptive` hold paths and hardware; only these may differ between equal runs. `digest` covers all
other fields.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from trackstar.attribution.question import IndexEntry, QueriesEntry, QuestionEntry, StreamEntry, queries_entry
from trackstar.choices import Stop
from trackstar.corpus import Query
from trackstar.corpus.digests import digest_of_bytes
from trackstar.corpus.local_files import check_not_special
from trackstar.errors import AuditError, OptionError
from trackstar.model.generation_settings import GenerationSettings
from trackstar.store import Manifest
from trackstar.store.manifest import manifest_fields, with_absent_fields
from trackstar.store.manifest_entries import ADDED_FIELDS, DESCRIPTIVE_FIELDS
from trackstar.store.strict_json import FieldError, parse_object, read_strictly
from trackstar.text import Words

AUDIT_VERSION = 3
OLDEST_AUDIT_VERSION = 1
"""The oldest version that is read."""
LARGEST_AUDIT = 16 * 2**20
DESCRIPTIVE = tuple(
    sorted(
        {"results.file", "index.path", "index.manifest_file", "device", "threads"}
        | {f"made_with.{name}" for name in DESCRIPTIVE_FIELDS}
    )
)
_ADDED_IN_3: dict[str, dict[str, object]] = {
    "question": {"join": "space"},
    "generation": {"temperature": 0.0, "top_p": 1.0, "sampling_seed": 0, "stop": "line", "chat": False},
}
"""Fields that older versions lack, by entry, and what they amount to there."""
_LARGEST_SIDE = 4096  # with this side, R would have 10¹⁵ bytes per block
_LARGEST_COUNT = 10**9
_LONGEST_NAME = 255  # bytes that file systems accept


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEntry:
    """Completions that the model generated; see `GenerationSettings`.

    Attributes:
        max_new_tokens: Most tokens of a completion.
        temperature: Divisor of the logits; 0 is greedy.
        top_p: Share of the probability that was sampled from.
        sampling_seed: Seed of the samples.
        stop: Where completions end.
        chat: Whether prompts were users' messages in the tokenizer's chat template.
        prompts: The queries without completions, including those whose completion is empty.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    sampling_seed: int
    stop: Stop
    chat: bool
    prompts: QueriesEntry

    @classmethod
    def of(cls, settings: GenerationSettings, prompts: Sequence[Query]) -> "GenerationEntry":
        """The entry of prompts that were completed with these settings."""
        fields = dataclasses.asdict(settings)
        return cls(**fields, prompts=queries_entry(prompts))

    def settings(self) -> GenerationSettings:
        """The settings, to generate with them again.

        Raises:
            OptionError: One is out of range.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(GenerationSettings)}
        return GenerationSettings(**fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultsEntry:
    """The result file.

    Attributes:
        file: Name of the file (descriptive).
        digest: BLAKE2b-256 of its bytes.
        query_set: Name of the set of queries in it.
    """

    file: str
    digest: str
    query_set: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEntry:
    """The settings that rules decided, and the size of the ranking.

    Attributes:
        mixing: λ.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block.
        candidates: Number of candidates that were ranked.
        codec: Codec of the index; `none` without an index.
        reranked: Number of candidates re-ranked from recomputed gradients.
    """

    mixing: float
    damping: float
    candidates: int
    codec: str
    reranked: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VersionsEntry:
    """Versions of the software that computed the answer."""

    python: str
    trackstar: str
    torch: str
    transformers: str

    @classmethod
    def installed(cls) -> "VersionsEntry":
        """The installed versions."""
        return cls(
            python=python_version(),
            trackstar=version("trackstar-tda"),
            torch=version("torch"),
            transformers=version("transformers"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The audit file: a question, its answer, and what the answer was computed with.

    Attributes:
        audit_version: Version of the file's format, `AUDIT_VERSION` or an older one that is read.
        results: The result file.
        queries: The queries, completions included.
        generation: How the model generated the completions; None if it did not.
        question: The settings as the caller passed them.
        answer: The settings that rules decided.
        made_with: Manifest, without completion, of the index or of the index that the pass over the
            corpus amounts to.
        index: The index; None for a pass over the corpus.
        stream: The pass over the corpus; None for an index.
        versions: Versions of the software.
        device: Device that gradients were computed on (descriptive).
        threads: Number of CPU threads (descriptive).
    """

    audit_version: int
    results: ResultsEntry
    queries: QueriesEntry
    generation: GenerationEntry | None
    question: QuestionEntry
    answer: AnswerEntry
    made_with: Manifest
    index: IndexEntry | None
    stream: StreamEntry | None
    versions: VersionsEntry
    device: str
    threads: int

    def digest(self) -> str:
        """BLAKE2b-256 of all fields that are not descriptive; equal runs have equal digests."""
        return _digest_of_fields(self._fields())

    def to_json(self) -> str:
        """The text of the audit file."""
        fields = self._fields() | {"descriptive": _descriptive(self.audit_version), "digest": self.digest()}
        return json.dumps(fields, indent=1, allow_nan=False) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"made_with": manifest_fields(self.made_with)}
        if self.audit_version < 3:
            for entry, added in _ADDED_IN_3.items():
                if fields[entry] is not None:
                    fields[entry] = {name: value for name, value in fields[entry].items() if name not in added}
        return fields

    def check(self) -> None:
        """Raise if a value is out of range or two fields contradict each other.

        Raises:
            FieldError: A value is not one of an audit; the message names the field.
        """
        self.made_with.check()
        _expect("made_with.completion", self.made_with.completion, self.made_with.completion is None, "null")
        side = self.made_with.projection.side
        _expect("made_with.projection.side", side, side <= _LARGEST_SIDE, f"at most {_LARGEST_SIDE}")
        exactly_one = (self.index is None) != (self.stream is None)
        _expect("index", self.index, exactly_one, "an index if stream is null, else null")
        if self.index is not None:
            identity = self.made_with.identity_digest()
            _expect(
                "index.identity", self.index.identity, self.index.identity == identity, f"that of made_with, {identity}"
            )
        _expect("results.file", self.results.file, _plain_name(self.results.file), "a file name without folders")
        for name, value in (("mixing", self.question.mixing), ("answer.mixing", self.answer.mixing)):
            _expect(name, value, value is None or 0 <= value <= 1, "a number from 0 to 1")
        for name, value in (("damping", self.question.damping), ("answer.damping", self.answer.damping)):
            _expect(name, value, value is None or (math.isfinite(value) and value >= 0), "a finite number, at least 0")
        if self.generation is not None:
            try:
                self.generation.settings()
            except OptionError as error:
                raise FieldError("generation", Words(str(error)), "settings that can be used") from None
        for name, value in self._counts():
            _expect(name, value, 1 <= value <= _LARGEST_COUNT, f"1 to {_LARGEST_COUNT}")
        reranked = self.question.reranked
        in_range = reranked is None or 0 <= reranked <= _LARGEST_COUNT
        _expect("question.reranked", reranked, in_range, f"0 to {_LARGEST_COUNT}")

    def _counts(self) -> Iterable[tuple[str, int]]:
        yield "queries.count", self.queries.count
        yield "question.top", self.question.top
        yield "question.batch_tokens", self.question.batch_tokens
        if self.generation is not None:
            yield "generation.max_new_tokens", self.generation.max_new_tokens
        if self.stream is not None:
            yield "stream.second_moment_examples", self.stream.second_moment_examples
            yield "stream.whitening_examples", self.stream.whitening_examples


def read_audit(path: str | os.PathLike[str]) -> Audit:
    """Read an audit file that `write_audit` wrote.

    Raises:
        AuditError: The file cannot be read, or was changed after it was written; the message names
            the field.
    """
    file = Path(path)
    check_not_special(file, AuditError)
    try:
        size = file.stat().st_size
        if size > LARGEST_AUDIT:
            raise AuditError(
                f"{file}: expected an audit of at most {LARGEST_AUDIT} bytes, found {size}; check the path"
            )
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise AuditError(
            f"{file}: cannot be read ({error.strerror}); pass the STEM.audit.json beside the result file"
        ) from error
    except UnicodeDecodeError as error:
        raise AuditError(
            f"{file}: expected JSON, found a byte that is not UTF-8 at {error.start}; check the path"
        ) from error
    try:
        fields = read_strictly(text)
        _check_version(fields)
        descriptive, digest = fields.pop("descriptive", None), fields.pop("digest", None)
        expected = list(_descriptive(fields["audit_version"]))
        _expect("descriptive", descriptive, descriptive == expected, "the list of descriptive fields")
        if isinstance(fields.get("made_with"), dict):
            fields["made_with"] = with_absent_fields(fields["made_with"])
        _add_absent_fields(fields)
        audit = parse_object(Audit, fields)
        audit.check()
        _expect(
            "digest", digest, digest == audit.digest(), f"{audit.digest()}: the file was changed after it was written"
        )
    except FieldError as error:
        raise AuditError(f"{file}: {error}; get the file as it was written") from error
    return audit


def _add_absent_fields(fields: dict[str, Any]) -> None:
    if fields["audit_version"] < 3:
        for entry, added in _ADDED_IN_3.items():
            if isinstance(fields.get(entry), dict):
                for name in added:
                    found = fields[entry].get(name)
                    _expect(f"{entry}.{name}", found, name not in fields[entry], "no field of this name")
                fields[entry] = fields[entry] | added


def _descriptive(audit_version: int) -> tuple[str, ...]:
    """Names of the descriptive fields in an audit of this version."""
    newest = audit_version + 2  # the index's format version of that time
    added = {
        f"made_with.{entry}.{name}"
        for version, of in ADDED_FIELDS.items()
        if version > newest
        for entry, names in of.items()
        for name in names
    }
    return tuple(name for name in DESCRIPTIVE if name not in added)


def _digest_of_fields(fields: dict[str, Any]) -> str:
    text = json.dumps(_without_descriptive(fields), separators=(",", ":"), sort_keys=True, allow_nan=False)
    return digest_of_bytes(text.encode("ascii"), bits=256)


def _without_descriptive(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        named = {key: f"{name}.{key}".removeprefix(".") for key in value}
        return {
            key: _without_descriptive(inner, named[key])
            for key, inner in value.items()
            if named[key] not in DESCRIPTIVE
        }
    return [_without_descriptive(inner, name) for inner in value] if isinstance(value, (list, tuple)) else value


def _check_version(fields: dict[str, Any]) -> None:
    found = fields.get("audit_version")
    newer = type(found) is int and found > AUDIT_VERSION
    _expect(
        "audit_version", found, not newer, f"at most {AUDIT_VERSION}: a newer trackstar wrote the file, install that"
    )
    known = type(found) is int and OLDEST_AUDIT_VERSION <= found <= AUDIT_VERSION
    _expect("audit_version", found, known, f"{OLDEST_AUDIT_VERSION} to {AUDIT_VERSION}")


def _plain_name(name: str) -> bool:
    try:
        encoded = os.fsencode(name)
    except ValueError:  # half a surrogate pair
        return False
    return len(encoded) <= _LONGEST_NAME and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _expect(field: str, found: object, holds: bool, expected: str) -> None:
    if not holds:
        raise FieldError(field, found, expected)
