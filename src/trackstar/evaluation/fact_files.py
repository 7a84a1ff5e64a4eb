"""Read facts, questions of other tasks, and the public release's sentences from files.

Facts are lines of JSON in two formats: that of the paper's public release, and that of T-REx sets
with several kinds of evidence. Other questions are read as queries are.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

from trackstar.corpus.data_files import find_files, raw_lines
from trackstar.corpus.fields import encodable, json_kind, json_object
from trackstar.corpus.kinds import ALTERNATIVE, KIND, aliases_of
from trackstar.corpus.query_files import query_of_record, query_records
from trackstar.corpus.task_files import TaskQuestions, is_xml
from trackstar.errors import CorpusError, check_at_least
from trackstar.evaluation.facts import RELEASE_PROMPTS, Entity, Fact, Sentence
from trackstar.text import one_line

_TREX_PROMPTS = ("prompt", "prompt_no_colon", "prompt_reworded")


def read_facts(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Fact]:
    """Read facts from JSON lines (.jsonl, .ndjson or .json; plain, .gz or .zst), a folder or a glob of them.

    A line has the fields of the public release (`fact_id`, `entity0`, `relation`, `entity1`,
    `entity0_alias`, `entity1_alias`, `entity0_uri`, `predicate_uri`, `entity1_uri`,
    `trex_sentences`, `c4_frequency`, `is_repetition`, `prompt0`, `prompt1`, `prompt2`), or of a
    T-REx set (`fact_id`, `subject`, `subject_id`, `subject_aliases`, `relation`, `relation_id`,
    `object`, `object_id`, `object_aliases`, `gold`, `gold_strict`, `coref`, `maybe_gold`, `prompt`,
    `prompt_no_colon`, `prompt_reworded`, `completion`). The id, both entities and the relation are
    required; other fields may be missing or null. `8b_generations` and `8b_confidence` are taken from
    either.

    A question of another kind is a query as `read_queries` reads it, with `kind`; it may have `gold`
    and `task`, the task's name. An open one need not have a completion.
    COPA, PIQA and arithmetic word problems are read as published.

    Args:
        path: File, folder or glob.
        limit: Most facts to read; None reads all.

    Raises:
        CorpusError: A line is not a fact, two facts have the same id, or there is none; the message
            names file and line.
        OptionError: `limit` is below 1.
    """
    check_at_least("limit", limit)
    facts: list[Fact] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(itertools.islice(_questions(path), limit)):
        fact = _question(line, number) if _is_question(line) else _fact(line)
        if fact.fact_id in seen:
            raise CorpusError(
                f'{line.where}: fact "{one_line(fact.fact_id)}" is also at {seen[fact.fact_id]}; expected each id once'
            )
        seen[fact.fact_id] = line.where
        facts.append(fact)
    if not facts:
        raise CorpusError(f"{os.fspath(path)}: holds no fact; expected at least one line that is not blank")
    return facts


def read_sentences(path: str | os.PathLike[str], *, limit: int | None = None) -> Iterator[Sentence]:
    """Read the public release's sentences with all their fields, one at a time.

    `open_corpus` reads the same files as plain examples.

    Raises:
        CorpusError: A line is not a sentence; the message names file and line.
        OptionError: `limit` is below 1.
    """
    check_at_least("limit", limit)
    for line in itertools.islice(_lines(path, "sentences"), limit):
        yield Sentence(
            sentence_id=line.name("sentence_id"),
            text=line.text("text"),
            abstract_uri=line.text("abstract_uri", default=""),
            place=line.number("sent_idx_in_abst") or 0,
            fact_triples=tuple(line.array("fact_triples")),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """The fields of a line; each is checked when it is read. A missing field or null gives the default."""

    where: str
    fields: Mapping[str, object]
    stem: str = ""

    def text(self, field: str, *, default: str | None = None) -> str:
        value = self.fields.get(field)
        if value is None and default is not None:
            return default
        if field not in self.fields:
            found = one_line(", ".join(list(self.fields)[:12])) or "no fields"
            raise CorpusError(f'{self.where}: no field "{field}"; found {found}; expected a fact or sentence')
        if not isinstance(value, str) or (default is None and not value.strip()):
            found = "empty" if isinstance(value, str) else json_kind(value)
            raise CorpusError(f'{self.where}: field "{field}" is {found}; expected a string')
        return encodable(value, f'{self.where}: field "{field}"')

    def name(self, field: str) -> str:
        value = self.fields.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(field)

    def number(self, field: str) -> int | None:
        value = self.fields.get(field)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise CorpusError(f'{self.where}: field "{field}" is {one_line(value, 40)}; expected a whole number from 0')
        return value

    def share(self, field: str) -> float | None:
        value = self.fields.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise CorpusError(f'{self.where}: field "{field}" is {one_line(value, 40)}; expected a number from 0 to 1')
        return float(value)

    def flag(self, field: str) -> bool | None:
        value = self.fields.get(field)
        if value is not None and not isinstance(value, bool):
            raise CorpusError(f'{self.where}: field "{field}" is {json_kind(value)}; expected true or false')
        return value

    def array(self, field: str) -> list[object]:
        value = self.fields.get(field)
        if value is not None and not isinstance(value, list):
            raise CorpusError(f'{self.where}: field "{field}" is {json_kind(value)}; expected an array')
        return value or []

    def texts(self, field: str) -> tuple[str, ...]:
        """The strings of an array."""
        values = self.array(field)
        for each in values:
            if not isinstance(each, str):
                raise CorpusError(f'{self.where}: field "{field}" holds {json_kind(each)}; expected strings')
        return tuple(encodable(str(each), f'{self.where}: field "{field}"') for each in values)

    def names(self, field: str) -> tuple[str, ...]:
        """The strings of an array, each once; blank ones are dropped, whole numbers become strings."""
        value = self.fields.get(field)
        items = [value] if isinstance(value, str) else self.array(field)
        for each in items:
            if isinstance(each, bool) or not isinstance(each, (str, int)):
                raise CorpusError(f'{self.where}: field "{field}" holds {json_kind(each)}; expected strings')
        texts = [encodable(str(each), f'{self.where}: field "{field}"') for each in items]
        return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _questions(path: str | os.PathLike[str]) -> Iterator[_Line]:
    """The lines of facts or, in the forms of other files of queries, of questions."""
    if is_xml(path) or os.fspath(path).lower().endswith(".json"):
        _, records = query_records(path)
        yield from (_Line(where=record.location, fields=record.value, stem=record.stem) for record in records)
        return
    questions = TaskQuestions()
    for line in _lines(path, "facts"):
        yield dataclasses.replace(line, fields=questions.query_fields(line.fields, line.where, line.stem))


def _is_question(line: _Line) -> bool:
    """Whether a line is a question of another kind than a fact.

    Raises:
        CorpusError: It is a query that is neither a fact of a set nor of another kind.
    """
    if line.fields.get(KIND) in (None, "fact") and line.fields.get(ALTERNATIVE) is None:
        if "fact_id" not in line.fields and "prompt" in line.fields:
            raise CorpusError(
                f"{line.where}: a query that is neither a fact nor of another kind; expected fact_id, entities and "
                f'relation, or a "{KIND}" choice, generation or open; add them'
            )
        return False
    return True


def _question(line: _Line, number: int) -> Fact:
    """A question of another kind than a fact; its task's name takes the place of the relation."""
    needs_completion = line.fields.get(KIND) != "open"
    query = query_of_record(line.fields, line.where, name=f"{line.stem}:{number}", needs_completion=needs_completion)
    if query.messages is not None or query.token_ids is not None or query.kind is None:
        raise CorpusError(f"{line.where}: a question as messages or tokens; expected prompt and completion as text")
    return Fact(
        fact_id=query.query_id,
        subject=Entity(name=""),
        relation=line.text("task", default=query.kind),
        relation_uri="",
        object=Entity(name=query.truth or query.completion, aliases=tuple(aliases_of(query))),
        prompts=(query.prompt,),
        gold=line.names("gold") or line.names("trex_sentences"),
        coref=line.names("coref"),
        maybe_gold=line.names("maybe_gold"),
        kind=query.kind,
        alternatives=tuple(one for one in query.alternatives if one.strip() != (query.truth or "").strip()),
        generations=line.texts("8b_generations"),
        confidence=line.share("8b_confidence"),
    )


