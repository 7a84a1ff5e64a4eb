"""Ranked texts as the browser shows them: cut to a length, entities marked, categorised; from files or an index."""

from collections.abc import Mapping, Sequence
from typing import Any

from trackstar.evaluation.categories import proponent_category
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.facts import Entity, Fact
from trackstar.evaluation.matching import name_spans
from trackstar.explorer.result_files import Line, ResultFile, gold_marks, sendable
from trackstar.explorer.schemas import SHOWN_CHARACTERS, Mark, Passage, QueryRecord, Side, Text

LONGEST_PART = 100_000
LONGEST_RAW = 200_000
_MOST_MARKS = 200
# Marking costs names × their words × the text: beyond these a name is looked for by its beginning, or not at all.
_MOST_NAMES = 40
_LONGEST_NAME = 120


def text_part(text: str, start: int, most: int = LONGEST_PART) -> Text:
    """A part of a long text."""
    return Text(text=sendable(text[start : start + most]), start=min(start, len(text)), characters=len(text))


def entities(fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of a result's subject and object, aliases included; empty where the line names none."""
    names: list[list[str]] = []
    for number in (0, 1):
        name, aliases = fields.get(f"entity{number}"), fields.get(f"entity{number}_alias")
        found = [name, *(aliases if isinstance(aliases, list) else [])]
        texts = [sendable(one[:_LONGEST_NAME]) for one in found if isinstance(one, str) and one.strip()]
        names.append(list(dict.fromkeys(texts))[:_MOST_NAMES])
    return names[0], names[1]


def query_record(file: ResultFile, run: int, place: int) -> QueryRecord:
    """A query of a result file with all its passages."""
    fields, line = file.record(place), file.lines[place]
    subject, obj = entities(fields)
    groundtruth = fields.get("groundtruth")
    return QueryRecord(
        run=run,
        place=place,
        example_id=line.example_id,
        query_set=line.query_set,
        prompt=line.prompt,
        completion=line.completion,
        relation=line.relation,
        bucket=line.bucket,
        frequency=line.frequency,
        model_correct=line.model_correct,
        subject=subject,
        object=obj,
        groundtruth=None if groundtruth is None else sendable(str(groundtruth))[:2000],
        proponents=_passages(fields, line, "proponents"),
        opponents=_passages(fields, line, "opponents") if fields.get("opponents") else [],
    )


def passage_text(file: ResultFile, place: int, side: Side, rank: int) -> str:
    """A passage's whole text.

    Raises:
        IndexError: There is no passage of that rank.
    """
    texts = file.record(place).get(side) or []
    if not 1 <= rank <= len(texts):
        raise IndexError(rank)
    return texts[rank - 1]


def make_passage(
    *,
    rank: int,
    example_id: str,
    score: float,
    text: str,
    row: int | None = None,
    parent_id: str | None = None,
    correct: bool | None = None,
    entailment: float | None = None,
    subject: Sequence[str] = (),
    obj: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Passage:
    """A ranked text, ready to be shown."""
    shown = text[:SHOWN_CHARACTERS]
    category = None
    if subject and obj:
        fact = Fact(
            fact_id="",
            subject=Entity(name=subject[0], aliases=tuple(subject[1:])),
            relation="",
            relation_uri="",
            object=Entity(name=obj[0], aliases=tuple(obj[1:])),
        )
        entails = bool(correct) or (entailment is not None and entailment > THRESHOLD)
        category = proponent_category(fact, shown, entails=entails)
    return Passage(
        rank=rank,
        row=row,
        example_id=sendable(example_id),
        parent_id=None if parent_id in (None, example_id) else sendable(str(parent_id)),
        score=score,
        text=sendable(shown),
        characters=len(text),
        correct=correct,
        entailment=entailment,
        category=category,
        marks=_marks(shown, subject, obj),
        metadata={sendable(name): sendable(value) for name, value in (metadata or {}).items()},
    )


def _marks(text: str, subject: Sequence[str], obj: Sequence[str]) -> list[Mark]:
    marks = [
        *(Mark(start=start, stop=stop, entity="subject") for start, stop in name_spans(text, subject)),
        *(Mark(start=start, stop=stop, entity="object") for start, stop in name_spans(text, obj)),
    ]
    return sorted(marks, key=lambda mark: (mark.start, -mark.stop))[:_MOST_MARKS]


def _passages(fields: Mapping[str, Any], line: Line, side: Side) -> list[Passage]:
    role = side.removesuffix("s")
    texts, ids, scores = fields[side], [str(name) for name in fields[f"{role}_ids"]], fields[f"{role}_scores"]
    correct = line.correct if side == "proponents" else gold_marks({**fields, "proponent_correct": None}, ids)
    entailment = fields.get("proponent_ais_scores") if side == "proponents" else None
    subject, obj = entities(fields)
    return [
        make_passage(
            rank=place + 1,
            example_id=ids[place],
            score=float(scores[place]),
            text=text,
            correct=correct[place] if correct else None,
            entailment=float(entailment[place]) if entailment else None,
            subject=subject,
            obj=obj,
        )
        for place, text in enumerate(texts)
    ]
