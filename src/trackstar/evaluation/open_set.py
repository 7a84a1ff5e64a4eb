"""Open-set evaluation: a proponent is right when a model judges that it entails the fact (paper, §5.1).

Gold examples are those that somebody has listed. An entailment model finds others as well, but judges the first
proponents alone: what no method ranks high is never read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from trackstar.baselines import Pool
from trackstar.corpus import query_text
from trackstar.evaluation.entailment import THRESHOLD, entailment_scores, load_entailment_classifier
from trackstar.evaluation.facts import Fact, to_queries
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.workspace import Workspace
from trackstar.model.loading import pretrained_digest

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
    sources: dict[str, Any] = {"model": pretrained_digest(entailment_model)}
    lines = workspace.lines("entailment", sources)
    known = {line["pair"]: line["score"] for line in lines}
    digests = {(place, row): _digest(pool.texts[row], hypotheses[place]) for place, row in wanted}
    missing = [pair for pair in wanted if digests[pair] not in known]
    if missing:
        scorer = load_entailment_classifier(entailment_model, device=device)
        for first in range(0, len(missing), _PAIRS_AT_ONCE):
            part = missing[first : first + _PAIRS_AT_ONCE]
            scores = entailment_scores(
                [pool.texts[row] for _, row in part], [hypotheses[place] for place, _ in part], scorer,
                progress=progress,
            )  # fmt: skip
            new = {digests[pair]: score for pair, score in zip(part, scores.tolist(), strict=True)}
            known |= new
            lines.add([{"pair": pair, "score": score} for pair, score in new.items()])
    return {pair: known[digests[pair]] for pair in wanted}


def _digest(text: str, hypothesis: str) -> str:
    return hashlib.blake2b(json.dumps([text, hypothesis]).encode(), digest_size=16).hexdigest()


def open_set_metrics(
    ranking: Ranking, judgements: Judgements, *, at: int, threshold: float = THRESHOLD
) -> tuple[Float64[np.ndarray, "facts"], Float64[np.ndarray, "facts"]]:
    """Each fact's reciprocal rank of the first proponent that entails it, 0 where none of those judged does, and the
    share of the first `at` that entails it.

    Args:
        ranking: A method's first proponents.
        judgements: Of them all.
        at: k: how many count; what a ranking of fewer lacks entails nothing, as in `metrics_of_ranks`.
        threshold: Probability above which a proponent entails its fact (0.5 in the paper).
    """
    reciprocal, precision = np.zeros(len(ranking.rows)), np.zeros(len(ranking.rows))
    for place, rows in enumerate(ranking.rows):
        entailing = [judgements[place, row] > threshold for row in rows[:at]]
        if any(entailing):
            reciprocal[place] = 1 / (1 + entailing.index(True))
            precision[place] = sum(entailing) / at
    return reciprocal, precision
