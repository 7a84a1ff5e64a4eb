"""Result files in the paper's release format, in memory so that thousands of queries can be browsed."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.choices import KINDS, Kind
from trackstar.corpus.data_files import find_files, raw_lines
from trackstar.corpus.fields import json_kind, json_object
from trackstar.corpus.joining import joined
from trackstar.corpus.local_files import FileState, file_state
from trackstar.corpus.query_files import COMPLETION_FIELDS, ID_FIELDS, PROMPT_FIELDS
from trackstar.errors import CorpusError
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.explorer.answer_fields import AnswerFields, answer_fields, field, truth, whole
from trackstar.explorer.messages import sendable, without_backticks
from trackstar.explorer.schemas import MixingSummary
from trackstar.progress import Progress
from trackstar.text import one_line

_LONGEST_ROW = 300
_SPECTRUM_POINTS = 200
LARGEST_SCORE = 1e30
_DEEPEST = 100
# What Python reads as JSON and other readers do not: NaN, infinities, halves of surrogate pairs.
_PERHAPS_NOT_JSON = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The fields of a result file's line that browsing needs.

    Attributes:
        example_id: The query's name.
        query_set: The set of queries that it belongs to.
        prompt: The prompt.
        separator: What stands between the two in the text that was asked.
        completion: The completion that the ranking explains.
        relation: The relation's name or template.
        bucket: The fact's frequency bucket.
        frequency: Number of training examples that contain the fact.
        kind: The kind of question.
        model_correct: Whether the model answers correctly.
        scores: The proponents' scores.
        correct: Whether each proponent is correct; None if unknown.
        entailing: Whether each proponent entails the fact, by a model's score; None if unknown.
        query_text: Prompt, completion, name and relation in lower case, to search in.
        candidates_text: The candidates' texts in lower case, to search in.
    """

    example_id: str
    query_set: str
    prompt: str
    separator: str
    completion: str
    relation: str | None
    bucket: str | None
    frequency: int | None
    kind: Kind | None
    model_correct: bool | None
    scores: tuple[float, ...]
    correct: tuple[bool, ...] | None
    entailing: tuple[bool, ...] | None
    query_text: str
    candidates_text: str

    @property
    def first_correct(self) -> int | None:
        """Rank of the first correct proponent, from 1; None if none is correct or correctness is unknown."""
        return next((rank for rank, correct in enumerate(self.correct or (), start=1) if correct), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ResultFile:
    """A result file in memory.

    Attributes:
        name: The file's name.
        lines: The parsed fields of each line.
        raw: The lines as bytes.
        has: Optional fields that at least one line has.
        kinds: Kinds of questions that at least one line has.
        mixing: λ and spectra from the report beside the file, or None.
        place_of: Position of each query's line, from 0, by the query's name.
        states: The local files that it was read from, and their state then.
    """

    name: str
    lines: tuple[Line, ...]
    raw: tuple[bytes, ...]
    has: frozenset[str]
    kinds: tuple[Kind, ...]
    mixing: MixingSummary | None
    place_of: Mapping[str, int]
    states: Mapping[str, FileState]

    @property
    def changed(self) -> bool:
        """Whether a file has been written, replaced or removed since it was read."""
        return any(file_state(path) != state for path, state in self.states.items())

    def json_line(self, place: int) -> str:
        """A line as it is in the file, except that NaN and infinities become null, and half a
        surrogate pair U+FFFD, so that every reader of JSON takes it.
        """
        raw = self.raw[place]
        if not _PERHAPS_NOT_JSON.search(raw):
            return raw.decode()
        return json.dumps(_json_value(self.record(place)), ensure_ascii=False, allow_nan=False)

    def record(self, place: int) -> dict[str, Any]:
        """All fields of a line."""
        return json.loads(self.raw[place])


def read_result_file(path: str | Path) -> ResultFile:
    """Read a result file into memory: JSON lines (plain, .gz or .zst) with the release's fields.

    Required fields are a prompt, a completion, `proponents`, `proponent_ids` and
    `proponent_scores`. Optional fields are `opponents`, `opponent_ids` and `opponent_scores`,
    `relation`, `c4_frequency`, `c4_frequency_bucket`, `proponent_correct`, `proponent_ais_scores`,
    `trex_sentences`, the entities' names, and those of `answer_fields`.

    Raises:
        CorpusError: A line is not a result; the message names file and line.
    """
    place = find_files(str(path))
    if place.dataset or place.files[0].format != "jsonl":
        raise CorpusError(f"{path}: not JSON lines; expected results (.jsonl, plain, .gz or .zst) or an index's folder")
    lines: list[Line] = []
    raw: list[bytes] = []
    has: set[str] = set()
    place_of: dict[str, int] = {}
    with Progress("Reading results", unit="queries") as bar:
        for file in place.files:
            for number, text in raw_lines(file):
                where = f"{file.name}:{number}"
                fields = json_object(text, where)
                _check_depth(fields, text, where)
                answer = answer_fields(fields)
                line = _line(fields, answer, where, f"{file.stem}:{len(lines)}")
                if line.example_id in place_of:
                    first = place_of[line.example_id] + 1
                    raise CorpusError(
                        f"{where}: query {one_line(line.example_id)} is also result {first}; expected each once"
                    )
                has |= _present(fields, line) | answer.present
                place_of[line.example_id] = len(lines)
                lines.append(line)
                raw.append(text)
                bar.advance(1)
    if not lines:
        raise CorpusError(f"{path}: holds no result; expected at least one line that is not blank")
    return ResultFile(
        name=sendable(Path(place.name).name),
        lines=tuple(lines),
        raw=tuple(raw),
        has=frozenset(has),
        kinds=tuple(kind for kind in KINDS if any(line.kind == kind for line in lines)),
        mixing=_mixing_beside(Path(path)),
        place_of=place_of,
        states={file.path: file.state for file in place.files if file.state is not None},
    )


def _check_depth(fields: Mapping[str, Any], line: bytes, where: str) -> None:
    """Raise if values are nested so deeply that a later reader of the line could run out of stack."""
    if line.count(b"[") + line.count(b"{") <= _DEEPEST:
        return
    level: list[Any] = [fields]
    for _ in range(_DEEPEST):
        inner = (child for value in level for child in (value.values() if isinstance(value, dict) else value))
        level = [child for child in inner if isinstance(child, (dict, list))]
    if level:
        raise CorpusError(
            f"{where}: found values nested more than {_DEEPEST} deep, expected plain fields; flatten them"
        )


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {sendable(name): _json_value(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_json_value(child) for child in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return sendable(value) if isinstance(value, str) else value


def gold_marks(fields: Mapping[str, Any], ids: Sequence[str]) -> tuple[bool, ...] | None:
    """Whether each candidate is correct, by `proponent_correct` or else by `trex_sentences`; None
    if unknown.
    """
    correct = fields.get("proponent_correct")
    if isinstance(correct, list) and len(correct) == len(ids):
        marks = [truth(value) for value in correct]
        if all(mark is not None for mark in marks):
            return tuple(mark is True for mark in marks)
    gold = fields.get("trex_sentences")
    if isinstance(gold, list) and gold:
        names = set(map(str, gold))
        return tuple(name in names or name.rpartition("#")[0] in names for name in ids)
    return None


def _line(fields: Mapping[str, Any], answer: AnswerFields, where: str, fallback: str) -> Line:
    prompt, completion = (_text(fields, names, where) for names in (PROMPT_FIELDS[::-1], COMPLETION_FIELDS[::-1]))
    texts, ids, scores = _ranking(fields, "proponent", where)
    other_texts: list[str] = []
    if fields.get("opponents") is not None:
        other_texts, _, _ = _ranking(fields, "opponent", where)
    names = (field(fields, name) for name in ("example_id", *ID_FIELDS))
    name = next((str(value) for value in names if value is not None), fallback)
    entailment = fields.get("proponent_ais_scores")
    if entailment is not None and (not isinstance(entailment, list) or len(entailment) != len(texts)):
        raise CorpusError(f"{where}: proponent_ais_scores are not one number per proponent; expected {len(texts)}")
    relation = _optional(fields, "relation")
    frequency = whole(field(fields, "c4_frequency"))
    return Line(
        example_id=sendable(name),
        query_set=_optional(fields, "query_set") or "",
        prompt=sendable(prompt),
        separator=_separator(fields, prompt, completion),
        completion=sendable(completion),
        relation=relation,
        bucket=_optional(fields, "c4_frequency_bucket"),
        frequency=frequency if frequency is not None and 0 <= frequency < 2**53 else None,
        kind=answer.kind,
        model_correct=answer.model_correct,
        scores=tuple(scores),
        correct=gold_marks(fields, ids),
        entailing=None if entailment is None else tuple(_score(v, where) > THRESHOLD for v in entailment),
        query_text="\n".join((prompt, completion, name, relation or "")).casefold(),
        candidates_text="\n".join((*texts, *other_texts)).casefold(),
    )


def _separator(fields: Mapping[str, Any], prompt: str, completion: str) -> str:
    """What the results say, or else what trackstar would put there."""
    found = fields.get("separator")
    if found in ("", " "):
        return found
    text = joined(prompt, completion)
    return text[len(prompt) : len(text) - len(completion)]


def _ranking(fields: Mapping[str, Any], role: str, where: str) -> tuple[list[str], list[str], list[float]]:
    columns: list[list[Any]] = []
    for name in (f"{role}s", f"{role}_ids", f"{role}_scores"):
        value = fields.get(name)
        if not isinstance(value, list):
            what = "no field" if value is None else json_kind(value)
            raise CorpusError(
                f'{where}: found {what} "{name}", expected a list; results have {role}s, {role}_ids and {role}_scores'
            )
        columns.append(value)
    texts, ids, scores = columns
    if not len(texts) == len(ids) == len(scores):
        raise CorpusError(
            f"{where}: {len(texts)} {role}s, {len(ids)} {role}_ids and {len(scores)} {role}_scores; "
            "expected the same number of each"
        )
    if not all(isinstance(text, str) for text in texts):
        raise CorpusError(f"{where}: {role}s are not all strings; expected the candidates' texts")
    return texts, [str(name) for name in ids], [_score(score, where) for score in scores]


def _score(value: object, where: str) -> float:
    # `not <=` also refuses NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_SCORE:
        raise CorpusError(
            f"{where}: found score {_shown_value(value)}, expected a finite number up to {LARGEST_SCORE:g}"
        )
    return float(value)


def _shown_value(value: object) -> str:
    """A value of a file as JSON on one short line; only the kind of an array or object."""
    return one_line(json.dumps(value), 40) if isinstance(value, (int, float, str)) else json_kind(value)


def _text(fields: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if isinstance(fields.get(name), str):
            return fields[name]
    found = one_line(", ".join(list(fields)[:12])) or "no fields"
    raise CorpusError(f"{where}: no text in {' or '.join(names)}; found {found}")


def _optional(fields: Mapping[str, Any], name: str) -> str | None:
    value = field(fields, name)
    if value is None or isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return sendable(one_line(value, _LONGEST_ROW) if isinstance(value, int) else str(value)[:_LONGEST_ROW])


def _present(fields: Mapping[str, Any], line: Line) -> set[str]:
    presence = {
        "relation": line.relation is not None,
        "bucket": line.bucket is not None,
        "frequency": line.frequency is not None,
        "proponent_correct": line.correct is not None,
        "entailment": line.entailing is not None,
        "gold": bool(fields.get("trex_sentences")),
        "opponents": bool(fields.get("opponents")),
        "entities": bool(fields.get("entity0")),
    }
    return {name for name, present in presence.items() if present}


def _mixing_beside(path: Path) -> MixingSummary | None:
    """λ and spectra from the report beside the results; None if there is no report."""
    report = path.with_name(f"{path.stem}.report.json")
    if not report.is_file():
        return None
    try:
        fields = json.loads(report.read_text(encoding="utf-8"))
        if not isinstance(fields["mixing"], dict):
            raise TypeError(f"mixing is {json_kind(fields['mixing'])}")
        return mixing_summary(fields["mixing"], damping=fields["damping"], damping_rule=fields["damping_rule"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise CorpusError(
            f"{report}: not the report of these results ({one_line(error)}); remove it, or answer the queries again"
        ) from None


def mixing_summary(mixing: Mapping[str, Any], *, damping: float, damping_rule: str) -> MixingSummary:
    """λ and both spectra, thinned to points that a chart can show.

    Args:
        mixing: The fields of `trackstar.curvature.mixing.Mixing`.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block.
        damping_rule: The rule that chose the damping, in words.

    Raises:
        ValueError: A number is not finite.
    """
    spectra = {name: mixing.get(f"{name}_spectrum") or [] for name in ("evaluation", "train")}
    ranks = {name: _thinned(len(values)) for name, values in spectra.items()}
    levels = [mixing.get(f"{name}_value") or 0.0 for name in spectra]
    numbers = [mixing["value"], damping, *levels, *spectra["evaluation"], *spectra["train"]]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a number in it is not finite")
    return MixingSummary(
        value=mixing["value"],
        rule=sendable(without_backticks(str(mixing["rule"]))),
        queries=mixing["queries"],
        rank=mixing["rank"],
        evaluation_value=levels[0],
        train_value=levels[1],
        evaluation_spectrum=[spectra["evaluation"][rank - 1] for rank in ranks["evaluation"]],
        evaluation_ranks=ranks["evaluation"],
        train_spectrum=[spectra["train"][rank - 1] for rank in ranks["train"]],
        train_ranks=ranks["train"],
        damping=damping,
        damping_rule=sendable(without_backticks(str(damping_rule))),
    )


def _thinned(count: int) -> list[int]:
    """Ranks from 1 to `count`, evenly spaced on a logarithmic axis."""
    if not count:
        return []
    return sorted({int(rank) for rank in np.geomspace(1, count, _SPECTRUM_POINTS).round()})
