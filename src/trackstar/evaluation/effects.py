"""Tail-patch of the methods' proponents; a pair that several methods share is measured once (paper, §5.2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from trackstar.corpus import Query, tokenize_query
from trackstar.corpus.digests import digest_of_bytes, draw_bytes
from trackstar.evaluation.config import TailPatchConfig
from trackstar.evaluation.facts import Fact, to_queries
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.workspace import GrowingLines, Workspace
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import Index
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

# Proponents whose pairs are measured before results are saved.
_PROPONENTS_PER_SAVE = 64

Effects = Mapping[tuple[int, int], float]
"""(number of the query, row of the proponent) to the change of the completion's probability, a fraction."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """What effects are measured with, and of which queries.

    Attributes:
        facts: The queries' facts, in the order of the rankings.
        template: Number of the prompt.
        index: The index whose rows the rankings name.
        model: The model that each step starts from.
        step: The training step.
        learning_rate: The step's learning rate; None if it is that of the model's own training.
            Results are saved by it.
        config: Number of queries and proponents, and the path.
        batch_tokens: Most tokens per batch.
    """

    facts: Sequence[Fact]
    template: int
    index: Index
    model: LanguageModel
    step: TrainingStep
    learning_rate: float | None
    config: TailPatchConfig
    batch_tokens: int

    def lines(self, workspace: Workspace) -> GrowingLines:
        """The saved results of the same measurement."""
        sources: dict[str, Any] = {
            "model": self.model.digest(),
            "tokenizer": self.model.tokenizer_digest(),
            "index": self.index.manifest.to_json(),
            "step": self.step.description,
            "learning_rate": self.learning_rate,
            "template": self.template,
            "path": self.config.path,
        }
        name = digest_of_bytes(f"{self.step.description} {self.learning_rate!r}".encode(), bits=32)
        return workspace.lines(f"tail patch/{name}", sources)


def chosen_queries(facts: Sequence[Fact], count: int) -> list[int]:
    """Numbers of `count` facts, ascending: the first in an order drawn by id; all facts if `count` is 0."""
    order = sorted(range(len(facts)), key=lambda n: draw_bytes(facts[n].fact_id.encode(), bits=512))
    return sorted(order[: count or len(facts)])


def measured_effects(
    rankings: Mapping[str, Ranking], measurement: Measurement, workspace: Workspace, *, progress: bool = True
) -> Effects:
    """Measure every (query, proponent) pair among the first max(`top_k`) proponents of a method.

    Results are saved in the report's folder as they are computed: an interrupted run resumes with
    the other pairs.

    Args:
        rankings: Rankings of the methods.
        measurement: Model, index, training step and queries.
        workspace: Folder that results are saved in.
        progress: Whether progress is shown.
    """
    queries = to_queries(measurement.facts, measurement.template)
    model = measurement.model
    tokenized = [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]
    lines = measurement.lines(workspace)
    effects = _saved_effects(lines, measurement.facts, queries)
    wanted = _wanted_pairs(rankings, measurement.facts, measurement.config)
    missing = {row: [q for q in numbers if (q, row) not in effects] for row, numbers in sorted(wanted.items())}
    missing = {row: numbers for row, numbers in missing.items() if numbers}
    rows = list(missing)
    with Progress("Tail-patch", unit="proponents", total=len(rows), shown=progress) as bar:
        for first in range(0, len(rows), _PROPONENTS_PER_SAVE):
            part = rows[first : first + _PROPONENTS_PER_SAVE]
            pairs = [Pair(query=q, proponent=place) for place, row in enumerate(part) for q in missing[row]]
            result = tail_patch(
                model,
                measurement.step,
                tokenized,
                [stored.example for stored in measurement.index.some_examples(part)],
                pairs,
                path=measurement.config.path,
                batch_tokens=measurement.batch_tokens,
            )
            new_lines = []
            for pair, before, after in zip(pairs, result.before, result.after, strict=True):
                row, query = part[pair.proponent], queries[pair.query]
                effects[pair.query, row] = float(after - before)
                fact_id = measurement.facts[pair.query].fact_id
                key = {"fact_id": fact_id, "prompt": query.prompt, "completion": query.completion}
                new_lines.append(key | {"row": row, "before": float(before), "after": float(after)})
            lines.add(new_lines)
            bar.advance(len(part))
    return effects


def _wanted_pairs(
    rankings: Mapping[str, Ranking], facts: Sequence[Fact], config: TailPatchConfig
) -> dict[int, list[int]]:
    """Row of a proponent to the numbers of the queries that it is a first proponent of, for any method."""
    deepest = max(config.top_k)
    wanted: dict[int, list[int]] = {}
    for query in chosen_queries(facts, config.queries):
        for row in dict.fromkeys(row for ranking in rankings.values() for row in ranking.rows[query][:deepest]):
            wanted.setdefault(row, []).append(query)
    return wanted


def _saved_effects(
    lines: GrowingLines, facts: Sequence[Fact], queries: Sequence[Query]
) -> dict[tuple[int, int], float]:
    """Effects that an earlier run saved for these queries."""
    number_of = {
        (fact.fact_id, query.prompt, query.completion): number
        for number, (fact, query) in enumerate(zip(facts, queries, strict=True))
    }
    effects: dict[tuple[int, int], float] = {}
    for line in lines:
        number = number_of.get((line["fact_id"], line["prompt"], line["completion"]))
        if number is not None:
            effects[number, line["row"]] = line["after"] - line["before"]
    return effects


def mean_effects(ranking: Ranking, effects: Effects, queries: Sequence[int], k: int) -> Float64[np.ndarray, "queries"]:
    """Each query's mean effect over a method's first k proponents, a fraction.

    If the ranking lists fewer than k, as the gold ranking of a fact with fewer gold examples does,
    the mean is over those; it is NaN where it lists none.
    """
    means = []
    for query in queries:
        rows = ranking.rows[query][:k]
        means.append(np.mean([effects[query, row] for row in rows]) if rows else np.nan)
    return np.array(means)
