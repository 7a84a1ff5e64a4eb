"""A report's rankings as result files in the public release's format, one per method, for the explorer."""

import json
import re

from trackstar.evaluation.facts import to_queries
from trackstar.evaluation.frequency import frequency_bucket
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.run import EvaluationReport


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
    template = report.config.templates[0]
    ranking = report.rankings[method, template]
    queries = to_queries(report.facts, template)
    return [
        json.dumps(
            {
                "example_id": fact.fact_id,
                "query_set": report.config.half,
                "inputs_plaintext": query.prompt,
                "targets_plaintext": query.completion,
                **_proponents(report, ranking, number),
                "opponents": [],
                "opponent_ids": [],
                "opponent_scores": [],
                **fact.to_release(),
                "c4_frequency": frequency,
                "c4_frequency_bucket": frequency_bucket(frequency),
                "is_8b_correct": bool(report.correct[number]),
                "groundtruth": fact.object.name,
                "model_answer": report.answers[number],
            },
            ensure_ascii=False,
            allow_nan=False,
        )
        for number, (fact, query) in enumerate(zip(report.facts, queries, strict=True))
        for frequency in [int(report.frequencies[number] if fact.frequency is None else fact.frequency)]
    ]


def _proponents(report: EvaluationReport, ranking: Ranking, number: int) -> dict[str, object]:
    """Fields of the proponents for the query with this number."""
    rows = ranking.rows[number]
    gold = {*report.facts[number].gold, *report.facts[number].gold_strict}
    ids = [report.pool.example_ids[row] for row in rows]
    fields: dict[str, object] = {
        "proponents": [report.pool.texts[row] for row in rows],
        "proponent_ids": ids,
        "proponent_scores": [float(score) for score in ranking.scores[number][: len(rows)]],
        "proponent_correct": [name in gold for name in ids],
    }
    if report.judgements is not None and all((number, row) in report.judgements for row in rows):
        fields["proponent_ais_scores"] = [float(report.judgements[number, row]) for row in rows]
    return fields
