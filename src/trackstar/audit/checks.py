"""An answer that another person can verify: `results.audit.json` is written beside results, and checked elsewhere.

What is checked is what is at hand: whoever has the results alone learns whether they are those of the audit; with the
model, the corpus or the index, whether these are; and with all of them, whether the same answer comes out again.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from trackstar.attribution.question import QueriesEntry, content_digest, digest_of_bytes, queries_entry
from trackstar.audit.record import Audit, VersionsEntry
from trackstar.corpus import Corpus, Query, open_corpus, read_queries
from trackstar.corpus.fields import json_object
from trackstar.errors import AuditError, CorpusError, DamagedIndexError, OptionError, StoreError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.language_model import LanguageModel
from trackstar.store import CorpusEntry, Manifest, differences, load_manifest, verify
from trackstar.text import abridged
from trackstar.workers.made_with import model_of_manifest

Outcome = Literal["same", "differs", "not checked", "note"]
_BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that an audit says, and how it compares with what is at hand.

    Attributes:
        name: What it is, such as `model`.
        outcome: `same`; `differs`, which makes the audit fail; `not checked`, where it was not given; or `note`.
        said: What was compared, or what differs, or what to give; one line.
    """

    name: str
    outcome: Outcome
    said: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What `check_audit` found, in the order in which it looked.

    Attributes:
        audit: What was audited.
        checks: One for each thing.
    """

    audit: Audit
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs; what was not checked does not count."""
        return not self.named("differs")

    def named(self, outcome: Outcome) -> tuple[str, ...]:
        """The names of all that came out so."""
        return tuple(check.name for check in self.checks if check.outcome == outcome)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AtHand:
    """What somebody who audits an answer has; None and empty is what they have not.

    Attributes:
        results: The results' file; None is the one beside the audit.
        index: The index's folder.
        model: Where to load the model from.
        data: The corpora, in any order.
        queries: The queries' file.
        task: The file of queries that R_eval comes from.
        second_moment: Without an index, the optimizer's state that V came from; None is how V was asked for then.
        device: Where the model is loaded.
    """

    results: str | Path | None = None
    index: str | Path | None = None
    model: str | Path | None = None
    data: Sequence[object] = ()
    queries: str | Path | None = None
    task: str | Path | None = None
    second_moment: str | Path | SecondMoment | None = None
    device: str = "cpu"


