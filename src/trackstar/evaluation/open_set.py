"""Open-set evaluation: a proponent is correct if a model judges that it entails the fact (paper, §5.1).

Gold examples are those that a file lists. An entailment model finds other examples too, but judges
only proponents: an example that no method ranks high is not read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from trackstar.baselines import Pool
from trackstar.corpus import query_text
from trackstar.corpus.digests import digest_of_json
from trackstar.evaluation.entailment import THRESHOLD, entailment_scores, load_entailment_classifier
from trackstar.evaluation.facts import Fact, to_queries
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.workspace import Workspace
from trackstar.model.loading import pretrained_digest

# Pairs judged before judgements are saved.
_PAIRS_PER_SAVE = 512

Judgements = Mapping[tuple[int, int], float]
"""(number of the fact, row of the candidate) to the probability that the candidate entails the fact."""


def judged_proponents(
    rankings: Mapping[str, Ranking],
    facts: Sequence[Fact],
    pool: Pool,
    entailment_model: str,
    workspace: Workspace,
    *,
    template: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Judgements:
    """Judge the first proponents of every method for every fact; judgements are saved as they are made.

    Args:
        rankings: Rankings of the methods.
        facts: The facts, in the order of the rankings; prompt and completion are the hypothesis.
        pool: The candidates.
        entailment_model: Folder or hub name; see `load_entailment_classifier`.
        workspace: Folder that judgements are saved in.
        template: Number of the prompt.
        device: Device of the entailment model.
        progress: Whether progress is shown.

    Raises:
        ModelError: The model cannot be used.
    """
    hypotheses = [query_text(query) for query in to_queries(facts, template)]
    wanted = dict.fromkeys(
        (number, row)
        for ranking in rankings.values()
        for number, rows in enumerate(ranking.rows)
        if facts[number].kind == "fact"
        for row in rows
    )
    sources: dict[str, Any] = {"model": pretrained_digest(entailment_model)}
    lines = workspace.lines("entailment", sources)
    scores_by_digest = {line["pair"]: line["score"] for line in lines}
    digests = {(number, row): _digest(pool.texts[row], hypotheses[number]) for number, row in wanted}
    missing = [pair for pair in wanted if digests[pair] not in scores_by_digest]
    if missing:
        scorer = load_entailment_classifier(entailment_model, device=device)
        for first in range(0, len(missing), _PAIRS_PER_SAVE):
            part = missing[first : first + _PAIRS_PER_SAVE]
            scores = entailment_scores(
                [pool.texts[row] for _, row in part], [hypotheses[number] for number, _ in part], scorer,
                progress=progress,
            )  # fmt: skip
            new = {digests[pair]: score for pair, score in zip(part, scores.tolist(), strict=True)}
            scores_by_digest |= new
            lines.add([{"pair": digest, "score": score} for digest, score in new.items()])
    return {pair: scores_by_digest[digests[pair]] for pair in wanted}


def _digest(text: str, hypothesis: str) -> str:
    return digest_of_json([text, hypothesis])


def open_set_metrics(
    ranking: Ranking, judgements: Judgements, *, at: int, threshold: float = THRESHOLD
) -> tuple[Float64[np.ndarray, "facts"], Float64[np.ndarray, "facts"]]:
    """Reciprocal rank of each fact's first proponent that entails it, and share of the first k that do.

    Args:
        ranking: A method's first proponents.
        judgements: Judgements of all of them; a question none of whose proponents is judged has values
            of NaN.
        at: k. If a ranking has fewer proponents, the missing ones entail nothing, as in
            `metrics_of_ranks`.
        threshold: Probability above which a proponent entails its fact; 0.5 in the paper.

    Returns:
        Reciprocal ranks, 0 if no judged proponent entails the fact, and shares.
    """
    reciprocal, precision = np.zeros(len(ranking.rows)), np.zeros(len(ranking.rows))
    for number, rows in enumerate(ranking.rows):
        if rows and not any((number, row) in judgements for row in rows):
            reciprocal[number] = precision[number] = np.nan
            continue
        entailing = [judgements[number, row] > threshold for row in rows[:at]]
        if any(entailing):
            reciprocal[number] = 1 / (1 + entailing.index(True))
            precision[number] = sum(entailing) / at
    return reciprocal, precision
