"""Compare an audit with the inputs that an auditor has.

An auditor who has only the result file learns whether it is the audited one. With the model, the
corpus or the index, each of these is compared too; with all of them, the answer can be computed
again (`trackstar.audit.recomputation`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from trackstar.attribution.question import QueriesEntry, content_digest, queries_entry
from trackstar.audit.record import Audit, VersionsEntry
from trackstar.choices import DeviceMap, Join
from trackstar.corpus import Corpus, Query, open_corpus, query_with_texts, read_queries
from trackstar.corpus.digests import digest_of_bytes, digest_of_stream
from trackstar.corpus.fields import json_object
from trackstar.corpus.local_files import check_not_special
from trackstar.corpus.query_files import query_of_record
from trackstar.corpus.reading import CONVERSATION_FIELDS, Reading
from trackstar.errors import AuditError, CorpusError, DamagedIndexError, OptionError, StoreError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.language_model import LanguageModel
from trackstar.store import CorpusEntry, Manifest, ModelEntry, differences, load_manifest, verify
from trackstar.text import abridged, one_line
from trackstar.workers.index_model import different_fields, model_of_manifest

Outcome = Literal["same", "differs", "not checked", "note"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim of an audit and its comparison with an input.

    Attributes:
        name: Name of the claim, such as `model`.
        outcome: `same`; `differs`, which makes the audit fail; `not checked`, if the input was not
            given; or `note`.
        said: What was compared, how it differs, or which input to pass; one line.
    """

    name: str
    outcome: Outcome
    said: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The result of `check_audit`.

    Attributes:
        audit: The audit.
        checks: The checks, in the order in which they were made.
    """

    audit: Audit
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs; what was not checked does not count."""
        return not self.named("differs")

    def named(self, outcome: Outcome) -> tuple[str, ...]:
        """Names of the checks with this outcome."""
        return tuple(check.name for check in self.checks if check.outcome == outcome)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AtHand:
    """The inputs that an auditor has; None or empty means that an input is not available.

    Attributes:
        results: The result file; None is the one beside the audit.
        index: Folder of the index.
        model: Path or hub name of the model.
        data: The corpora, in any order.
        queries: The query file.
        task: The file of the queries that R_eval comes from.
        chat_template: The file with the template of their conversations; None is the index's, or else
            the tokenizer's.
        second_moment: Without an index, the optimizer state that V was read from; None computes V
            as the audit says.
        device: Device that the model is loaded on; see `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
    """

    results: str | Path | None = None
    index: str | Path | None = None
    model: str | Path | None = None
    data: Sequence[object] = ()
    queries: str | Path | None = None
    task: str | Path | None = None
    chat_template: str | Path | None = None
    second_moment: str | Path | SecondMoment | None = None
    device: str = "auto"
    device_map: DeviceMap | None = None


