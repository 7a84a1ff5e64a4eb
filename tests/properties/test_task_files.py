"""Questions of published tasks in their authors' forms, and questions of our own making; all records are made up."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from trackstar.corpus import Query, read_queries
from trackstar.errors import CorpusError, OptionError
from trackstar.evaluation.fact_files import read_facts
from trackstar.evaluation.made_questions import made_questions

COPA_XML = """<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE copa-corpus SYSTEM "copa.dtd">
<copa-corpus version="1.0">
<item id="7" asks-for="cause" most-plausible-alternative="2">
<p>The kettle whistled.</p>
<a1>It was empty.</a1>
<a2>The water boiled &amp; steamed.</a2>
</item>
<item id="8" asks-for="effect" most-plausible-alternative="1">
<p>Ivo dropped the cup.</p>
<a1>Its handle broke.</a1>
<a2>Goran bought tea.</a2>
</item>
</copa-corpus>
"""
ASDIV_XML = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<Machine-Reading-Corpus-File><ProblemSet>
<Problem ID="nluds-9001" Grade="1" Source="made up">
<Body>Seven crows sat on a fence. 2 more came.</Body>
<Question>How many crows were there?</Question>
<Solution-Type>Addition</Solution-Type>
<Answer>9 (crows)</Answer>
<Formula>7+2=9</Formula>
</Problem>
</ProblemSet></Machine-Reading-Corpus-File>
"""
SUPERGLUE = [
    {"premise": "The lamp went out.", "choice1": "The bulb burnt out.", "choice2": "Lena read a book.",
     "question": "cause", "label": 0, "idx": 0},
    {"premise": "It snowed all night.", "choice1": "The road was dry.", "choice2": "The school was closed.",
     "question": "effect", "label": 1, "idx": 1},
]  # fmt: skip
PIQA = [
    {"goal": "To keep bread soft,", "sol1": "store it in a closed box.", "sol2": "store it in the sun."},
    {"goal": "How do I open a stuck jar?", "sol1": "Put it in the freezer for a day.", "sol2": "Warm its lid."},
]
GSM8K = {"question": "A jar holds 1,200 beads. Ada takes half. How many are left?",
         "answer": "Half of 1,200 is <<1200/2=600>>600.\n#### 600"}  # fmt: skip
SVAMP = {"ID": "chal-901", "Body": "Nils has 8 nails and a box of 4", "Question": "How many nails has he?",
         "Equation": "( 8.0 + 4.0 )", "Answer": 12.0, "Type": "Addition"}  # fmt: skip
MAWPS = {"iIndex": 33, "sQuestion": "Rosa reads 3 pages a day. How many in 2.5 days?", "lEquations": ["X=3*2.5"],
         "lSolutions": [7.5]}  # fmt: skip


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def asked(query: Query) -> tuple[object, ...]:
    return query.query_id, query.kind, query.prompt, query.completion, *query.alternatives


def test_copa_is_a_choice_of_two_endings(tmp_path: Path) -> None:
    (tmp_path / "copa-dev.xml").write_text(COPA_XML)
    assert [asked(query) for query in read_queries(tmp_path / "copa-dev.xml")] == [
        ("copa:7", "choice", "The kettle whistled because", "the water boiled & steamed.", "it was empty."),
        ("copa:8", "choice", "Ivo dropped the cup so", "its handle broke.", "Goran bought tea."),
    ]
    assert [asked(query) for query in read_queries(lines(tmp_path / "val.jsonl", *SUPERGLUE))] == [
        ("copa:0", "choice", "The lamp went out because", "the bulb burnt out.", "Lena read a book."),
        ("copa:1", "choice", "It snowed all night so", "the school was closed.", "the road was dry."),
    ]


def test_labels_of_piqa_lie_beside_its_goals(tmp_path: Path) -> None:
    path = lines(tmp_path / "valid.jsonl", *PIQA)
    with pytest.raises(CorpusError, match=r'valid.jsonl:1: no field "label", and .*valid-labels.lst cannot be read'):
        read_queries(path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    expected = [
        ("valid:0", "choice", "To keep bread soft,", "store it in a closed box.", "store it in the sun."),
        ("valid:1", "choice", "How do I open a stuck jar?", "Warm its lid.", "Put it in the freezer for a day."),
    ]
    assert [asked(query) for query in read_queries(path)] == expected
    assert [asked(query) for query in read_queries(tmp_path / "*.jsonl")] == expected
    with_labels = [{**record, "label": label} for record, label in zip(PIQA, (0, 1), strict=True)]
    assert [q.completion for q in read_queries(lines(tmp_path / "other.jsonl", *with_labels))] == [
        completion for _, _, _, completion, _ in expected
    ]
    (tmp_path / "valid-labels.lst").write_text("0\n")
    with pytest.raises(CorpusError, match=r"labels.lst: holds labels of 1 questions, and .*valid.jsonl:2 is number 2"):
        read_queries(path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n1\n")  # a question was deleted
    with pytest.raises(CorpusError, match=r"labels.lst: holds labels of 3 questions, found 2 beside it"):
        read_queries(path)


def test_word_problems_ask_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "asdiv.xml").write_text(ASDIV_XML)
    (tmp_path / "svamp.json").write_text(json.dumps([SVAMP]))
    (tmp_path / "questions.json").write_text(json.dumps([MAWPS], indent=1))
    paths = [tmp_path / "asdiv.xml", tmp_path / "svamp.json", tmp_path / "questions.json"]
    paths.append(lines(tmp_path / "gsm8k.jsonl", GSM8K))
    found = [asked(query) for path in paths for query in read_queries(path)]
    crows = "Seven crows sat on a fence. 2 more came. How many crows were there?\nAnswer:"
    nails = "Nils has 8 nails and a box of 4. How many nails has he?\nAnswer:"
    assert found == [
        ("problem:nluds-9001", "generation", crows, "9"),
        ("problem:chal-901", "generation", nails, "12"),
        ("problem:33", "generation", "Rosa reads 3 pages a day. How many in 2.5 days?\nAnswer:", "7.5"),
        ("gsm8k:0", "generation", f"{GSM8K['question']}\nAnswer:", "600"),
    ]
    for path, (name, kind, prompt, completion) in zip(paths, found, strict=True):
        (fact,) = read_facts(path)  # a report reads the same
        query = fact.to_query()
        assert (query.query_id, query.kind, query.prompt, query.completion) == (name, kind, prompt, completion)
        assert fact.relation == "word problems"


def test_a_question_that_is_a_query_already_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "copa.xml").write_text(COPA_XML)
    records = [dict(query.record) for query in read_queries(tmp_path / "copa.xml")]
    changed = {**records[0], "prompt": "The pot whistled because"}
    first, second = read_queries(lines(tmp_path / "again.jsonl", changed, records[1]))
    assert first.prompt == "The pot whistled because"
    assert asked(second)[1:] == ("choice", "Ivo dropped the cup so", "its handle broke.", "Goran bought tea.")


