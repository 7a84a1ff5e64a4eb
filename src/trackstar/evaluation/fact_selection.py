"""Which facts are worth tracing (paper, §4.2 and A.3), and a sample of them that no relation or answer dominates."""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from trackstar.errors import OptionError
from trackstar.evaluation.facts import Entity, Fact
from trackstar.evaluation.matching import content_words, names_entity, words

EXCLUDED_RELATIONS = frozenset({"P31", "P131", "P361", "P279", "P527"})
"""Relations whose objects a prompt does not determine: instance of, located in, part of, subclass of, has part."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What passed the filters.

    Attributes:
        facts: In their order.
        dropped: How many did not, by the first rule that they broke.
    """

    facts: tuple[Fact, ...]
    dropped: Mapping[str, int]


def usable_facts(
    facts: Sequence[Fact],
    *,
    excluded_relations: Collection[str] = EXCLUDED_RELATIONS,
    needs_gold: bool = True,
) -> Selection:
    """The facts that a prompt determines and a ranking can be scored on.

    Dropped are, in this order: facts of excluded relations (`excluded relation`); facts whose subject, by id or by
    name, has another object in the same relation among the facts given (`several objects`); facts in which the object
    is named in the subject's name or the subject in the object's, or which the file marks as such (`repetition`); and
    facts without a gold example (`no gold example`).

    Args:
        facts: All facts: those dropped for another reason still count as other objects.
        excluded_relations: Wikidata ids of relations.
        needs_gold: Whether facts without a gold example are dropped.
    """
    objects: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        for subject in _identities(fact.subject):
            objects[fact.relation_id, subject].add(_identities(fact.object)[0])
    kept: list[Fact] = []
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
            kept.append(fact)
    return Selection(facts=tuple(kept), dropped=dict(dropped))


def is_repetition(fact: Fact) -> bool:
    """Whether one entity is named in the other's name, or the file says so: the prompt then gives its answer away."""
    if fact.is_repetition is not None:
        return fact.is_repetition
    return names_entity(fact.subject.name, [fact.object.name]) or names_entity(fact.object.name, [fact.subject.name])


def balanced_sample(
    facts: Sequence[Fact], *, per_relation: int = 100, per_object: int = 25, seed: int = 0
) -> tuple[Fact, ...]:
    """Facts at random, at most `per_relation` of a relation and `per_object` of a relation with the same object.

    Facts are taken in an order made from the seed and their names alone, each as long as neither limit is reached:
    the same facts give the same sample in whatever order they come.

    Args:
        facts: What to draw from.
        per_relation: Most facts of a relation; the paper's 100.
        per_object: Most facts of a relation with one object; the paper's 25.
        seed: Of the order.

    Returns:
        The sample, in the order of `facts`.

    Raises:
        OptionError: A limit is below 1.
    """
    if per_relation < 1 or per_object < 1:
        raise OptionError(f"{per_relation} facts a relation, {per_object} an object; expected limits of at least 1")
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
    """What two facts must share to be of one entity: its URI where it has one, else its name; and its name."""
    name = " ".join(content_words(entity.name) or words(entity.name)) or entity.name
    return (f"uri {entity.uri}", f"name {name}") if entity.uri else (f"name {name}",)


def _draw(seed: int, fact_id: str) -> bytes:
    key = f"trackstar facts {seed}".encode()
    return hashlib.blake2b(fact_id.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest()