def _lines(path: str | os.PathLike[str], what: str) -> Iterator[_Line]:
    source = find_files(os.fspath(path))
    if source.dataset or source.files[0].format != "jsonl":
        raise CorpusError(f"{source.name}: expected {what} as JSON lines: .jsonl, plain, .gz or .zst")
    for file in source.files:
        for number, line in raw_lines(file):
            where = f"{file.name}:{number}"
            yield _Line(where=where, fields=json_object(line, where), stem=file.stem)


def _fact(line: _Line) -> Fact:
    """The fact of a line in either format; a line without `subject` is one of the release."""
    if "subject" not in line.fields:
        return Fact(
            fact_id=line.name("fact_id"),
            subject=_entity(line, "entity0", "entity0_alias", "entity0_uri"),
            relation=line.text("relation"),
            relation_uri=line.text("predicate_uri", default=""),
            object=_entity(line, "entity1", "entity1_alias", "entity1_uri"),
            prompts=_prompts(line, RELEASE_PROMPTS),
            gold=line.names("trex_sentences"),
            frequency=line.number("c4_frequency"),
            is_repetition=line.flag("is_repetition"),
            generations=line.texts("8b_generations"),
            confidence=line.share("8b_confidence"),
        )
    completion = line.text("completion", default=line.text("object"))
    entity = _entity(line, "object", "object_aliases", "object_id")
    return Fact(
        fact_id=line.name("fact_id"),
        subject=_entity(line, "subject", "subject_aliases", "subject_id"),
        relation=line.text("relation"),
        relation_uri=line.text("relation_id", default=""),
        object=entity if completion == entity.name else Entity(name=completion, aliases=entity.names, uri=entity.uri),
        prompts=_prompts(line, _TREX_PROMPTS),
        gold=line.names("gold"),
        gold_strict=line.names("gold_strict"),
        coref=line.names("coref"),
        maybe_gold=line.names("maybe_gold"),
        is_repetition=line.flag("answer_in_subject"),
        generations=line.texts("8b_generations"),
        confidence=line.share("8b_confidence"),
    )


def _entity(line: _Line, name_field: str, aliases_field: str, uri_field: str) -> Entity:
    name = line.text(name_field)
    aliases = tuple(alias for alias in line.names(aliases_field) if alias != name)
    return Entity(name=name, aliases=aliases, uri=line.text(uri_field, default=""))


def _prompts(line: _Line, fields: Sequence[str]) -> tuple[str, ...]:
    """The prompts of a line; all before the last one must be present."""
    present = [field for field in fields if line.fields.get(field) is not None]
    if present != list(fields[: len(present)]):
        missing = next(field for field in fields if field not in present)
        raise CorpusError(f'{line.where}: no field "{missing}"; found {", ".join(present)}; expected all before them')
    return tuple(line.text(field) for field in present)
