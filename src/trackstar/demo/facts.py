"""The demo's corpus and training settings: real facts, sentences that state them, and questions."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from trackstar.corpus import Example, Query
from trackstar.corpus.digests import draw_bytes
from trackstar.demo.sentences import OTHER_FORMS, QUESTION_FORMS, distractors, filled
from trackstar.demo.world import World, read_world
from trackstar.pretraining import PretrainingConfig

DEMO_PRETRAINING = PretrainingConfig(
    width=128,
    layers=8,
    heads=4,
    mlp_width=512,
    context_tokens=64,
    vocabulary=2048,
    base_learning_rate=0.5,
    warmup_steps=120,
    steps=450,
    batch_tokens=1024,
    checkpoint_steps=225,
)
"""A model of 2.4 million parameters, trained for about a minute on two cores.

Adafactor's relative step is 0.046 for 120 steps and then falls to 0.024, several times the paper's,
because the run is short. The model then knows most facts, but fewer of those stated once or twice.
"""

QUESTION_FORM_SHARE = 1 / 3
"""Share of each relation's facts that the corpus also states in the words of their question."""

_FACTS_OF_A_RELATION = 48
_SENTENCES_OF_A_FACT = (10, 8, 7, 6, 5, 4, 4, 3, 2, 1)
"""Statements per fact: for the tenth of facts with the most inhabitants, the next tenth, and so on."""
_DISTRACTORS_OF_A_KIND = 36


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A fact whose answer is unique.

    Attributes:
        fact_id: Name of the fact, such as `capital-FR`.
        relation: A key of `QUESTION_FORMS`.
        entity: Subject of the question, such as `Netherlands`.
        mention: The entity within a sentence, such as `the Netherlands`.
        answer: Completion of the question.
    """

    fact_id: str
    relation: str
    entity: str
    mention: str
    answer: str

    def stated_by(self, sentence: str) -> bool:
        """Whether a sentence names entity and answer; in this corpus it then states the fact."""
        return names(sentence, self.entity) and names(sentence, self.answer, exact=self.relation == "chemical symbol")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoCorpus:
    """Training examples of the demo's model, and queries to it.

    Attributes:
        sentences: The training examples: sentences that state facts, and distractors, in random order.
        queries: One question per fact.
        gold: The names of the sentences that state the fact, by query.
    """

    sentences: tuple[Example, ...]
    queries: tuple[Query, ...]
    gold: Mapping[str, tuple[str, ...]]


def demo_corpus(seed: int) -> DemoCorpus:
    """Return the corpus; a seed gives the same sentences in the same order on every machine.

    Raises:
        OptionError: The data packages of the extra `demo` are not installed.
    """
    world = read_world()
    facts = counted_facts(world, seed)
    verbatim = _stated_as_question(facts, seed)
    stating = {fact.fact_id: _statements(fact, count, seed, fact in verbatim) for fact, count in facts.items()}
    texts = {f"{name}-{number}": text for name, written in stating.items() for number, text in enumerate(written)}
    texts |= _chosen_distractors(world, list(facts), seed)
    order = sorted(texts, key=lambda name: draw(seed, "order", name))
    gold = {name: tuple(f"{name}-{number}" for number in range(len(written))) for name, written in stating.items()}
    return DemoCorpus(
        sentences=tuple(Example(example_id=name, text=texts[name], record=n) for n, name in enumerate(order)),
        queries=tuple(_query(fact, gold[fact.fact_id]) for fact in facts),
        gold=gold,
    )


def counted_facts(world: World, seed: int) -> dict[Fact, int]:
    """Facts and the number of their statements; places with more inhabitants have more statements."""
    counts: dict[Fact, int] = {}
    for relation in QUESTION_FORMS:
        facts = list(clear_facts(world, relation))
        chosen = set(sorted(facts, key=lambda fact: draw(fact.fact_id))[:_FACTS_OF_A_RELATION])
        facts = [fact for fact in facts if fact in chosen]
        if relation in ("chemical symbol", "atomic number"):
            facts.sort(key=lambda fact: draw(seed, "often", fact.fact_id))
        for place, fact in enumerate(facts):
            counts[fact] = _SENTENCES_OF_A_FACT[place * len(_SENTENCES_OF_A_FACT) // len(facts)]
    return counts


def clear_facts(world: World, relation: str) -> Iterator[Fact]:
    """Every fact of a relation with a certain answer; countries and cities by falling population."""
    rows: list[tuple[str, str, str, str | None]]
    if relation == "country":
        rows = [(city.name, city.name, city.name, city.country.mention) for city in world.cities]
    elif relation == "chemical symbol":
        rows = [(element.symbol, element.name, element.name, element.symbol) for element in world.elements]
    elif relation == "atomic number":
        # Hydrogen is left out: the sentences say "protons".
        rows = [(one.symbol, one.name, one.name, str(one.number)) for one in world.elements if one.number > 1]
    else:
        field = "language" if relation == "official language" else relation
        rows = [(one.code, one.name, one.mention, getattr(one, field)) for one in world.countries]
    for code, entity, mention, answer in rows:
        # Otherwise every sentence about Sierra Leone would name its currency, the leone.
        if answer is not None and not names(entity, answer):
            name = f"{relation}-{code}".replace(" ", "-")
            yield Fact(fact_id=name, relation=relation, entity=entity, mention=mention, answer=answer)


def _stated_as_question(facts: Iterable[Fact], seed: int) -> set[Fact]:
    """Facts that the corpus also states in the words of their question, the same share per relation."""
    chosen: set[Fact] = set()
    for relation in QUESTION_FORMS:
        drawn = sorted(
            (fact for fact in facts if fact.relation == relation), key=lambda fact: draw(seed, "question", fact.fact_id)
        )
        chosen |= set(drawn[: round(QUESTION_FORM_SHARE * len(drawn))])
    return chosen


def _statements(fact: Fact, count: int, seed: int, verbatim: bool) -> list[str]:
    forms = sorted(OTHER_FORMS[fact.relation], key=lambda form: draw(seed, "form", fact.fact_id, form))
    if verbatim:
        forms.insert(0, QUESTION_FORMS[fact.relation])
    return [filled(form, entity=fact.mention, answer=fact.answer) for form in forms[:count]]


def _query(fact: Fact, gold: tuple[str, ...]) -> Query:
    before, _, _ = QUESTION_FORMS[fact.relation].partition("{answer}")
    prompt = filled(before.rstrip(), entity=fact.mention)
    record = {
        "fact_id": fact.fact_id,
        "entity0": fact.entity,
        "relation": fact.relation,
        "entity1": fact.answer,
        "prompt0": prompt,
        "trex_sentences": list(gold),
    }
    return Query(query_id=fact.fact_id, prompt=prompt, completion=fact.answer, record=record)


def _chosen_distractors(world: World, facts: Sequence[Fact], seed: int) -> dict[str, str]:
    """At most a fixed number of distractors per kind, none of which states a fact."""
    # Two pairs of countries whose currencies have the same names give the same sentence; one is enough.
    written = {text: name for name, text in distractors(world)}
    chosen: dict[str, str] = {}
    of_kind: dict[str, int] = {}
    for text, name in sorted(written.items(), key=lambda item: draw(seed, "distractor", item[1])):
        kind = name.partition("-")[0]
        if of_kind.get(kind, 0) < _DISTRACTORS_OF_A_KIND and not _states_any(text, facts):
            of_kind[kind] = of_kind.get(kind, 0) + 1
            chosen[name] = text
    return chosen


def _states_any(text: str, facts: Sequence[Fact]) -> bool:
    plain = text.casefold()
    # Substring search is faster than search for whole words and rules out most facts.
    return any(fact.entity.casefold() in plain and fact.stated_by(text) for fact in facts)


def names(sentence: str, name: str, *, exact: bool = False) -> bool:
    """Whether the sentence contains the name as whole words; `exact` also compares capital letters."""
    if not exact:
        sentence, name = sentence.casefold(), name.casefold()
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", sentence) is not None


def draw(*names: object) -> float:
    """A number from 0 to 1 that depends only on the names, so it is the same on every machine."""
    return int.from_bytes(draw_bytes("\n".join(map(str, names)).encode(), bits=64), "big") / 2**64
