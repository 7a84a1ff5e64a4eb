"""Candidates of a result file or an index for the browser: text cut to length, entities marked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trackstar.corpus.matching import name_spans
from trackstar.evaluation.categories import proponent_category
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.facts import Entity, Fact
from trackstar.explorer.answer_fields import answer_fields
from trackstar.explorer.messages import sendable
from trackstar.explorer.result_files import Line, ResultFile, gold_marks
from trackstar.explorer.schemas import SHOWN_CHARACTERS, Candidate, Mark, QueryRecord, Side, Text

LONGEST_PART = 100_000
LONGEST_RAW = 200_000
_MOST_MARKS = 200
# Finding entities costs names × words per name × length of the text. Further names, and characters
# beyond the longest name, are ignored.
_MOST_NAMES = 40
_LONGEST_NAME = 120


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactLabels:
    """What a result file says about a candidate and the query's fact.

    Attributes:
        correct: Whether the candidate states the fact; None if unknown.
        entailment: Entailment score, from 0 to 1; None if unknown.
        subject: Names of the fact's subject, aliases included.
        object: Names of the fact's object, aliases included.
    """

    correct: bool | None = None
    entailment: float | None = None
    subject: Sequence[str] = ()
    object: Sequence[str] = ()

    def category(self, text: str) -> str | None:
        """Which parts of the fact a text states; None if the fact has no entities."""
        if not (self.subject and self.object):
            return None
        fact = Fact(
            fact_id="",
            subject=Entity(name=self.subject[0], aliases=tuple(self.subject[1:])),
            relation="",
            relation_uri="",
            object=Entity(name=self.object[0], aliases=tuple(self.object[1:])),
        )
        entails = bool(self.correct) or (self.entailment is not None and self.entailment > THRESHOLD)
        return proponent_category(fact, text, entails=entails)

    def marks(self, text: str) -> list[Mark]:
        """Where a text names the subject or the object, in the order of the text."""
        marks = [
            *(Mark(start=start, stop=stop, entity="subject") for start, stop in name_spans(text, self.subject)),
            *(Mark(start=start, stop=stop, entity="object") for start, stop in name_spans(text, self.object)),
        ]
        return sorted(marks, key=lambda mark: (mark.start, -mark.stop))[:_MOST_MARKS]


def text_part(text: str, start: int, most: int = LONGEST_PART) -> Text:
    """At most `most` characters of a text, from `start` on."""
    return Text(text=sendable(text[start : start + most]), start=min(start, len(text)), characters=len(text))


def entity_names(fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of a result's subject and object, aliases included; empty if the line names none."""
    names: list[list[str]] = []
    for number in (0, 1):
        name, aliases = fields.get(f"entity{number}"), fields.get(f"entity{number}_alias")
        values = [name, *(aliases if isinstance(aliases, list) else [])]
        texts = [sendable(value[:_LONGEST_NAME]) for value in values if isinstance(value, str) and value.strip()]
        names.append(list(dict.fromkeys(texts))[:_MOST_NAMES])
    return names[0], names[1]


def query_record(file: ResultFile, run: int, place: int) -> QueryRecord:
    """A query of a result file with all its candidates."""
    fields, line = file.record(place), file.lines[place]
    subject, obj = entity_names(fields)
    answer = answer_fields(fields)
    return QueryRecord(
        run=run,
        place=place,
        example_id=line.example_id,
        query_set=line.query_set,
        prompt=line.prompt,
        separator=line.separator,
        completion=line.completion,
        relation=line.relation,
        bucket=line.bucket,
        frequency=line.frequency,
        kind=answer.kind,
        alternatives=list(answer.alternatives),
        model_answer=answer.model_answer,
        model_correct=answer.model_correct,
        groundtruth=answer.groundtruth,
        generations=list(answer.generations),
        sampled=answer.sampled,
        confidence=answer.confidence,
        stated=answer.stated,
        subject=subject,
        object=obj,
        proponents=_candidates(fields, line, "proponents"),
        opponents=_candidates(fields, line, "opponents") if fields.get("opponents") else [],
    )


def candidate_text(file: ResultFile, place: int, side: Side, rank: int) -> str:
    """The whole text of a candidate in a result file.

    Raises:
        IndexError: The query has no candidate of that rank.
    """
    texts = file.record(place).get(side) or []
    if not 1 <= rank <= len(texts):
        raise IndexError(rank)
    return texts[rank - 1]


def make_candidate(
    *,
    rank: int,
    example_id: str,
    score: float,
    text: str,
    row: int | None = None,
    parent_id: str | None = None,
    labels: FactLabels | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Candidate:
    """A ranked training example for the browser; its text is cut to `SHOWN_CHARACTERS`."""
    shown = text[:SHOWN_CHARACTERS]
    labels = labels or FactLabels()
    return Candidate(
        rank=rank,
        row=row,
        example_id=sendable(example_id),
        parent_id=None if parent_id in (None, example_id) else sendable(str(parent_id)),
        score=score,
        text=sendable(shown),
        characters=len(text),
        correct=labels.correct,
        entailment=labels.entailment,
        category=labels.category(shown),
        marks=labels.marks(shown),
        metadata={sendable(name): sendable(value) for name, value in (metadata or {}).items()},
    )


def _candidates(fields: Mapping[str, Any], line: Line, side: Side) -> list[Candidate]:
    role = side.removesuffix("s")
    texts, ids, scores = fields[side], [str(name) for name in fields[f"{role}_ids"]], fields[f"{role}_scores"]
    correct = line.correct if side == "proponents" else gold_marks({**fields, "proponent_correct": None}, ids)
    entailment = fields.get("proponent_ais_scores") if side == "proponents" else None
    subject, obj = entity_names(fields)
    return [
        make_candidate(
            rank=position + 1,
            example_id=ids[position],
            score=float(scores[position]),
            text=text,
            labels=FactLabels(
                correct=correct[position] if correct else None,
                entailment=float(entailment[position]) if entailment else None,
                subject=subject,
                object=obj,
            ),
        )
        for position, text in enumerate(texts)
    ]
