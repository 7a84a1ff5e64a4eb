"""Tail-patch of the methods' proponents, each pair measured once for all methods that share it (paper, §5.2)."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from trackstar.corpus import tokenize_query
from trackstar.evaluation.config import TailPatchConfig
from trackstar.evaluation.facts import Fact, to_queries
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.workspace import Workspace
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import Index
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

# Proponents between two times that what was measured is kept.
_PROPONENTS_AT_ONCE = 64

Effects = Mapping[tuple[int, int], float]
"""The change of probability, a fraction, by place of the query and row of the proponent."""


def chosen_queries(facts: Sequence[Fact], count: int) -> list[int]:
    """Places of `count` facts, or all where it is 0, the first in an order drawn by name; ascending."""
    order = sorted(range(len(facts)), key=lambda n: hashlib.blake2b(facts[n].fact_id.encode()).digest())
    return sorted(order[: count or len(facts)])


def measured_effects(
    rankings: Mapping[str, Ranking],
    facts: Sequence[Fact],
    index: Index,
    model: LanguageModel,
    step: TrainingStep,
    config: TailPatchConfig,
    workspace: Workspace,
    *,
    learning_rate: float | None = None,
    template: int = 0,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Effects:
    """The effect of every (query, proponent) pair that some method ranks high enough.

    Measured pairs are kept in the report's folder as they come: an interrupted run goes on with the others.

    Args:
        rankings: The methods' rankings, whose first max(top_k) proponents count.
        facts: The queries' facts, in the rankings' order.
        index: Whose rows the rankings name.
        model: The model, which the step starts from.
        step: The training step.
        config: Which queries, how many proponents, which path.
        workspace: Where pairs are kept.
        learning_rate: The step's, where it is not that of the model's own training; part of what pairs are kept by.
        template: Which prompt is asked.
        batch_tokens: Most tokens of a batch.
        progress: Whether a bar may be shown.
    """
    asked_for = to_queries(facts, template)
    queries = [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in asked_for]
    deepest = max(config.top_k)
    wanted: dict[int, list[int]] = {}  # row of a proponent to the queries' places
    for query in chosen_queries(facts, config.queries):
        for row in dict.fromkeys(row for ranking in rankings.values() for row in ranking.rows[query][:deepest]):
            wanted.setdefault(row, []).append(query)
    sources: dict[str, Any] = {
        "model": model.digest(),
        "tokenizer": model.tokenizer_digest(),
        "index": index.manifest.to_json(),
        "step": step.description,
        "learning_rate": learning_rate,
        "template": template,
        "path": config.path,
    }
    name = hashlib.blake2b(f"{step.description} {learning_rate!r}".encode(), digest_size=4).hexdigest()
    lines = workspace.lines(f"tail patch/{name}", sources)
    place_of = {
        (fact.fact_id, q.prompt, q.completion): n for n, (fact, q) in enumerate(zip(facts, asked_for, strict=True))
    }
    found: dict[tuple[int, int], float] = {}
    for line in lines:
        place = place_of.get((line["fact_id"], line["prompt"], line["completion"]))
        if place is not None:
            found[place, line["row"]] = line["after"] - line["before"]
    missing = {row: [q for q in asked if (q, row) not in found] for row, asked in sorted(wanted.items())}
    rows = [row for row, asked in missing.items() if asked]
    with Progress("Tail-patch", unit="proponents", total=len(rows), shown=progress) as bar:
        for first in range(0, len(rows), _PROPONENTS_AT_ONCE):
            part = rows[first : first + _PROPONENTS_AT_ONCE]
            pairs = [Pair(query=q, proponent=place) for place, row in enumerate(part) for q in missing[row]]
            proponents = [stored.example for stored in index.some_examples(part)]
            result = tail_patch(
                model, step, queries, proponents, pairs,
                path=config.path,  # pyright: ignore[reportArgumentType]  # one of the two: `EvaluationConfig`
                batch_tokens=batch_tokens,
            )  # fmt: skip
            new = []
            for pair, before, after in zip(pairs, result.before, result.after, strict=True):
                row = part[pair.proponent]
                found[pair.query, row] = float(after - before)
                query = asked_for[pair.query]
                names = {"fact_id": facts[pair.query].fact_id, "prompt": query.prompt, "completion": query.completion}
                new.append(names | {"row": row, "before": float(before), "after": float(after)})
            lines.add(new)
            bar.advance(len(part))
    return found


def mean_effects(ranking: Ranking, effects: Effects, queries: Sequence[int], k: int) -> Float64[np.ndarray, "queries"]:
    """Each query's mean effect over a method's first k proponents, a fraction.

    A gold ranking's query with fewer than k gold examples is averaged over those that the ranking lists.
    """
    return np.array([np.mean([effects[query, row] for row in ranking.rows[query][:k]]) for query in queries])
