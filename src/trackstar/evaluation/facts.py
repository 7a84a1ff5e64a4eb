"""Facts to trace: subject, relation, object, prompts, and the examples known to state them (paper, §4.2);
and questions of other tasks (Appendix A.5).

`fact_files.py` reads them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trackstar.choices import Kind
from trackstar.corpus import Query
from trackstar.corpus.digests import digest_of_bytes
from trackstar.errors import CorpusError, OptionError
from trackstar.text import one_line

_NOT_RANKED = ("kind", "alternatives", "generations", "confidence")
RELEASE_PROMPTS = ("prompt0", "prompt1", "prompt2")
"""The release's fields of prompts, the main one first."""


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
    """A fact to trace, or a question of another kind, which has no subject and need not have gold examples.

    Attributes:
        fact_id: Its id.
        subject: Its subject; `entity0` in the release.
        relation: Name of the relation; in the release, its template. Of another question, its task.
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
        kind: What it asks for.
        alternatives: The other completions of a choice.
        generations: The model's sampled answers (`8b_generations`), as `trackstar generate` adds them.
        confidence: The share of them that are right (`8b_confidence`); None if the file does not say.
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
    kind: Kind = "fact"
    alternatives: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()
    confidence: float | None = None

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
            query_id=self.fact_id, prompt=self.prompts[template], completion=self.object.name,
            record=self.to_release(), kind=self.kind, alternatives=self.alternatives,
        )  # fmt: skip

    def to_release(self) -> dict[str, Any]:
        """The fact as a line of the public release; attributes without a field in it are left out."""
        record: dict[str, Any] = {}
        if self.generations:
            record["8b_generations"] = list(self.generations)
        if self.confidence is not None:
            record["8b_confidence"] = self.confidence
        if self.kind != "fact":
            return record | {"relation": self.relation} | ({"trex_sentences": list(self.gold)} if self.gold else {})
        record |= {
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
        return record | dict(zip(RELEASE_PROMPTS, self.prompts, strict=False))


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


def evidence(facts: Sequence[Fact], row_of: Mapping[str, int], *, strict: bool = False) -> Evidence:
    """Rows of each fact's correct examples, and of the examples to leave out.

    Args:
        facts: The facts, in the order of the queries.
        row_of: Example id to row; see `Pool.row_of`.
        strict: Whether only `gold_strict` examples are correct; the other gold examples then count
            as wrong.

    Raises:
        CorpusError: A fact has no correct example, or it or another question has one that is not in
            the pool; the message names fact and example. Examples to leave out may be missing.
    """
    gold, left_out = [], []
    for fact in facts:
        correct = fact.gold_strict if strict and fact.kind == "fact" else fact.gold
        if not correct and fact.kind == "fact":
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
    """Digest of all that rankings depend on: the attributes of a fact without the model's answers."""
    names = [field.name for field in dataclasses.fields(fact) if field.name not in _NOT_RANKED]
    values = dataclasses.astuple(fact)
    ranked = tuple(value for field, value in zip(dataclasses.fields(fact), values, strict=True) if field.name in names)
    if fact.kind != "fact":
        ranked = (*ranked, fact.kind, fact.alternatives)
    return digest_of_bytes(repr(ranked).encode("utf-8", "surrogatepass"))


def to_queries(facts: Iterable[Fact], template: int = 0) -> list[Query]:
    """The query of each fact; see `Fact.to_query`."""
    return [fact.to_query(template) for fact in facts]
