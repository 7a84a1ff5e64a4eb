"""Facts to trace: subject, relation, object, prompts, and the examples known to state them (paper, §4.2).

Two formats of JSON lines are read: that of the paper's public release, and that of T-REx sets with
several kinds of evidence.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trackstar.corpus import Query
from trackstar.corpus.data_files import find_files, raw_lines
from trackstar.corpus.digests import digest_of_bytes
from trackstar.corpus.fields import encodable, json_kind, json_object
from trackstar.errors import CorpusError, OptionError, check_at_least
from trackstar.text import one_line

_TREX_PROMPTS = ("prompt", "prompt_no_colon", "prompt_reworded")
_RELEASE_PROMPTS = ("prompt0", "prompt1", "prompt2")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """A subject or an object.

    Attributes:
        name: Its name in prompts and completions.
        aliases: Its other names.
        uri: Its URI or Wikidata id; empty if it has none.
    """

    name: str
    aliases: tuple[str, ...] = ()
    uri: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its aliases, each once."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A fact to trace.

    Attributes:
        fact_id: Its id.
        subject: Its subject; `entity0` in the release.
        relation: Name of the relation; in the release, its template.
        relation_uri: URI or Wikidata id of the relation (`predicate_uri` in the release); empty if
            it has none.
        object: Its object, which is the completion; `entity1` in the release.
        prompts: One prompt per template, the main one first; empty if the file has none.
        gold: Ids of the examples that state it; `trex_sentences` in the release.
        gold_strict: Ids of the gold examples that state it plainly; empty if that is unknown.
        coref: Ids of the examples that state it about a pronoun. Like `maybe_gold`, they are left
            out of rankings: they count neither as correct nor as wrong.
        maybe_gold: Ids of the examples that name subject and object but are not known to state it.
        frequency: Number of examples of the model's training data that contain it (`c4_frequency`
            in the release); None if the file does not say.
        is_repetition: Whether one entity is named in the other's name; None if the file does not
            say.
    """

    fact_id: str
    subject: Entity
    relation: str
    relation_uri: str
    object: Entity
    prompts: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()
    gold_strict: tuple[str, ...] = ()
    coref: tuple[str, ...] = ()
    maybe_gold: tuple[str, ...] = ()
    frequency: int | None = None
    is_repetition: bool | None = None

    @property
    def relation_id(self) -> str:
        """The last part of the relation's URI, such as `P36`; the relation's name if it has none."""
        return self.relation_uri.rstrip("/").rsplit("/", 1)[-1] or self.relation

    def to_query(self, template: int = 0) -> Query:
        """The query that asks for the object; its record is the fact in the release's fields.

        Args:
            template: Number of the prompt, from 0; the paper uses 0, the release's `prompt0`.

        Raises:
            OptionError: There is no such prompt.
        """
        if not 0 <= template < len(self.prompts):
            available = f"prompts 0 to {len(self.prompts) - 1}" if self.prompts else "no prompt"
            raise OptionError(f"`template`: fact {self.fact_id} has {available}, found {template}; choose another")
        return Query(
            query_id=self.fact_id, prompt=self.prompts[template], completion=self.object.name, record=self.to_release()
        )

    def to_release(self) -> dict[str, Any]:
        """The fact as a line of the public release; attributes without a field in it are left out."""
        record: dict[str, Any] = {
            "fact_id": self.fact_id,
            "entity0": self.subject.name,
            "relation": self.relation,
            "entity1": self.object.name,
            "entity0_alias": list(self.subject.aliases),
            "entity1_alias": list(self.object.aliases),
            "entity0_uri": self.subject.uri,
            "predicate_uri": self.relation_uri,
            "entity1_uri": self.object.uri,
            "trex_sentences": list(self.gold),
        }
        if self.frequency is not None:
            record["c4_frequency"] = self.frequency
        if self.is_repetition is not None:
            record["is_repetition"] = self.is_repetition
        return record | dict(zip(_RELEASE_PROMPTS, self.prompts, strict=False))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence of the public release's corpus.

    Attributes:
        sentence_id: Its id.
        text: Its text.
        abstract_uri: URI of the abstract that contains it.
        place: Its number in the abstract, from 0 (`sent_idx_in_abst`).
        fact_triples: The facts that it is known to state, as in the file.
    """

    sentence_id: str
    text: str
    abstract_uri: str
    place: int
    fact_triples: tuple[object, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The evidence of each fact as rows of a pool, for `gold_ranks`.

    Attributes:
        gold: Rows of the examples that count as correct.
        left_out: Rows of the examples that count neither as correct nor as wrong.
    """

    gold: tuple[tuple[int, ...], ...]
    left_out: tuple[tuple[int, ...], ...]


