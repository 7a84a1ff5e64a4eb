"""What another person needs to verify an answer, as data and as the file `STEM.audit.json` beside its results.

Everything that decides the answer is there by digest or value. Fields listed under `descriptive` say where things lay
and what they were computed on: they may differ between equal runs, and nothing else may. `digest` covers the rest.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from trackstar.attribution.question import IndexEntry, QueriesEntry, QuestionEntry, StreamEntry, digest_of_bytes
from trackstar.errors import AuditError
from trackstar.store import Manifest
from trackstar.store.manifest import DESCRIPTIVE_FIELDS
from trackstar.store.strict_json import FieldError, parse_object, read_strictly

AUDIT_VERSION = 1
LARGEST_AUDIT = 16 * 2**20
DESCRIPTIVE = tuple(
    sorted(
        {"results.file", "index.path", "index.manifest_file", "device", "threads"}
        | {f"made_with.{name}" for name in DESCRIPTIVE_FIELDS}
    )
)
_LARGEST_SIDE = 4096  # R of this side would be 10¹⁵ bytes a block
_LARGEST_COUNT = 10**9
_LONGEST_NAME = 255  # bytes that file systems take


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationEntry:
    """Completions that the model itself gave.

    Attributes:
        max_new_tokens: Most tokens of each.
        prompts: The queries without completions, also those after which the model said nothing.
    """

    max_new_tokens: int
    prompts: QueriesEntry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultsEntry:
    """The file of results.

    Attributes:
        file: Its name (descriptive).
        digest: BLAKE2b-256 of its bytes.
        query_set: The name of the set of queries in it.
    """

    file: str
    digest: str
    query_set: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEntry:
    """What the rules decided.

    Attributes:
        mixing: λ.
        damping: Fraction of each block's mean eigenvalue that was added to R.
        candidates: How many training examples were ranked.
        codec: How the index stores them; `none` without an index.
        reranked: How many were ranked again from recomputed gradients.
    """

    mixing: float
    damping: float
    candidates: int
    codec: str
    reranked: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VersionsEntry:
    """What computed the answer."""

    python: str
    trackstar: str
    torch: str
    transformers: str

    @classmethod
    def here(cls) -> "VersionsEntry":
        """What would compute it now."""
        return cls(
            python=python_version(),
            trackstar=version("trackstar-tda"),
            torch=version("torch"),
            transformers=version("transformers"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The file: an answer, what it was asked and what it was made with.

    Attributes:
        audit_version: The version of the file's format, `AUDIT_VERSION`.
        results: The results' file.
        queries: What was asked, completions included.
        generation: How the completions came about, where the model gave them.
        question: The options.
        answer: What the rules decided.
        made_with: See `Asked`.
        index: The index, or None.
        stream: The pass over the corpus, or None.
        versions: What computed it.
        device: Where gradients were computed (descriptive).
        threads: On how many CPU threads (descriptive).
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
        """BLAKE2b-256 of all fields that are not descriptive: one number that equal runs share."""
        return _digest_of_fields(dataclasses.asdict(self))

    def to_json(self) -> str:
        """The file's text."""
        fields = dataclasses.asdict(self) | {"descriptive": DESCRIPTIVE, "digest": self.digest()}
        return json.dumps(fields, indent=1, allow_nan=False) + "\n"

    def check(self) -> None:
        """Check what types alone do not say.

        Raises:
            FieldError: A value cannot be that of an audit.
        """
        self.made_with.check()
        _expect("made_with.completion", self.made_with.completion, self.made_with.completion is None, "null")
        side = self.made_with.projection.side
        _expect("made_with.projection.side", side, side <= _LARGEST_SIDE, f"at most {_LARGEST_SIDE}")
        one = (self.index is None) != (self.stream is None)
        _expect("index", self.index, one, "an index, or null beside a stream")
        if self.index is not None:
            identity = self.made_with.identity_digest()
            _expect(
                "index.identity", self.index.identity, self.index.identity == identity, f"that of made_with, {identity}"
            )
        _expect(
            "results.file", self.results.file, _plain_name(self.results.file), "the name of a file, without folders"
        )
        for name, value in (("mixing", self.question.mixing), ("answer.mixing", self.answer.mixing)):
            _expect(name, value, value is None or 0 <= value <= 1, "a number from 0 to 1")
        for name, value in (("damping", self.question.damping), ("answer.damping", self.answer.damping)):
            _expect(name, value, value is None or (math.isfinite(value) and value >= 0), "a finite number, at least 0")
        for name, value in self._counts():
            _expect(name, value, 1 <= value <= _LARGEST_COUNT, f"1 to {_LARGEST_COUNT}")
        again = self.question.reranked
        _expect("question.reranked", again, again is None or 0 <= again <= _LARGEST_COUNT, f"0 to {_LARGEST_COUNT}")

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
    """The audit that `write_audit` wrote.

    Raises:
        AuditError: It cannot be read, or is not as it was written; the message names the field.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > LARGEST_AUDIT:
            raise AuditError(f"{file}: {size} bytes, expected an audit of at most {LARGEST_AUDIT}; is it another file?")
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise AuditError(
            f"{file}: cannot be read ({error.strerror}); give the STEM.audit.json that trackstar query --out wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise AuditError(f"{file}: byte {error.start} is not UTF-8, expected JSON; is it another file?") from error
    try:
        fields = read_strictly(text)
        _check_version(fields)
        descriptive, digest = fields.pop("descriptive", None), fields.pop("digest", None)
        _expect("descriptive", descriptive, descriptive == list(DESCRIPTIVE), "the fields that are descriptive")
        audit = parse_object(Audit, fields)
        audit.check()
        _expect(
            "digest", digest, digest == audit.digest(), f"{audit.digest()}: the file was changed after it was written"
        )
    except FieldError as error:
        raise AuditError(f"{file}: {error}; ask for the file as trackstar query wrote it") from error
    return audit


def _digest_of_fields(fields: dict[str, Any]) -> str:
    kept = json.dumps(_without_descriptive(fields), separators=(",", ":"), sort_keys=True, allow_nan=False)
    return digest_of_bytes(kept.encode("ascii"))


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
    _expect("audit_version", found, not newer, f"at most {AUDIT_VERSION}: it is of a newer trackstar, install that")
    _expect("audit_version", found, type(found) is int and found == AUDIT_VERSION, str(AUDIT_VERSION))


def _plain_name(name: str) -> bool:
    try:
        encoded = os.fsencode(name)
    except ValueError:  # half of a surrogate pair
        return False
    return len(encoded) <= _LONGEST_NAME and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _expect(field: str, found: object, holds: bool, expected: str) -> None:
    if not holds:
        raise FieldError(field, found, expected)