class InputChecks:
    """Checks of the available inputs, and the inputs that were loaded for them.

    Args:
        audit: The audit.
        path: Path of the audit file.
        available: The available inputs.

    Raises:
        OptionError: An input is given that the audit does not refer to.
    """

    def __init__(self, audit: Audit, path: Path, available: AtHand) -> None:
        self.audit = audit
        self.available = available
        self.results = path.with_name(audit.results.file) if available.results is None else Path(available.results)
        self.model: LanguageModel | None = None
        self.corpora: dict[int, Corpus] = {}
        self.queries: list[Query] | None = None
        self.task: list[Query] | None = None
        self.result_queries: list[Query] = []
        if available.index is not None and audit.index is None:
            raise OptionError("`index`: the audited answer was computed without an index; pass `data` instead")
        if available.second_moment is not None and audit.stream is None:
            raise OptionError("`second_moment`: V is stored in the index, whose every byte is compared; leave it out")
        if available.task is not None and audit.question.task is None:
            raise OptionError("`task`: the audit's R_eval comes from the queries themselves; leave it out")
        if len(available.data) > len(audit.made_with.corpora):
            raise OptionError(
                f"`data`: expected at most {len(audit.made_with.corpora)} corpora, as many as the audit names, found "
                f"{len(available.data)}; leave the others out"
            )

    def checks(self) -> Iterator[Check]:
        """Every check, the cheap ones first.

        Raises:
            TrackstarError: An input cannot be read; see `trackstar.errors`.
        """
        yield from self._check_results()
        self._read_queries()
        needs_tokenizer = any(query.messages is not None for query in self.queries or ())
        if not needs_tokenizer:
            yield from self._check_queries()
        yield from self._check_task()
        yield self._check_projection()
        yield from self._check_corpora()
        yield from self._check_index()
        yield from self._check_model()
        if needs_tokenizer:
            yield from self._check_queries()
        yield self._check_versions()

    def _check_results(self) -> Iterator[Check]:
        entry = self.audit.results
        if self.available.results is None and not self.results.exists():
            yield Check(
                name="results",
                outcome="differs",
                said=f"{self.results}: no such file; pass the result file as `results`",
            )
            return
        yield _comparison("results", file_digest(self.results), entry.digest, f"every byte of {self.results.name}")
        try:
            self.result_queries = queries_of_results(self.results, self.audit.question.join)
        except CorpusError as error:
            yield Check(name="queries in results", outcome="differs", said=str(error))
            return
        yield _comparison_of_queries("queries in results", self.result_queries, self.audit.queries)

    def _read_queries(self) -> None:
        if self.available.queries is not None:
            question = self.audit.question
            self.queries = read_queries(
                self.available.queries, prompt_field=question.prompt_field,
                needs_completion=self.audit.generation is None, join=question.join,
                chat_template=self.available.chat_template,
            )  # fmt: skip
            if self.audit.generation is None:
                self.queries = self.audit.made_with.in_template(self.queries)

    def _check_queries(self) -> Iterator[Check]:
        if self.queries is None:
            yield _not_checked("queries", "if they came from a file, pass it as `queries`")
            return
        if self.audit.generation is not None:
            yield _comparison_of_queries("prompts", without_completions(self.queries), self.audit.generation.prompts)
            return
        if any(query.messages is not None for query in self.queries):
            if self.model is None:
                yield _not_checked("queries", "they are conversations; pass the model, whose tokenizer reads them")
                return
            self.queries = [query_with_texts(query, self.model.tokenizer) for query in self.queries]
        yield _comparison_of_queries("queries", self.queries, self.audit.queries)

    def _check_task(self) -> Iterator[Check]:
        entry = self.audit.question.task
        if entry is None:
            return
        if self.available.task is None:
            yield _not_checked("task", "pass the queries that R_eval comes from as `task`")
            return
        question = self.audit.question
        self.task = read_queries(
            self.available.task, prompt_field=question.prompt_field, join=question.join,
            chat_template=self.available.chat_template,
        )  # fmt: skip
        yield _comparison_of_queries("task", self.task, entry)

    def _check_projection(self) -> Check:
        manifest = self.audit.made_with
        shapes = [(m.name, m.rows, m.columns) for block in manifest.layer_blocks for m in block.matrices]
        entry = manifest.projection
        found = projection_digest(shapes, seed=entry.seed, side=entry.side)
        return _comparison("projection", found, entry.digest, f"drawn with seed {entry.seed}, side {entry.side}")

    def _check_corpora(self) -> Iterator[Check]:
        entries = dict(enumerate(self.audit.made_with.corpora))
        unmatched: list[tuple[object, str]] = []
        for data in self.available.data:
            digests: dict[Reading, tuple[Corpus, str]] = {}
            for number in sorted(set(entries) - set(self.corpora)):
                corpus, found = _digest_as(data, entries[number], digests)
                if found == entries[number].digest:
                    self.corpora[number] = corpus
                    break
            else:
                unmatched.append((data, next(iter(digests.values()))[1]))
        missing = iter(sorted(set(entries) - set(self.corpora)))
        differing = {next(missing): corpus for corpus in unmatched}
        for number, entry in entries.items():
            name = "corpus" if len(entries) == 1 else f"corpus {number + 1}"
            if number in differing:
                data, found = differing[number]
                yield _comparison(name, found, entry.digest, f"{data}")
            elif number in self.corpora:
                yield _comparison(name, entry.digest, entry.digest, f"every byte of {self.corpora[number].name}")
            else:
                yield _not_checked(name, f"pass it as `data`; the audited one was {entry.source}")

    def _check_index(self) -> Iterator[Check]:
        if self.audit.index is None:
            return
        if self.available.index is None:
            yield _not_checked("index", f"pass it as `index`; the audited one was {self.audit.index.path}")
            return
        try:
            manifest = load_manifest(self.available.index)
        except DamagedIndexError as error:
            yield Check(name="index's manifest", outcome="differs", said=str(error))
            return
        if manifest is None:
            raise StoreError(
                f"{self.available.index}: not an index (no manifest.json); pass the folder that `build_index` wrote as "
                "`out`"
            )
        yield _comparison_of_manifests(manifest, self.audit.made_with)
        yield from self._check_index_content(manifest)

    def _check_index_content(self, manifest: Manifest) -> Iterator[Check]:
        entry, folder = self.audit.index, str(self.available.index)
        assert entry is not None, "only an audited index has content to compare"
        if manifest.completion is None:
            yield Check(name="index's content", outcome="differs", said=f"{folder}: the index is not finished")
            return
        yield _comparison(
            "index's content", content_digest(manifest), entry.content, "digests of its shards and of R_train"
        )
        if digest_of_bytes(manifest.to_json().encode(), bits=256) != entry.manifest_file:
            detail = "has other bytes than the audited one: paths of model and corpus differ, which decide nothing"
            yield Check(name="manifest.json", outcome="note", said=detail)
        report = verify(folder)
        if report.ok:
            detail = f"{report.rows:,} examples, {report.checked_bytes / 1e6:,.1f} MB read and compared"
            yield Check(name="index's bytes", outcome="same", said=detail)
        else:
            first, *others = report.problems
            more = f" (and {len(others)} more; `verify` lists all)" if others else ""
            yield Check(name="index's bytes", outcome="differs", said=f"{first}{more}")

    def _check_model(self) -> Iterator[Check]:
        entry = self.audit.made_with.model
        if self.available.model is None:
            yield _not_checked("model", f"pass it as `model`; the audited one was {entry.source}")
            yield _not_checked("configuration", "is loaded with `model`")
            yield _not_checked("tokenizer", "is loaded with `model`")
            return
        self.model = model_of_manifest(
            self.audit.made_with, self.available.model,
            device=self.available.device, device_map=self.available.device_map,
        )  # fmt: skip
        yield _comparison(
            "model", self.model.digest(), entry.digest, f"every weight of {self.model.source}, {entry.dtype}"
        )
        yield _comparison_of_configurations(entry, self.model)
        tokenizer = self.audit.made_with.tokenizer.digest
        yield _comparison("tokenizer", self.model.tokenizer_digest(), tokenizer, "its whole definition")

    def _check_versions(self) -> Check:
        audited = dataclasses.asdict(self.audit.versions)
        installed = dataclasses.asdict(VersionsEntry.installed())
        different = [
            f"{name} {audited[name]}, here {installed[name]}" for name in audited if audited[name] != installed[name]
        ]
        if different:
            detail = f"{'; '.join(different)}: scores may differ in their last digits"
            return Check(name="versions", outcome="note", said=detail)
        detail = ", ".join(f"{name} {found}" for name, found in installed.items())
        return Check(name="versions", outcome="same", said=detail)