def read_facts(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Fact]:
    """Read facts from JSON lines (.jsonl, .ndjson or .json; plain, .gz or .zst), a folder or a glob of them.

    A line has the fields of the public release (`fact_id`, `entity0`, `relation`, `entity1`,
    `entity0_alias`, `entity1_alias`, `entity0_uri`, `predicate_uri`, `entity1_uri`,
    `trex_sentences`, `c4_frequency`, `is_repetition`, `prompt0`, `prompt1`, `prompt2`), or of a
    T-REx set (`fact_id`, `subject`, `subject_id`, `subject_aliases`, `relation`, `relation_id`,
    `object`, `object_id`, `object_aliases`, `gold`, `gold_strict`, `coref`, `maybe_gold`, `prompt`,
    `prompt_no_colon`, `prompt_reworded`, `completion`). The id, both entities and the relation are
    required; other fields may be missing or null.

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
    for line in itertools.islice(_lines(path, "facts"), limit):
        fact = _fact(line)
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


def evidence(facts: Sequence[Fact], row_of: Mapping[str, int], *, strict: bool = False) -> Evidence:
    """Rows of each fact's correct examples, and of the examples to leave out.

    Args:
        facts: The facts, in the order of the queries.
        row_of: Example id to row; see `Pool.row_of`.
        strict: Whether only `gold_strict` examples are correct; the other gold examples then count
            as wrong.

    Raises:
        CorpusError: A fact has no correct example, or one that is not in the pool; the message
            names fact and example. Examples to leave out may be missing.
    """
    gold, left_out = [], []
    for fact in facts:
        correct = fact.gold_strict if strict else fact.gold
        if not correct:
            raise CorpusError(
                f"fact {one_line(fact.fact_id)}: has no {'strict ' if strict else ''}gold example; leave it out"
            )
        if missing := [example_id for example_id in correct if example_id not in row_of]:
            raise CorpusError(
                f"fact {one_line(fact.fact_id)}: gold example {one_line(missing[0])} is not in the pool; expected "
                "all gold examples there"
            )
        gold.append(tuple(row_of[example_id] for example_id in correct))
        unclear = dict.fromkeys((*fact.coref, *fact.maybe_gold))
        left_out.append(tuple(row_of[name] for name in unclear if name in row_of and name not in fact.gold))
    return Evidence(gold=tuple(gold), left_out=tuple(left_out))


def fact_digest(fact: Fact) -> str:
    """Digest of all attributes of a fact."""
    return digest_of_bytes(repr(dataclasses.astuple(fact)).encode("utf-8", "surrogatepass"))


def to_queries(facts: Iterable[Fact], template: int = 0) -> list[Query]:
    """The query of each fact; see `Fact.to_query`."""
    return [fact.to_query(template) for fact in facts]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """The fields of a line; each is checked when it is read. A missing field or null gives the default."""

    where: str
    fields: Mapping[str, object]

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

    def names(self, field: str) -> tuple[str, ...]:
        """The strings of an array, each once; blank ones are dropped, whole numbers become strings."""
        value = self.fields.get(field)
        items = [value] if isinstance(value, str) else self.array(field)
        for each in items:
            if isinstance(each, bool) or not isinstance(each, (str, int)):
                raise CorpusError(f'{self.where}: field "{field}" holds {json_kind(each)}; expected strings')
        texts = [encodable(str(each), f'{self.where}: field "{field}"') for each in items]
        return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _lines(path: str | os.PathLike[str], what: str) -> Iterator[_Line]:
    source = find_files(os.fspath(path))
    if source.dataset or source.files[0].format != "jsonl":
        raise CorpusError(f"{source.name}: expected {what} as JSON lines: .jsonl, plain, .gz or .zst")
    for file in source.files:
        for number, line in raw_lines(file):
            where = f"{file.name}:{number}"
            yield _Line(where=where, fields=json_object(line, where))


def _fact(line: _Line) -> Fact:
    """The fact of a line in either format; a line without `subject` is one of the release."""
    if "subject" not in line.fields:
        return Fact(
            fact_id=line.name("fact_id"),
            subject=_entity(line, "entity0", "entity0_alias", "entity0_uri"),
            relation=line.text("relation"),
            relation_uri=line.text("predicate_uri", default=""),
            object=_entity(line, "entity1", "entity1_alias", "entity1_uri"),
            prompts=_prompts(line, _RELEASE_PROMPTS),
            gold=line.names("trex_sentences"),
            frequency=line.number("c4_frequency"),
            is_repetition=line.flag("is_repetition"),
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