BROKEN: dict[str, tuple[str, str]] = {
    "cut off": (COPA_XML[:300], r":\d+: broken XML \(unclosed token\); expected a file as its authors publish it"),
    "not XML": ("premise;choice\n", r":1: broken XML \("),
    "no question": ("<copa-corpus></copa-corpus>", "holds no question; expected elements item or Problem"),
    "entity": (
        COPA_XML.replace('SYSTEM "copa.dtd"', '[<!ENTITY a "b">]'), ":2: declares the entity a; expected plain text",
    ),
    "no such cause": (COPA_XML.replace('"cause"', '"reason"'), r'field "asks-for" is .reason.; expected cause or'),
    "test set": (
        COPA_XML.replace(' most-plausible-alternative="2"', ""),
        ':4: field "most-plausible-alternative" is missing; expected 1 or 2',
    ),
    "part twice": (COPA_XML.replace("<a2>", "<a1>").replace("</a2>", "</a1>"), ":7: a1 is repeated"),
    "empty part": (COPA_XML.replace("It was empty.", " "), ':4: field "a1" is \' \'; expected a text'),
    "same ending": (COPA_XML.replace("It was empty.", "The water boiled &amp; steamed."), "the completion itself"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named_with_its_line(fault: str, tmp_path: Path) -> None:
    text, message = BROKEN[fault]
    path = tmp_path / "copa.xml"
    path.write_text(text)
    with pytest.raises(CorpusError, match=rf"^{path}.*{message}"):
        read_queries(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**SUPERGLUE[0], "label": -1}, 'field "label" is -1; expected 0 or 1, the right answer'),
        ({**SUPERGLUE[0], "label": True}, 'field "label" is True; expected 0 or 1'),
        ({**SUPERGLUE[0], "premise": 3}, 'field "premise" is 3; expected a text'),
        ({name: SUPERGLUE[0][name] for name in ("premise", "choice1", "question", "label")}, '"choice2" is missing'),
        ({**MAWPS, "lSolutions": [1, 2]}, r'field "lSolutions" is \[1, 2\]; expected an array of one number'),
        ({**SVAMP, "Answer": None}, 'field "Answer" is None; expected a number'),
        ({**GSM8K, "answer": "#### "}, "the answer is empty; expected a number"),
        ({"question": "Who?", "answer": "Ada"}, "no prompt; expected a field prompt"),
    ],
)
def test_a_question_of_the_wrong_form_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=f"q.jsonl:1: .*{message}"):
        read_queries(lines(tmp_path / "q.jsonl", record))


def test_made_sums_are_right_and_the_same_everywhere() -> None:
    sums = made_questions("arithmetic", 9801)
    for question in sums:
        a, plus, b, equals = question["prompt"].split()
        assert (plus, equals, int(question["completion"])) == ("+", "=", int(a) + int(b))
    assert len({question["prompt"] for question in sums}) == 9801
    assert made_questions("arithmetic", 20) == sums[:20]
    assert made_questions("arithmetic", 20, seed=1) != sums[:20]
    assert [question["prompt"] for question in sums[:3]] == ["32 + 62 =", "82 + 87 =", "66 + 54 ="]
    with pytest.raises(OptionError, match=r"`count`: expected at most 9,801, of which arithmetic has different"):
        made_questions("arithmetic", 9802)


def test_made_word_problems_have_one_answer() -> None:
    problems = made_questions("word-problems", 2000)
    assert len({problem["prompt"] for problem in problems}) == 2000
    for problem in problems:
        numbers = [int(word.strip(".?")) for word in problem["prompt"].split() if word.strip(".?").isdecimal()]
        assert len(numbers) == 2
        a, b = numbers
        assert Fraction(int(problem["completion"])) in {
            Fraction(a + b),
            Fraction(a - b),
            Fraction(a * b),
            Fraction(a, b),
        }


def test_made_stories_have_no_right_answer(tmp_path: Path) -> None:
    stories = made_questions("stories", 500)
    assert len({story["prompt"] for story in stories}) == 500
    assert {(story["kind"], story.get("completion")) for story in stories} == {("open", None)}
    queries = read_queries(lines(tmp_path / "stories.jsonl", *stories[:5]), needs_completion=False)
    assert [query.kind for query in queries] == ["open"] * 5
