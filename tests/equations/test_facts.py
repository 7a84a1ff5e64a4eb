"""Facts: reading both formats, matching in texts, counting in a corpus, filters, samples; categories."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trackstar.corpus import Example
from trackstar.corpus.matching import answer_is_correct, content_words, names_entity, shares_word
from trackstar.errors import CorpusError, OptionError, TrackstarError
from trackstar.evaluation.categories import CATEGORIES, category_shares, proponent_category
from trackstar.evaluation.fact_files import read_facts, read_sentences
from trackstar.evaluation.fact_selection import balanced_sample, is_repetition, usable_facts
from trackstar.evaluation.facts import Entity, Evidence, Fact, evidence, to_queries
from trackstar.evaluation.frequency import bucket_name, fact_frequencies, frequency_bucket

RELEASE: Mapping[str, Any] = {
    "fact_id": "f1",
    "entity0": "Nicolás Guillén",
    "relation": "place of birth",
    "entity1": "Camagüey",
    "entity0_alias": ["Guillén"],
    "entity1_alias": ["Puerto Príncipe", "Camagüey"],
    "entity0_uri": "http://www.wikidata.org/entity/Q1",
    "predicate_uri": "http://www.wikidata.org/prop/direct/P19",
    "entity1_uri": "http://www.wikidata.org/entity/Q2",
    "trex_sentences": ["s7", "s9"],
    "c4_frequency": 12,
    "is_repetition": False,
    "prompt0": "Nicolás Guillén was born in the following place:",
    "prompt1": "Nicolás Guillén was born in",
    "prompt2": "The place where Nicolás Guillén was born is",
}
TREX: Mapping[str, Any] = {
    "fact_id": "P20:Q1:Q2",
    "subject": "Richard Wagner",
    "subject_id": "Q1",
    "subject_aliases": ["Wagner"],
    "relation_id": "P20",
    "relation": "place of death",
    "object": "Venice",
    "object_id": "Q2",
    "object_aliases": ["Venezia"],
    "gold": ["s1", "s2"],
    "gold_strict": ["s2"],
    "coref": ["s3"],
    "origin": "lama",
    "answer_in_subject": False,
    "query_id": "P20:Q1:Q2",
    "prompt": "Richard Wagner died in the following place:",
    "prompt_no_colon": "Richard Wagner died in",
    "prompt_reworded": "The place where Richard Wagner died is",
    "completion": "Venice",
    "maybe_gold": ["s4", "s5"],
}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def raised(run: Callable[[], object], kind: type[TrackstarError] = CorpusError) -> str:
    with pytest.raises(kind) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def fact(
    fact_id: str = "f",
    subject: str = "Paris",
    target: str = "France",
    *,
    relation: str = "P17",
    subject_aliases: Sequence[str] = (),
    target_aliases: Sequence[str] = (),
    subject_uri: str = "",
    gold: Sequence[str] = ("s0",),
    **fields: Any,
) -> Fact:
    return Fact(
        fact_id=fact_id,
        subject=Entity(name=subject, aliases=tuple(subject_aliases), uri=subject_uri),
        relation=relation,
        relation_uri=relation,
        object=Entity(name=target, aliases=tuple(target_aliases)),
        gold=tuple(gold),
        **fields,
    )


# Reading


def test_release_is_read_and_written_field_for_field(tmp_path: Path) -> None:
    (found,) = read_facts(written(tmp_path, RELEASE))
    assert found.subject == Entity(name="Nicolás Guillén", aliases=("Guillén",), uri=RELEASE["entity0_uri"])
    assert found.object.names == ("Camagüey", "Puerto Príncipe")
    assert (found.relation_id, found.frequency, found.is_repetition) == ("P19", 12, False)
    assert found.to_release() == {**RELEASE, "entity1_alias": ["Puerto Príncipe"]}
    assert list(found.to_release()) == list(RELEASE)


def test_trex_set_is_read_with_all_kinds_of_evidence(tmp_path: Path) -> None:
    (found,) = read_facts(written(tmp_path, TREX))
    assert (found.gold, found.gold_strict, found.coref, found.maybe_gold) == (
        ("s1", "s2"),
        ("s2",),
        ("s3",),
        ("s4", "s5"),
    )
    assert found.prompts == (TREX["prompt"], TREX["prompt_no_colon"], TREX["prompt_reworded"])
    assert (found.relation_id, found.relation, found.is_repetition) == ("P20", "place of death", False)
    assert found.subject == Entity(name="Richard Wagner", aliases=("Wagner",), uri="Q1")
    other = read_facts(written(tmp_path, {**TREX, "completion": "La Serenissima"}))[0].object
    assert other.names == ("La Serenissima", "Venice", "Venezia")


def test_query_has_the_chosen_prompt_and_the_releases_fields(tmp_path: Path) -> None:
    facts = read_facts(written(tmp_path, RELEASE, TREX))
    first, second = to_queries(facts)
    assert (first.query_id, first.prompt, first.completion) == ("f1", RELEASE["prompt0"], "Camagüey")
    assert (second.query_id, second.prompt, second.completion) == ("P20:Q1:Q2", TREX["prompt"], "Venice")
    assert second.record["predicate_uri"] == "P20"
    assert [query.prompt for query in to_queries(facts, 2)] == [RELEASE["prompt2"], TREX["prompt_reworded"]]
    message = raised(lambda: facts[0].to_query(3), OptionError)
    assert message == "`template`: fact f1 has prompts 0 to 2, found 3; choose another"
    assert "has no prompt, found 0" in raised(lambda: fact().to_query(), OptionError)


def test_optional_fields_may_be_missing_null_or_one_string(tmp_path: Path) -> None:
    line = {"fact_id": 7, "entity0": "a", "relation": "r", "entity1": "b", "entity0_alias": "c", "trex_sentences": [3]}
    (found,) = read_facts(written(tmp_path, {**line, "entity1_alias": None, "prompt0": None, "c4_frequency": 2.0}))
    assert found == Fact(
        fact_id="7",
        subject=Entity(name="a", aliases=("c",)),
        relation="r",
        relation_uri="",
        object=Entity(name="b"),
        gold=("3",),
        frequency=2,
    )
    assert found.relation_id == "r"
    assert "c4_frequency" in found.to_release()
    assert "is_repetition" not in found.to_release()


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = written(tmp_path, RELEASE, "broken")
    assert len(read_facts(path, limit=1)) == 1
    assert raised(lambda: read_facts(path, limit=0), OptionError) == "`limit`: expected 1 or more, found 0"


def changed(line: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {**line, **fields}


def without(line: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in fields}


BAD_LINES: list[tuple[object, str]] = [
    (RELEASE, '{}:2: fact "f1" is also at {}:1; expected each id once'),
    ([1], "{}:2: found an array, expected one JSON object per line"),
    (without(RELEASE, "entity0"), '{}:2: no field "entity0"; found fact_id, relation, entity1, '),
    (without(RELEASE, "fact_id"), '{}:2: no field "fact_id"; found entity0, '),
    (changed(RELEASE, fact_id="f2", entity1=" "), '{}:2: field "entity1" is empty; expected a string'),
    (changed(RELEASE, fact_id="f2", relation=None), '{}:2: field "relation" is null; expected a string'),
    (changed(RELEASE, fact_id=True), '{}:2: field "fact_id" is a boolean; expected a string'),
    (changed(RELEASE, fact_id="f2", entity0_alias={}), '{}:2: field "entity0_alias" is an object; expected an array'),
    (changed(RELEASE, fact_id="f2", entity0_alias=[None]), '{}:2: field "entity0_alias" holds null; expected strings'),
    (
        changed(RELEASE, fact_id="f2", c4_frequency=-1),
        '{}:2: field "c4_frequency" is -1; expected a whole number from 0',
    ),
    (
        changed(RELEASE, fact_id="f2", c4_frequency="many"),
        '{}:2: field "c4_frequency" is many; expected a whole number',
    ),
    (
        changed(RELEASE, fact_id="f2", is_repetition=0),
        '{}:2: field "is_repetition" is a number; expected true or false',
    ),
    (
        changed(RELEASE, fact_id="f2", prompt0=None),
        '{}:2: no field "prompt0"; found prompt1, prompt2; expected all before',
    ),
    (changed(RELEASE, fact_id="f2", prompt1=3), '{}:2: field "prompt1" is a number; expected a string'),
    (changed(RELEASE, fact_id="\ud800"), '{}:2: field "fact_id" holds half a surrogate pair (U+D800 at character 0)'),
    (changed(TREX, gold="s1", coref=3), '{}:2: field "coref" is a number; expected an array'),
    (without(TREX, "object"), '{}:2: no field "object"; found fact_id, subject, '),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[str(n) for n in range(len(BAD_LINES))])
def test_bad_fact_is_one_line_that_names_file_and_line(line: object, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, RELEASE, line)
    assert raised(lambda: read_facts(path)).startswith(message.replace("{}", str(path)))


def test_file_without_facts_is_one_line(tmp_path: Path) -> None:
    assert raised(lambda: read_facts(written(tmp_path))).endswith(
        "facts.jsonl: holds no fact; expected at least one line that is not blank"
    )
    (tmp_path / "facts.txt").write_text("text")
    assert raised(lambda: read_facts(tmp_path / "facts.txt")).endswith(
        "facts.txt: expected facts as JSON lines: .jsonl, plain, .gz or .zst"
    )


def test_sentences_of_the_release_are_read(tmp_path: Path) -> None:
    line = {"sentence_id": "s1", "text": "A.", "abstract_uri": "u", "sent_idx_in_abst": 2, "fact_triples": [["a", "b"]]}
    first, second = read_sentences(written(tmp_path, line, {"sentence_id": 2, "text": "B."}))
    assert (first.sentence_id, first.abstract_uri, first.place, first.fact_triples) == ("s1", "u", 2, (["a", "b"],))
    assert (second.sentence_id, second.text, second.place, second.fact_triples) == ("2", "B.", 0, ())
    path = written(tmp_path, line, {"sentence_id": "s2", "text": None})
    assert raised(lambda: list(read_sentences(path))) == f'{path}:2: field "text" is null; expected a string'


def test_evidence_is_rows_of_the_pool(tmp_path: Path) -> None:
    facts = read_facts(written(tmp_path, TREX))
    row_of = {name: row for row, name in enumerate(("s0", "s4", "s2", "s1", "s3"))}  # s5 is not in the pool
    assert evidence(facts, row_of) == Evidence(gold=((3, 2),), left_out=((4, 1),))
    assert evidence(facts, row_of, strict=True) == Evidence(gold=((2,),), left_out=((4, 1),))
    message = raised(lambda: evidence(facts, {"s1": 0}))
    assert message == "fact P20:Q1:Q2: gold example s2 is not in the pool; expected all gold examples there"
    assert raised(lambda: evidence([fact()], row_of, strict=True)) == "fact f: has no strict gold example; leave it out"


# Matching


def test_text_becomes_its_words_without_case_stop_words_and_punctuation() -> None:
    assert content_words("The U.S. -- and  Jean-Luc's_film, №5") == ("u", "s", "jean", "luc", "s", "film", "no5")
    assert content_words("ÉCOLE ﬁn") == ("école", "fin")
    assert content_words("It is the") == ()


@pytest.mark.parametrize(
    ("answer", "completion", "aliases", "correct"),
    [
        ("Paris", "Paris", (), True),
        ("paris, the capital and largest city", "Paris", (), True),
        ("The United States of America", "united states", (), True),
        ("Parisian", "Paris", (), False),
        ("the city of Paris", "Paris", (), False),
        ("New York", "New York City", (), False),
        ("New York City", "New York", (), True),
        ("NYC.", "New York City", ("NYC", "Big Apple"), True),
        ("the Big\nApple", "New York City", ("NYC", "Big Apple"), True),
        ("", "Paris", ("Lutetia",), False),
        ("It was", "It", (), True),
        ("This", "It", (), False),
        ("anything", "?!", ("",), False),
        ("+ and -", "+", (), True),
        ("12, or 13", "12", (), True),
        ("12.5kg", "12", (), False),
        ("12.5kg", "12.5", (), True),
        ("1,000km", "1000", (), True),
        ("1,0000", "1", (), False),
        ("$1,000.0", "1000", (), True),
        (".5", "0.5", (), True),
        ("-3", "3", (), False),
        ("1990s", "1990", (), False),
        ("3/4", "3", (), False),
        ("= 7", "7", (), True),
    ],
)
def test_answer_is_correct_when_it_begins_with_a_name(
    answer: str, completion: str, aliases: tuple[str, ...], correct: bool
) -> None:
    assert answer_is_correct(answer, completion, aliases) is correct


@pytest.mark.parametrize(
    ("text", "names", "named"),
    [
        ("He moved to New York.", ["New York"], True),
        ("He moved to NEW-YORK's port.", ["new york"], True),
        ("New ideas in York", ["New York"], False),
        ("Yorkshire, not York", ["Yorkshir"], False),
        ("the University of Oxford", ["University Oxford"], True),  # stop words are in neither
        ("at Oxford University", ["University of Oxford"], False),
        ("at Oxford University", ["University of Oxford", "Oxford University"], True),
        ("", ["Oxford"], False),
        ("anything", [], False),
        ("They read It twice.", ["It"], True),
        ("They read them twice.", ["It"], False),
        ("By the way", ["The Way"], True),
        ("10,000 people", ["000"], True),
        ("anything", ["..."], False),
    ],
)
def test_entity_is_named_by_whole_words(text: str, names: list[str], named: bool) -> None:
    assert names_entity(text, names) is named


def test_shared_word_is_any_but_a_stop_word() -> None:
    assert shares_word("a university in France", ["University of Oxford"])
    assert not shares_word("a school of France", ["University of Oxford"])
    assert shares_word("oxford shoes", ["University", "Oxford"])
    assert not shares_word("it is", ["It"])


# Frequency


CORPUS = (
    "Paris is in France.",
    "PARIS, France",
    "Paris has a river, and the City of Light has lamps.",
    "The French read of the city of light in FRANCE.",
    "Parisian France",
    "They saw It in Hollywood.",
    "They saw them in Hollywood.",
)


def examples(texts: Sequence[str]) -> list[Example]:
    return [Example(example_id=str(n), text=text, record=n) for n, text in enumerate(texts)]


def test_frequency_counts_examples_that_name_subject_and_object() -> None:
    facts = [
        fact("a", "Paris", "France"),
        fact("b", "Paris", "France", subject_aliases=["City of Light"], target_aliases=["French"]),
        fact("c", "It", "Hollywood"),
        fact("d", "France", "Paris"),
        fact("e", "Paris", "Paris"),
        fact("f", "Rome", "Italy"),
        fact("g", "...", "France"),
    ]
    assert fact_frequencies(facts, examples(CORPUS)).tolist() == [2, 3, 1, 2, 3, 0, 0]
    assert fact_frequencies(facts, iter(examples(CORPUS * 2))).tolist() == [4, 6, 2, 4, 6, 0, 0]
    assert fact_frequencies(facts, []).tolist() == [0] * 7
    assert fact_frequencies([], examples(CORPUS)).tolist() == []


def test_frequency_equals_a_search_for_each_name_in_each_text() -> None:
    generator = np.random.default_rng(0)
    vocabulary = ["ab", "b", "the", "abc", "of", "c", "A", "b-c", "It's"]

    def phrase(longest: int) -> str:
        return " ".join(generator.choice(vocabulary, size=int(generator.integers(1, longest))))

    facts = [
        fact(str(n), phrase(4), phrase(4), subject_aliases=[phrase(3)], target_aliases=[phrase(3)]) for n in range(60)
    ]
    texts = [phrase(12) for _ in range(80)]
    expected = [
        sum(names_entity(text, each.subject.names) and names_entity(text, each.object.names) for text in texts)
        for each in facts
    ]
    assert fact_frequencies(facts, examples(texts), progress=False).tolist() == expected
    assert max(expected) > 5


def test_buckets_are_powers_of_ten() -> None:
    edges = [0, 1, 9, 10, 99, 100, 999, 1000, 9999, 10_000, 10**9]
    assert [frequency_bucket(edge) for edge in edges] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    names = ["0", "1-9", "10-99", "100-999", "1,000-9,999", "10,000+"]
    assert [bucket_name(bucket) for bucket in range(6)] == names
    assert raised(lambda: frequency_bucket(-1), OptionError) == "`frequency`: expected 0 or more, found -1"
    assert raised(lambda: bucket_name(6), OptionError) == "`bucket`: expected 0 to 5, found 6"


# Filters and sampling


def test_each_fact_is_dropped_by_the_first_filter_that_applies() -> None:
    facts = [
        fact("kept", "Ada", "mathematician", relation="P106"),
        fact("part of", "Ada", "England", relation="P361", gold=[]),
        fact("first of two", "Bob", "painter", relation="P106"),
        fact("second of two", "bob!", "poet", relation="P106", gold=[]),
        fact("other relation", "Bob", "poet", relation="P101"),
        fact("by id", "Carl", "poet", relation="P106", subject_uri="Q1"),
        fact("by id, other name", "Karl", "painter", relation="P106", subject_uri="Q1"),
        fact("same name, other id, same object", "Ada", "Mathematician", relation="P106", subject_uri="Q2"),
        fact("in the subject", "University of Oxford", "Oxford", relation="P276"),
        fact("in the object", "Chad", "flag of Chad", relation="P163"),
        fact("marked", "Dora", "doctor", relation="P106", is_repetition=True),
        fact("marked as none", "doctor Dora", "doctor", relation="P106", is_repetition=False),
        fact("no gold", "Emil", "doctor", relation="P106", gold=[]),
    ]
    found = usable_facts(facts)
    names = [each.fact_id for each in found.facts]
    assert names == ["kept", "other relation", "same name, other id, same object", "marked as none"]
    assert found.dropped == {"excluded relation": 1, "several objects": 4, "repetition": 3, "no gold example": 1}
    assert [each.fact_id for each in usable_facts(facts, needs_gold=False).facts][-1] == "no gold"
    everything = usable_facts(facts, excluded_relations=(), needs_gold=False)
    assert "part of" in [each.fact_id for each in everything.facts]
    assert not is_repetition(fact("f", "Oxfordshire", "Oxford"))


def test_balanced_sample_reaches_and_respects_both_limits() -> None:
    facts = [
        fact(f"{relation}-{target}-{n}", f"S{n}", target, relation=relation)
        for relation, targets in (("P1", ("a", "b")), ("P2", ("a",)), ("P3", ("c", "d", "e")))
        for target in targets
        for n in range(8)
    ]
    found = balanced_sample(facts, per_relation=7, per_object=3, seed=1)
    assert Counter(each.relation_id for each in found) == {"P1": 6, "P2": 3, "P3": 7}
    assert max(Counter((each.relation_id, each.object.name) for each in found).values()) == 3
    places = [facts.index(each) for each in found]
    assert places == sorted(places)
    backwards = balanced_sample(facts[::-1], per_relation=7, per_object=3, seed=1)
    assert sorted(backwards, key=lambda each: each.fact_id) == sorted(found, key=lambda each: each.fact_id)
    assert balanced_sample(facts, per_relation=7, per_object=3, seed=2) != found
    assert balanced_sample(facts, per_relation=100, per_object=25) == tuple(facts)
    assert "`per_object`: expected 1 or more, found 0" in raised(
        lambda: balanced_sample(facts, per_object=0), OptionError
    )


def test_every_fact_is_equally_likely_to_be_drawn() -> None:
    facts = [fact(f"f{n}", f"S{n}", "a") for n in range(10)]
    drawn = Counter(each.fact_id for seed in range(500) for each in balanced_sample(facts, per_object=3, seed=seed))
    # 150 are expected of each; the standard deviation is 10.2
    assert all(abs(drawn[each.fact_id] - 150) < 42 for each in facts)


# Categories


@pytest.mark.parametrize(
    ("text", "entails", "category"),
    [
        ("Wagner died in Venezia.", True, "entails"),
        ("nothing of it", True, "entails"),
        ("Wagner died in Venezia.", False, "both entities"),
        ("Richard Wagner wrote operas.", False, "one entity"),
        ("Venice is sinking.", False, "one entity"),
        ("Richard Strauss wrote operas.", False, "partial match"),
        ("Venetian boats", False, "neither"),
        ("", False, "neither"),
    ],
)
def test_category_is_the_first_that_fits(text: str, entails: bool, category: str) -> None:
    wagner = fact("f", "Richard Wagner", "Venice", subject_aliases=["Wagner"], target_aliases=["Venezia"])
    assert proponent_category(wagner, text, entails=entails) == category


def test_category_shares_by_frequency_bucket() -> None:
    facts = [fact("a"), fact("b"), fact("c")]
    proponents = [["Paris, France", "France", "x"], ["Paris", "x"], []]
    found = category_shares(facts, proponents, [[0.6, 0.5, 0.0], [0.1, 0.1], []], [15, 99, 0])
    assert [(each.bucket, each.facts, each.proponents) for each in found] == [(2, 2, 5)]
    assert found[0].shares == {
        "entails": 1 / 5, "both entities": 0, "one entity": 2 / 5, "partial match": 0, "neither": 2 / 5,
    }  # fmt: skip
    assert tuple(found[0].shares) == CATEGORIES
    assert category_shares(facts[:1], [["France"]], [[1]], np.array([7]))[0].shares["entails"] == 1
    assert category_shares([], [], [], []) == []
    message = raised(lambda: category_shares(facts, proponents, [[], [], []], [1, 1, 1]), OptionError)
    assert message == "fact a: expected one score per proponent, found 3 proponents and 0 scores"
    assert "expected the same length, found 3, 3, 3, 1" in raised(
        lambda: category_shares(facts, proponents, [[0, 0, 0], [0, 0], []], [1]), OptionError
    )