class InputChecks:
    """The checks of what is at hand, and what was loaded for them.

    Args:
        audit: What was audited.
        path: Its file.
        hand: What is at hand.

    Raises:
        OptionError: Something is given that this audit says nothing of.
    """

    def __init__(self, audit: Audit, path: Path, hand: AtHand) -> None:
        self.audit = audit
        self.hand = hand
        self.results = path.with_name(audit.results.file) if hand.results is None else Path(hand.results)
        self.model: LanguageModel | None = None
        self.corpora: dict[int, Corpus] = {}
        self.queries: list[Query] | None = None
        self.task: list[Query] | None = None
        self.answered: list[Query] = []
        if hand.index is not None and audit.index is None:
            raise OptionError("--index: the audit is of a corpus that was gone through without one; give --data")
        if hand.second_moment is not None and audit.stream is None:
            raise OptionError("--second-moment: V is in the index, whose every byte is compared; leave it out")
        if hand.task is not None and audit.question.task is None:
            raise OptionError("--task: the audit's R_eval comes from the queries themselves; leave it out")
        if len(hand.data) > len(audit.made_with.corpora):
            raise OptionError(
                f"--data: found {len(hand.data)} corpora, and the audit is of {len(audit.made_with.corpora)}; leave "
                "out the others"
            )

    def all(self) -> Iterator[Check]:
        """Every check, the cheap ones first.

        Raises:
            TrackstarError: Something that was given cannot be read.
        """
        yield from self._results()
        yield from self._queries()
        yield from self._task()
        yield self._projection()
        yield from self._corpora()
        yield from self._index()
        yield from self._model()
        yield self._versions()

    def _results(self) -> Iterator[Check]:
        entry = self.audit.results
        if self.hand.results is None and not self.results.exists():
            yield Check(name="results", outcome="differs", said=f"{self.results}: no such file; give --results FILE")
            return
        yield _compared("results", file_digest(self.results), entry.digest, f"every byte of {self.results.name}")
        try:
            self.answered = read_answered(self.results)
        except CorpusError as error:
            yield Check(name="queries in results", outcome="differs", said=str(error))
            return
        yield _compared_queries("queries in results", self.answered, self.audit.queries)

    def _queries(self) -> Iterator[Check]:
        if self.hand.queries is None:
            yield _missing("queries", "give --queries FILE, where they came from a file")
            return
        generation = self.audit.generation
        self.queries = read_queries(
            self.hand.queries, prompt_field=self.audit.question.prompt_field, needs_completion=generation is None
        )
        if generation is None:
            yield _compared_queries("queries", self.queries, self.audit.queries)
        else:
            yield _compared_queries("prompts", without_completions(self.queries), generation.prompts)

    def _task(self) -> Iterator[Check]:
        entry = self.audit.question.task
        if entry is None:
            return
        if self.hand.task is None:
            yield _missing("task", "give --task FILE, the queries that R_eval comes from")
            return
        self.task = read_queries(self.hand.task, prompt_field=self.audit.question.prompt_field)
        yield _compared_queries("task", self.task, entry)

    def _projection(self) -> Check:
        manifest = self.audit.made_with
        shapes = [(m.name, m.rows, m.columns) for block in manifest.layer_blocks for m in block.matrices]
        entry = manifest.projection
        found = projection_digest(shapes, seed=entry.seed, side=entry.side)
        return _compared("projection", found, entry.digest, f"drawn anew with seed {entry.seed}, side {entry.side}")

    def _corpora(self) -> Iterator[Check]:
        entries = dict(enumerate(self.audit.made_with.corpora))
        wrong: list[tuple[object, str]] = []
        for given in self.hand.data:
            digests: dict[tuple[object, ...], tuple[Corpus, str]] = {}
            for number in sorted(set(entries) - set(self.corpora)):
                corpus, found = _digest_as(given, entries[number], digests)
                if found == entries[number].digest:
                    self.corpora[number] = corpus
                    break
            else:
                wrong.append((given, next(iter(digests.values()))[1]))
        unmatched = iter(sorted(set(entries) - set(self.corpora)))
        differing = {next(unmatched): each for each in wrong}
        for number, entry in entries.items():
            name = "corpus" if len(entries) == 1 else f"corpus {number + 1}"
            if number in differing:
                given, found = differing[number]
                yield _compared(name, found, entry.digest, f"{given}")
            elif number in self.corpora:
                yield _compared(name, entry.digest, entry.digest, f"every byte of {self.corpora[number].name}")
            else:
                yield _missing(name, f"give --data D, once {entry.source}")

    def _index(self) -> Iterator[Check]:
        if self.audit.index is None:
            return
        if self.hand.index is None:
            yield _missing("index", f"give --index IDX, once {self.audit.index.path}")
            return
        try:
            manifest = load_manifest(self.hand.index)
        except DamagedIndexError as error:
            yield Check(name="index's manifest", outcome="differs", said=str(error))
            return
        if manifest is None:
            raise StoreError(
                f"{self.hand.index}: no index is there (no manifest.json); give the folder of `trackstar index --out`"
            )
        yield _compared_manifests(manifest, self.audit.made_with)
        yield from self._index_content(manifest)

    def _index_content(self, manifest: Manifest) -> Iterator[Check]:
        entry, folder = self.audit.index, str(self.hand.index)
        assert entry is not None, "only an index that was asked has content to compare"
        if manifest.completion is None:
            yield Check(name="index's content", outcome="differs", said=f"{folder}: the index is not finished")
            return
        yield _compared(
            "index's content", content_digest(manifest), entry.content, "digests of its shards and of R_train"
        )
        if digest_of_bytes(manifest.to_json().encode()) != entry.manifest_file:
            said = "has other bytes than then: also where the model and corpus lay is in it, which decides nothing"
            yield Check(name="manifest.json", outcome="note", said=said)
        report = verify(folder)
        if report.ok:
            said = f"{report.rows:,} examples, {report.checked_bytes / 1e6:,.1f} MB read and compared"
            yield Check(name="index's bytes", outcome="same", said=said)
        else:
            first, *others = report.problems
            more = f" (and {len(others)} more: trackstar verify)" if others else ""
            yield Check(name="index's bytes", outcome="differs", said=f"{first}{more}")

    def _model(self) -> Iterator[Check]:
        entry = self.audit.made_with.model
        if self.hand.model is None:
            yield _missing("model", f"give --model M, once {entry.source}")
            yield _missing("tokenizer", "goes with --model")
            return
        self.model = model_of_manifest(self.audit.made_with, self.hand.model, device=self.hand.device)
        yield _compared(
            "model", self.model.digest(), entry.digest, f"every weight of {self.model.source}, {entry.dtype}"
        )
        tokenizer = self.audit.made_with.tokenizer.digest
        yield _compared("tokenizer", self.model.tokenizer_digest(), tokenizer, "its whole definition")

    def _versions(self) -> Check:
        then, here = dataclasses.asdict(self.audit.versions), dataclasses.asdict(VersionsEntry.here())
        other = [f"{name} {then[name]}, here {here[name]}" for name in then if then[name] != here[name]]
        if other:
            said = f"{'; '.join(other)}: scores may differ in their last digits"
            return Check(name="versions", outcome="note", said=said)
        return Check(name="versions", outcome="same", said=", ".join(f"{name} {found}" for name, found in here.items()))


