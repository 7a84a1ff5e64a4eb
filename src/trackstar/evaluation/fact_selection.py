"""Select facts that can be traced (paper, §4.2 and A.3), and sample them over relations and objects."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from trackstar.corpus.digests import draw_bytes
from trackstar.corpus.matching import content_words, names_entity, words
from trackstar.errors import check_at_least
from trackstar.evaluation.facts import Entity, Fact

EXCLUDED_RELATIONS = frozenset({"P31", "P131", "P361", "P279", "P527"})
"""Relations whose object is ambiguous: instance of, located in, part of, subclass of, has part."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The facts that pass the filters.

    Attributes:
        facts: The facts, in order.
        dropped: Name of a filter to the number of facts that it is the first to drop.
    """

    facts: tuple[Fact, ...]
    dropped: Mapping[str, int]


def usable_facts(
    facts: Sequence[Fact],
    *,
    excluded_relations: Collection[str] = EXCLUDED_RELATIONS,
    needs_gold: bool = True,
) -> Selection:
    """Select the facts whose prompt determines the answer and on which a ranking can be scored.

    The filters are, in this order: `excluded relation`; `several objects`, if the subject, by id or
    by name, has another object in the same relation among the given facts; `repetition`, if one
    entity is named in the other's name or the file marks the fact as such; `no gold example`.

    Args:
        facts: All facts; a dropped fact still counts as another object of its subject.
        excluded_relations: Wikidata ids of relations.
        needs_gold: Whether facts without a gold example are dropped.
    """
    objects: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        for subject in _identities(fact.subject):
            objects[fact.relation_id, subject].add(_identities(fact.object)[0])
    usable: list[Fact] = []
    dropped: Counter[str] = Counter()
    for fact in facts:
        if fact.relation_id in excluded_relations:
            dropped["excluded relation"] += 1
        elif any(len(objects[fact.relation_id, subject]) > 1 for subject in _identities(fact.subject)):
            dropped["several objects"] += 1
        elif is_repetition(fact):
            dropped["repetition"] += 1
        elif needs_gold and not fact.gold:
            dropped["no gold example"] += 1
        else:
            usable.append(fact)
    return Selection(facts=tuple(usable), dropped=dict(dropped))


def is_repetition(fact: Fact) -> bool:
    """Whether the prompt contains its answer: an entity is named in the other's name, or the file says so."""
    if fact.is_repetition is not None:
        return fact.is_repetition
    return names_entity(fact.subject.name, [fact.object.name]) or names_entity(fact.object.name, [fact.subject.name])


def balanced_sample(
    facts: Sequence[Fact], *, per_relation: int = 100, per_object: int = 25, seed: int = 0
) -> tuple[Fact, ...]:
    """Draw facts at random, at most `per_relation` per relation and `per_object` per relation and object.

    Facts are visited in an order that depends on the seed and their ids only, and taken unless a
    limit is reached. The sample does not depend on the order of `facts`.

    Args:
        facts: The facts to draw from.
        per_relation: Most facts per relation; 100 in the paper.
        per_object: Most facts per relation and object; 25 in the paper.
        seed: Seed of the order.

    Returns:
        The sample, in the order of `facts`.

    Raises:
        OptionError: A limit is below 1.
    """
    check_at_least("per_relation", per_relation)
    check_at_least("per_object", per_object)
    of_relation: Counter[str] = Counter()
    of_object: Counter[tuple[str, str]] = Counter()
    taken: set[str] = set()
    for fact in sorted(facts, key=lambda fact: _draw(seed, fact.fact_id)):
        pair = (fact.relation_id, _identities(fact.object)[0])
        if of_relation[fact.relation_id] < per_relation and of_object[pair] < per_object:
            of_relation[fact.relation_id] += 1
            of_object[pair] += 1
            taken.add(fact.fact_id)
    return tuple(fact for fact in facts if fact.fact_id in taken)


def _identities(entity: Entity) -> tuple[str, ...]:
    """Keys of an entity: its URI, if it has one, and its name. Entities with a common key are the same."""
    name = " ".join(content_words(entity.name) or words(entity.name)) or entity.name
    return (f"uri {entity.uri}", f"name {name}") if entity.uri else (f"name {name}",)


def _draw(seed: int, fact_id: str) -> bytes:
    return draw_bytes(fact_id.encode("utf-8", "surrogatepass"), key=f"trackstar facts {seed}")