def queries_of_results(path: Path, join: Join = "auto") -> list[Query]:
    """The queries that a result file answers; each one's `record` is its whole line.

    Args:
        path: The file.
        join: How prompts and completions were joined, for lines that do not say it.

    Raises:
        CorpusError: The file cannot be read, or a line is not a result.
    """
    check_not_special(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CorpusError(
            f"{path}: cannot be read ({error.strerror}); pass the audited results as `results`"
        ) from error
    queries = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        record = json_object(line, where)
        for field in ("example_id", "inputs_plaintext", "targets_plaintext"):
            value = record.get(field)
            if not isinstance(value, str):
                raise CorpusError(
                    f"{where}: field {field} is {abridged(value)}, expected a string; check that the file holds results"
                )
        queries.append(query_of_record(record, where, name="", prompt_field="inputs_plaintext", join=join))
    return queries


def file_digest(path: Path) -> str:
    """BLAKE2b-256 of a result file, in hexadecimal.

    Raises:
        AuditError: The file cannot be read.
    """
    check_not_special(path, AuditError)
    try:
        with path.open("rb") as stream:
            return digest_of_stream(stream, bits=256)
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror}); pass the audited results as `results`") from error


def _digest_as(data: object, entry: CorpusEntry, digests: dict[Reading, tuple[Corpus, str]]) -> tuple[Corpus, str]:
    """The corpus read with the entry's fields and limit, and its digest; `digests` caches both."""
    if entry.reading not in digests:
        corpus = open_corpus(data, **entry.options).read_as(entry.reading)
        digests[entry.reading] = corpus, corpus.digest()
    corpus, found = digests[entry.reading]
    choice = corpus.choice_of_digest(entry.digest)
    return (corpus, found) if choice is None else (dataclasses.replace(corpus, duplicate_ids=choice), entry.digest)


