"""Facts to trace: subject, relation, object, prompts, and the examples that are known to state them (paper, §4.2).

Read are the JSON lines of the paper's public release and those of T-REx sets that keep more kinds of evidence apart.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trackstar.corpus import Query
from trackstar.corpus.data_files import find_files, one_line, raw_lines
from trackstar.corpus.fields import encodable, json_kind, json_object
from trackstar.errors import CorpusError, OptionError

_SET_PROMPTS = ("prompt", "prompt_no_colon", "prompt_reworded")
_RELEASE_PROMPTS = ("prompt0", "prompt1", "prompt2")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """A subject or an object.

    Attributes:
        name: As prompts and completions name it.
        aliases: Other names of it.
        uri: Its URI or Wikidata id; empty where it has none.
    """

    name: str
    aliases: tuple[str, ...] = ()
    uri: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and then its aliases, each once."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A fact whose training examples are looked for.

    Attributes:
        fact_id: Its name.
        subject: The release's `entity0`.
        relation: The relation's name, or its template in the release.
        relation_uri: The relation's URI or Wikidata id (the release's `predicate_uri`); empty where it has none.
        object: The release's `entity1`: the completion.
        prompts: One a template, the main one first; empty where the fact comes without.
        gold: Names of the examples that state it (the release's `trex_sentences`).
        gold_strict: Those of them that state it plainly; empty where that is not known.
        coref: Examples that state it of a pronoun. With `maybe_gold` they are left out of rankings: neither right
            nor wrong.
        maybe_gold: Examples that name subject and object, but are not known to state it.
        frequency: In how many examples of the model's training data it is, as the file says (the release's
            `c4_frequency`), or None.
        is_repetition: Whether the object is in the subject's name or the other way round, as the file says, or None.
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
        """The last part of the relation's URI, such as `P36`; the relation's name where it has none."""
        return self.relation_uri.rstrip("/").rsplit("/", 1)[-1] or self.relation

    def to_query(self, template: int = 0) -> Query:
        """The query that asks for the object with one of the prompts; its record is the fact in the release's fields.

        Args:
            template: Which prompt, from 0; the paper uses 0, the release's `prompt0`.

        Raises:
            OptionError: There is no such prompt.
        """
        if not 0 <= template < len(self.prompts):
            found = f"prompts 0 to {len(self.prompts) - 1}" if self.prompts else "no prompt"
            raise OptionError(f"fact {self.fact_id}: has {found}, none number {template}; choose another template")
        return Query(
            query_id=self.fact_id, prompt=self.prompts[template], completion=self.object.name, record=self.to_release()
        )

    def to_release(self) -> dict[str, Any]:
        """The fact as a line of the public release, field for field; what the release has no field for is left out."""
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
    """One sentence of the public release's corpus.

    Attributes:
        sentence_id: Its name.
        text: Its text.
        abstract_uri: The abstract that it stands in.
        place: Its place there, from 0 (`sent_idx_in_abst`).
        fact_triples: The facts that it is known to state, as the file has them.
    """

    sentence_id: str
    text: str
    abstract_uri: str
    place: int
    fact_triples: tuple[object, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Each fact's examples as places in a pool, for `gold_ranks`.

    Attributes:
        gold: Those that count as right.
        left_out: Those that count as neither right nor wrong.
    """

    gold: tuple[tuple[int, ...], ...]
    left_out: tuple[tuple[int, ...], ...]


def read_facts(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Fact]:
    """Read facts from JSON lines (.jsonl, .ndjson or .json; plain, .gz or .zst), a folder or a glob of them.

    A line is one of the public release (`fact_id`, `entity0`, `relation`, `entity1`, `entity0_alias`,
    `entity1_alias`, `entity0_uri`, `predicate_uri`, `entity1_uri`, `trex_sentences`, `c4_frequency`,
    `is_repetition`, `prompt0`, `prompt1`, `prompt2`), or of a T-REx set (`fact_id`, `subject`, `subject_id`,
    `subject_aliases`, `relation`, `relation_id`, `object`, `object_id`, `object_aliases`, `gold`, `gold_strict`,
    `coref`, `maybe_gold`, `prompt`, `prompt_no_colon`, `prompt_reworded`, `completion`). Needed are the name, both
    entities and the relation; other fields may be missing or null.

    Args:
        path: Where they are.
        limit: Most facts that are read; None reads all.

    Raises:
        CorpusError: A line is not a fact or names one that another line names, or there is none; the message names
            file and line.
        OptionError: `limit` is below 1.
    """
    _check_limit(limit)
    facts: list[Fact] = []
    seen: dict[str, str] = {}
    for line in itertools.islice(_lines(path, "facts"), limit):
        fact = _fact(line)
        if fact.fact_id in seen:
            raise CorpusError(
                f'{line.where}: fact "{one_line(fact.fact_id)}" is also at {seen[fact.fact_id]}; name each once'
            )
        seen[fact.fact_id] = line.where
        facts.append(fact)
    if not facts:
        raise CorpusError(f"{os.fspath(path)}: holds no fact; expected at least one line that is not blank")
    return facts