def read_answered(path: Path) -> list[Query]:
    """The queries that a file of results answers; each one's `record` is its whole line.

    Raises:
        CorpusError: It cannot be read, or a line is no result.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CorpusError(
            f"{path}: cannot be read ({error.strerror}); give the results that the audit is of"
        ) from error
    answered = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        record = json_object(line, where)
        texts: list[str] = []
        for field in ("example_id", "inputs_plaintext", "targets_plaintext"):
            value = record.get(field)
            if not isinstance(value, str):
                raise CorpusError(f"{where}: {field} is {abridged(value)}, expected a string; is it a result?")
            texts.append(value)
        answered.append(Query(query_id=texts[0], prompt=texts[1], completion=texts[2], record=record))
    return answered


def file_digest(path: Path) -> str:
    """BLAKE2b digest of every byte of a file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror}); give the results that the audit is of") from error
    return digest.hexdigest()


def _digest_as(
    given: object, entry: CorpusEntry, known: dict[tuple[object, ...], tuple[Corpus, str]]
) -> tuple[Corpus, str]:
    """The corpus read as the entry says, and its digest."""
    settings: dict[str, Any] = {"text_field": entry.text_field, "id_field": entry.id_field, "limit": entry.limit}
    key = tuple(settings.values())
    if key not in known:
        corpus = open_corpus(given, **settings)
        known[key] = corpus, corpus.digest()
    return known[key]


def without_completions(queries: Sequence[Query]) -> list[Query]:
    """The queries' prompts alone, as they stood before the model completed them."""
    return [dataclasses.replace(query, completion="") for query in queries]


def _compared(name: str, found: str, expected: str, what: str) -> Check:
    if found == expected:
        return Check(name=name, outcome="same", said=f"{what}, {expected[:16]}…")
    return Check(name=name, outcome="differs", said=f"{what}: found {found[:16]}…, expected {abridged(expected[:16])}…")


def _compared_queries(name: str, found: Sequence[Query], expected: QueriesEntry) -> Check:
    entry = queries_entry(found)
    if entry.count != expected.count:
        return Check(name=name, outcome="differs", said=f"found {entry.count:,}, expected {expected.count:,}")
    what = "names and prompts" if name == "prompts" else "names, prompts and completions"
    return _compared(name, entry.digest, expected.digest, f"{what} of {entry.count:,}")


def _compared_manifests(found: Manifest, expected: Manifest) -> Check:
    other = differences(found, expected)
    if not other:
        return Check(name="index", outcome="same", said=f"made with the same, {expected.identity_digest()[:16]}…")
    field, has, wanted = other[0]
    more = f" (and {len(other) - 1} more fields)" if len(other) > 1 else ""
    return Check(name="index", outcome="differs", said=f"{field} is {abridged(has)}, expected {abridged(wanted)}{more}")


def _missing(name: str, what: str) -> Check:
    return Check(name=name, outcome="not checked", said=what)