def without_completions(queries: Sequence[Query]) -> list[Query]:
    """The queries with their prompts only, as they were before the model completed them."""
    return [dataclasses.replace(query, completion="", token_ids=None, target_mask=None) for query in queries]


def _comparison(name: str, found: str, expected: str, what: str) -> Check:
    """The check of a digest."""
    if found == expected:
        return Check(name=name, outcome="same", said=f"{what}, {expected[:16]}…")
    return Check(name=name, outcome="differs", said=f"{what}: found {found[:16]}…, expected {abridged(expected[:16])}…")


def _comparison_of_queries(name: str, found: Sequence[Query], expected: QueriesEntry) -> Check:
    entry = queries_entry(found)
    if entry.count != expected.count:
        return Check(name=name, outcome="differs", said=f"found {entry.count:,}, expected {expected.count:,}")
    what = "names and prompts" if name == "prompts" else "names, prompts and completions"
    hint = ""
    if any(query.record.keys() & {*CONVERSATION_FIELDS, "instruction"} for query in found):
        hint = " (if they were asked in a chat template of their own, pass it as `chat_template`)"
    check = _comparison(name, entry.digest, expected.digest, f"{what} of {entry.count:,}")
    return check if check.outcome == "same" else dataclasses.replace(check, said=check.said + hint)


def _comparison_of_configurations(entry: ModelEntry, model: LanguageModel) -> Check:
    """The check of the fields that decide the model's function, apart from its weights."""
    if not entry.configuration:
        return Check(name="configuration", outcome="not checked", said="the audited index does not record it")
    different = different_fields(entry, model)
    if different:
        detail = "; ".join(f"{field} is {found}, expected {expected}" for field, expected, found in different)
        return Check(name="configuration", outcome="differs", said=one_line(detail, 300))
    return Check(name="configuration", outcome="same", said=f"{len(entry.configuration)} fields of config.json")


def _comparison_of_manifests(found: Manifest, expected: Manifest) -> Check:
    different = differences(found, expected)
    if not different:
        return Check(name="index", outcome="same", said=f"the same settings, {expected.identity_digest()[:16]}…")
    field, value, expected_value = different[0]
    more = f" (and {len(different) - 1} more fields)" if len(different) > 1 else ""
    detail = f"{field} is {abridged(value)}, expected {abridged(expected_value)}{more}"
    return Check(name="index", outcome="differs", said=detail)


def _not_checked(name: str, advice: str) -> Check:
    return Check(name=name, outcome="not checked", said=advice)
