"""A report's rankings as result files of the public release's format, a file a method, for the explorer to open."""

import json
import re

from trackstar.evaluation.facts import to_queries
from trackstar.evaluation.frequency import frequency_bucket
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.run import EvaluationReport


def result_file_name(method: str) -> str:
    """A method's file, such as `trackstar-margin.jsonl`."""
    return re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-") + ".jsonl"


def result_lines(report: EvaluationReport, method: str) -> list[str]:
    """Every query's first proponents by a method, as lines of the release's results.

    Right are gold examples. `c4_frequency` is that of the facts' file, or else in how many candidates subject and
    object stand together; `is_8b_correct` is of the report's own model, whatever its size. Rankings keep no opponents.

    Args:
        report: The report.
        method: One of its methods; the ranking is that of the main template.
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
                **_proponents(report, ranking, place),
                "opponents": [],
                "opponent_ids": [],
                "opponent_scores": [],
                **fact.to_release(),
                "c4_frequency": frequency,
                "c4_frequency_bucket": frequency_bucket(frequency),
                "is_8b_correct": bool(report.correct[place]),
                "groundtruth": fact.object.name,
                "model_answer": report.answers[place],
            },
            ensure_ascii=False,
        )
        for place, (fact, query) in enumerate(zip(report.facts, queries, strict=True))
        for frequency in [int(report.frequencies[place] if fact.frequency is None else fact.frequency)]
    ]


def _proponents(report: EvaluationReport, ranking: Ranking, place: int) -> dict[str, object]:
    rows = ranking.rows[place]
    gold = {*report.facts[place].gold, *report.facts[place].gold_strict}
    ids = [report.pool.example_ids[row] for row in rows]
    fields: dict[str, object] = {
        "proponents": [report.pool.texts[row] for row in rows],
        "proponent_ids": ids,
        "proponent_scores": [float(score) for score in ranking.scores[place][: len(rows)]],
        "proponent_correct": [name in gold for name in ids],
    }
    if report.judgements is not None and all((place, row) in report.judgements for row in rows):
        fields["proponent_ais_scores"] = [float(report.judgements[place, row]) for row in rows]
    return fields
