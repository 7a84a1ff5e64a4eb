"""A report's rankings as result files in the public release's format, one per method, for the explorer."""

import json
import re
from collections.abc import Mapping, Sequence

from trackstar.evaluation.frequency import frequency_bucket
from trackstar.evaluation.run import EvaluationReport

WRONG_ANSWERS_FILE = "results/trackstar-wrong-answers.jsonl"


def result_file_name(method: str) -> str:
    """Name of a method's file, such as `trackstar-margin.jsonl`."""
    return re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-") + ".jsonl"


def result_lines(report: EvaluationReport, method: str) -> list[str]:
    """A method's first proponents for every query, as lines of the release's result files.

    `proponent_correct` marks gold examples. `c4_frequency` is the frequency in the file of facts,
    or else the number of candidates that name subject and object; `is_8b_correct` is about the
    report's own model, whatever its size. Rankings have no opponents.

    Args:
        report: The report.
        method: One of its methods, whose ranking for the main template is written.
    """
    ranking = report.rankings[method, report.config.templates[0]]
    return [
        _line(report, number, _proponents(report, ranking.rows[number], ranking.scores[number], number), None)
        for number in range(len(report.facts))
    ]


def wrong_answer_lines(report: EvaluationReport) -> list[str]:
    """TrackStar's first proponents of the model's wrong answers, as lines of the release's result files:
    the completion is the wrong answer, and `groundtruth` the right one.

    A query has the same name as in `result_lines`, so that both files can be seen side by side.
    """
    return [
        _line(report, number, _proponents(report, wrong.rows, wrong.scores, None), wrong.completion)
        for number, wrong in report.wrong_answers.items()
    ]


def _line(report: EvaluationReport, number: int, proponents: Mapping[str, object], wrong: str | None) -> str:
    """A result line for the right answer, or for a wrong one."""
    fact = report.facts[number]
    query = fact.to_query(report.config.templates[0])
    fields: dict[str, object] = {
        "example_id": fact.fact_id,
        "query_set": report.config.half,
        "inputs_plaintext": query.prompt,
        "targets_plaintext": query.completion if wrong is None else wrong,
        **proponents,
        "opponents": [],
        "opponent_ids": [],
        "opponent_scores": [],
        **fact.to_release(),
        "kind": fact.kind,
    }
    if fact.kind == "fact":
        frequency = int(report.frequencies[number] if fact.frequency is None else fact.frequency)
        fields |= {"c4_frequency": frequency, "c4_frequency_bucket": frequency_bucket(frequency)}
        fields["has_trex_sentence"] = bool(fact.gold)
    if fact.alternatives:
        texts = dict.fromkeys((query.completion, *fact.alternatives))
        fields["alternative"] = [text for text in texts if text != fields["targets_plaintext"]]
    if report.judged[number]:
        fields["is_8b_correct"] = bool(report.correct[number])
    if wrong is not None:
        fields["groundtruth"] = query.completion
    fields["model_answer"] = report.answers[number]
    return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def _proponents(
    report: EvaluationReport, rows: Sequence[int], scores: Sequence[float], number: int | None
) -> dict[str, object]:
    """Fields of the proponents for the query with this number; None for a wrong answer, which no example
    is known to state.
    """
    ids = [report.pool.example_ids[row] for row in rows]
    fields: dict[str, object] = {
        "proponents": [report.pool.texts[row] for row in rows],
        "proponent_ids": ids,
        "proponent_scores": [float(score) for score in scores[: len(rows)]],
    }
    if number is None:
        return fields
    gold = {*report.facts[number].gold, *report.facts[number].gold_strict}
    if gold:
        fields["proponent_correct"] = [name in gold for name in ids]
    if report.judgements is not None and rows and all((number, row) in report.judgements for row in rows):
        fields["proponent_ais_scores"] = [float(report.judgements[number, row]) for row in rows]
    return fields