def read_sentences(path: str | os.PathLike[str], *, limit: int | None = None) -> Iterator[Sentence]:
    """Read the public release's sentences with what it says of them, one at a time; `open_corpus` reads them as text.

    Raises:
        CorpusError: A line is not a sentence; the message names file and line.
        OptionError: `limit` is below 1.
    """
    _check_limit(limit)
    for line in itertools.islice(_lines(path, "sentences"), limit):
        yield Sentence(
            sentence_id=line.name("sentence_id"),
            text=line.text("text"),
            abstract_uri=line.text("abstract_uri", default=""),
            place=line.number("sent_idx_in_abst") or 0,
            fact_triples=tuple(line.array("fact_triples")),
        )


def evidence(facts: Sequence[Fact], row_of: Mapping[str, int], *, strict: bool = False) -> Evidence:
    """Each fact's right examples, and those to leave out, as places in a pool.

    Args:
        facts: The queries' facts, in the queries' order.
        row_of: Each candidate's place by name; see `Pool.row_of`.
        strict: Whether only `gold_strict` examples are right; the other gold ones then count as wrong.

    Raises:
        CorpusError: A fact has no right example, or one that is not in the pool; the message names both. Examples to
            leave out may be missing.
    """
    gold, left_out = [], []
    for fact in facts:
        right = fact.gold_strict if strict else fact.gold
        if not right:
            raise CorpusError(
                f"fact {one_line(fact.fact_id)}: has no {'strict ' if strict else ''}gold example; leave it out"
            )
        if missing := [example_id for example_id in right if example_id not in row_of]:
            raise CorpusError(
                f"fact {one_line(fact.fact_id)}: its gold example {one_line(missing[0])} is not in the pool; expected "
                "all of them there"
            )
        gold.append(tuple(row_of[example_id] for example_id in right))
        beside = dict.fromkeys((*fact.coref, *fact.maybe_gold))
        left_out.append(tuple(row_of[name] for name in beside if name in row_of and name not in fact.gold))
    return Evidence(gold=tuple(gold), left_out=tuple(left_out))


def fact_digest(fact: Fact) -> str:
    """A digest of all that a fact says: names, prompts, gold examples."""
    return hashlib.blake2b(repr(dataclasses.astuple(fact)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def to_queries(facts: Iterable[Fact], template: int = 0) -> list[Query]:
    """Every fact's query; see `Fact.to_query`."""
    return [fact.to_query(template) for fact in facts]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One line's fields, each checked when it is read; a field that is missing or null gives the default."""

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
        """Strings, each once, without blank ones; whole numbers become strings, and one string is an array of one."""
        value = self.fields.get(field)
        found = [value] if isinstance(value, str) else self.array(field)
        for each in found:
            if isinstance(each, bool) or not isinstance(each, (str, int)):
                raise CorpusError(f'{self.where}: field "{field}" holds {json_kind(each)}; expected strings')
        texts = [encodable(str(each), f'{self.where}: field "{field}"') for each in found]
        return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _lines(path: str | os.PathLike[str], what: str) -> Iterator[_Line]:
    place = find_files(os.fspath(path))
    if place.dataset or place.files[0].format != "jsonl":
        raise CorpusError(f"{place.name}: not JSON lines; {what} are read from .jsonl (plain, .gz or .zst)")
    for file in place.files:
        for number, line in raw_lines(file):
            where = f"{file.name}:{number}"
            yield _Line(where=where, fields=json_object(line, where))


def _fact(line: _Line) -> Fact:
    """A fact of either format; a line without `subject` is one of the release."""
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
    answer = line.text("completion", default=line.text("object"))
    thing = _entity(line, "object", "object_aliases", "object_id")
    return Fact(
        fact_id=line.name("fact_id"),
        subject=_entity(line, "subject", "subject_aliases", "subject_id"),
        relation=line.text("relation"),
        relation_uri=line.text("relation_id", default=""),
        object=thing if answer == thing.name else Entity(name=answer, aliases=thing.names, uri=thing.uri),
        prompts=_prompts(line, _SET_PROMPTS),
        gold=line.names("gold"),
        gold_strict=line.names("gold_strict"),
        coref=line.names("coref"),
        maybe_gold=line.names("maybe_gold"),
        is_repetition=line.flag("answer_in_subject"),
    )


def _entity(line: _Line, name: str, aliases: str, uri: str) -> Entity:
    own = line.text(name)
    others = tuple(alias for alias in line.names(aliases) if alias != own)
    return Entity(name=own, aliases=others, uri=line.text(uri, default=""))


def _prompts(line: _Line, fields: Sequence[str]) -> tuple[str, ...]:
    """The prompts that the line has; none may be missing before one that is there."""
    there = [field for field in fields if line.fields.get(field) is not None]
    if there != list(fields[: len(there)]):
        missing = next(field for field in fields if field not in there)
        raise CorpusError(f'{line.where}: no field "{missing}"; found {", ".join(there)}; expected those before too')
    return tuple(line.text(field) for field in there)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise OptionError(f"--limit {limit}: expected at least 1")
