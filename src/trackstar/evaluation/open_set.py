"""Open-set evaluation: a proponent is right when a model judges that it entails the fact (paper, §5.1).

Gold examples are those that somebody has listed. An entailment model finds others as well, but judges the first
proponents alone: what no method ranks high is never read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from trackstar.baselines import Pool
from trackstar.evaluation.entailment import THRESHOLD, entailment_scores, load_entailment_classifier
from trackstar.evaluation.facts import Fact, to_queries
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.workspace import Workspace
from trackstar.examples import query_text

# Pairs between two times that what was judged is kept.
_PAIRS_AT_ONCE = 512

Judgements = Mapping[tuple[int, int], float]
"""The probability that a candidate entails a fact, by the fact's place and the candidate's row."""


def judged_proponents(
    rankings: Mapping[str, Ranking],
    facts: Sequence[Fact],
    pool: Pool,
    entailment_model: str,
    workspace: Workspace,
    *,
    template: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Judgements:
    """Judge every proponent that some method ranks among its first; what is judged is kept as it comes.

    Args:
        rankings: The methods' rankings.
        facts: The facts, in the rankings' order; prompt and completion are the hypothesis.
        pool: The candidates.
        entailment_model: Folder or hub name; see `load_entailment_classifier`.
        workspace: Where judgements are kept.
        template: Which prompt.
        device: Where the model runs.
        progress: Whether a bar may be shown.

    Raises:
        ModelError: The model cannot be used.
    """
    hypotheses = [query_text(query) for query in to_queries(facts, template)]
    wanted = dict.fromkeys(
        (place, row) for ranking in rankings.values() for place, rows in enumerate(ranking.rows) for row in rows
    )
    sources: dict[str, Any] = {"model": entailment_model, "template": template, "candidates": list(pool.example_ids)}
    lines = workspace.lines("entailment", sources)
    place_of = {fact.fact_id: place for place, fact in enumerate(facts)}
    found = {(place_of[line["fact_id"]], line["row"]): line["score"] for line in lines if line["fact_id"] in place_of}
    missing = [pair for pair in wanted if pair not in found]
    if missing:
        scorer = load_entailment_classifier(entailment_model, device=device)
        for first in range(0, len(missing), _PAIRS_AT_ONCE):
            part = missing[first : first + _PAIRS_AT_ONCE]
            scores = entailment_scores(
                [pool.texts[row] for _, row in part], [hypotheses[place] for place, _ in part], scorer,
                progress=progress,
            )  # fmt: skip
            found |= dict(zip(part, scores.tolist(), strict=True))
            lines.add(
                [{"fact_id": facts[place].fact_id, "row": row, "score": found[place, row]} for place, row in part]
            )
    return {pair: found[pair] for pair in wanted}


def open_set_metrics(
    ranking: Ranking, judgements: Judgements, *, threshold: float = THRESHOLD
) -> tuple[Float64[np.ndarray, "facts"], Float64[np.ndarray, "facts"]]:
    """Each fact's reciprocal rank of the first proponent that entails it, 0 where none of those judged does, and the
    share of those judged that entail it.

    Args:
        ranking: A method's first proponents.
        judgements: Of them all.
        threshold: Probability above which a proponent entails its fact (0.5 in the paper).
    """
    reciprocal, precision = np.zeros(len(ranking.rows)), np.zeros(len(ranking.rows))
    for place, rows in enumerate(ranking.rows):
        entailing = [judgements[place, row] > threshold for row in rows]
        if any(entailing):
            reciprocal[place] = 1 / (1 + entailing.index(True))
            precision[place] = np.mean(entailing)
    return reciprocal, precision
