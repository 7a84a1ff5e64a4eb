"""All candidates of an answer: histogram of influence, scatter against lexical overlap, groups by
metadata.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from trackstar.explorer.question_schemas import Group, Groups, Insight, Point

_BINS = 60
_SAMPLED = 1500
_LONGEST_TEXT = 200
_MOST_GROUPS = 200


def insight(
    influences: Float[np.ndarray, "candidates"],
    overlaps: Float[np.ndarray, "candidates"] | None,
    shown: Collection[int],
    text_of: Mapping[int, str],
) -> Insight:
    """Histogram of all influences, and a scatter of influence against lexical overlap for a sample.

    Args:
        influences: Influence (Eq. 1) of every candidate.
        overlaps: BM25 score of every candidate; None if it was not computed, which leaves the scatter empty.
        shown: Rows that a ranking shows.
        text_of: Texts of the rows in `scatter_rows`.
    """
    low, high = float(influences.min()), float(influences.max())
    counts, edges = np.histogram(influences, bins=_BINS, range=(low, high if high > low else low + 1e-6))
    points = []
    if overlaps is not None:
        points = [
            Point(
                row=row,
                influence=float(influences[row]),
                overlap=float(overlaps[row]),
                shown=row in shown,
                text=text_of[row][:_LONGEST_TEXT],
            )
            for row in scatter_rows(len(influences), shown)
        ]
    return Insight(
        candidates=len(influences),
        edges=edges.tolist(),
        counts=counts.tolist(),
        shown=sorted((float(influences[row]) for row in shown), reverse=True),
        mean=float(influences.mean(dtype=np.float64)),
        deviation=float(influences.std(dtype=np.float64)),
        points=points,
        correlation=None if overlaps is None else rank_correlation(influences, overlaps),
    )


def scatter_rows(candidates: int, shown: Collection[int]) -> list[int]:
    """The shown rows and a uniform sample of the others, ascending; the same sample at every call."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(candidates, size=min(candidates, _SAMPLED), replace=False)
    return sorted({*map(int, drawn), *shown})


def rank_correlation(first: Float[np.ndarray, "values"], second: Float[np.ndarray, "values"]) -> float | None:
    """Spearman's rank correlation; ties share their mean rank. None if one side is constant."""
    a, b = (_mean_ranks(values) for values in (first, second))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def groups(
    field: str,
    method: str,
    rows: Sequence[int],
    scores: Sequence[float],
    values: Sequence[str],
    in_corpus: Mapping[str, float] | None,
) -> Groups:
    """Top candidates grouped by a field of their records; the groups with most influence come first.

    Args:
        field: The field.
        method: The method that ranks the candidates.
        rows: The candidates' rows.
        scores: The candidates' scores.
        values: The candidates' values of the field; empty for a record without the field.
        in_corpus: Each value's share of the whole corpus, if computed.
    """
    sums: dict[str, float] = defaultdict(float)
    for value, score in zip(values, scores, strict=True):
        sums[value] += score
    counts = Counter(values)
    positive = sum(score for score in scores if score > 0)
    by_value = [
        Group(
            value=value,
            candidates=counts[value],
            influence=total,
            share=max(0.0, total) / positive if positive else 0.0,
            in_corpus=None if in_corpus is None else in_corpus.get(value, 0.0),
        )
        for value, total in sums.items()
    ]
    by_value.sort(key=lambda group: (-group.influence, group.value))
    return Groups(field=field, method=method, top=len(rows), groups=by_value[:_MOST_GROUPS])


def _mean_ranks(values: Float[np.ndarray, "values"]) -> Float[np.ndarray, "values"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse].astype(np.float64)
