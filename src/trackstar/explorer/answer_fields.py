"""Optional fields of a result line: the kind of question, the model's own answer, and the true one.

Values come from files of others: a value of another type counts as absent, and texts and lists are cut.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trackstar.choices import KINDS, Kind
from trackstar.explorer.messages import sendable
from trackstar.text import one_line, shortened

_OLDER_NAMES = {
    "example_id": "trex_id",
    "is_8b_correct": "is_correct",
    "8b_confidence": "model_confidence",
    "8b_generations": "temperature_samples",
    "c4_frequency": "fact_frequency",
    "c4_frequency_bucket": "frequency_bucket",
    "groundtruth": "ground_truth",
}
_LONGEST_TEXT = 2000
_MOST_ALTERNATIVES = 20
_MOST_GENERATIONS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFields:
    """What a line says about its question and the model's own answer; None or empty where it says nothing.

    Attributes:
        kind: The kind of question.
        alternatives: The other completions of a choice.
        model_answer: The model's own answer; of a choice, the completion that it prefers.
        model_correct: Whether the model answers correctly.
        groundtruth: The true answer.
        generations: Sampled answers, at most 64.
        sampled: Number of all sampled answers.
        confidence: Share of the sampled answers that are right, from 0 to 1.
        stated: Whether a sentence of the corpus states the fact.
    """

    kind: Kind | None
    alternatives: tuple[str, ...]
    model_answer: str | None
    model_correct: bool | None
    groundtruth: str | None
    generations: tuple[str, ...]
    sampled: int
    confidence: float | None
    stated: bool | None

    @property
    def present(self) -> set[str]:
        """Names of the fields that the line has."""
        presence = {
            "kind": self.kind is not None,
            "alternatives": bool(self.alternatives),
            "model_answer": self.model_answer is not None,
            "model_correct": self.model_correct is not None,
            "groundtruth": self.groundtruth is not None,
            "generations": bool(self.generations),
            "confidence": self.confidence is not None,
            "stated": self.stated is not None,
        }
        return {name for name, present in presence.items() if present}


def answer_fields(fields: Mapping[str, Any]) -> AnswerFields:
    """The fields of a line about its question and the model's own answer."""
    alternatives = _texts(fields.get("alternative"))
    generations = _texts(field(fields, "8b_generations"))
    kind = fields.get("kind")
    return AnswerFields(
        kind=next((known for known in KINDS if known == kind), None),
        alternatives=tuple(map(_cut, alternatives[:_MOST_ALTERNATIVES])),
        model_answer=_text(fields.get("model_answer")),
        model_correct=truth(field(fields, "is_8b_correct")),
        groundtruth=_text(field(fields, "groundtruth")),
        generations=tuple(map(_cut, generations[:_MOST_GENERATIONS])),
        sampled=len(generations),
        confidence=_share(field(fields, "8b_confidence")),
        stated=truth(fields.get("has_trex_sentence")),
    )


def field(fields: Mapping[str, Any], name: str) -> Any:
    """A field of the release, by its name or else by the name that older files use; None without either."""
    value = fields.get(name)
    return fields.get(_OLDER_NAMES[name]) if value is None and name in _OLDER_NAMES else value


def truth(value: object) -> bool | None:
    """A value as true or false, also given as 1 or 0; None for any other value."""
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def whole(value: object) -> int | None:
    """A value as a whole number, also given as 3.0; None for any other value."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _share(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= 1 else None  # NaN is in no interval


def _texts(value: object) -> list[str]:
    """A list of texts; empty if the value is not one."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        return []
    return values


def _text(value: object) -> str | None:
    """A text, or a number as text, such as the answer to a sum."""
    if isinstance(value, str):
        return _cut(value) if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return one_line(value, _LONGEST_TEXT)


def _cut(text: str) -> str:
    return sendable(shortened(text, _LONGEST_TEXT))
