"""Search, filter, sort and page through a result file's queries, and compute metrics of those that match."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float

from trackstar.explorer.result_files import Line, ResultFile
from trackstar.explorer.schemas import Estimate, Facet, Metric, QueryPage, QueryRow, Sort

Unit = Literal["share", "number"]

_LONGEST_ROW = 300
_MOST_FACETS = 500
_AT = 10
_RESAMPLES = 1000
_MOST_RESAMPLED = 10_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueryFilter:
    """Which queries to list, and in which order.

    Attributes:
        search: Text that the prompt, completion, name or relation contains, in any case.
        search_candidates: Whether the candidates' texts are searched too.
        relations: Relations to list; empty lists all.
        buckets: Frequency buckets to list; empty lists all.
        kinds: Kinds of questions to list; empty lists all.
        model_correct: Whether the model answers correctly; None is either.
        proponent_correct: Whether any proponent is correct; None is either.
        score_min: Lowest score of the first proponent.
        score_max: Highest score of the first proponent.
        sort: Sort key.
        descending: Whether the largest come first.
    """

    search: str = ""
    search_candidates: bool = False
    relations: frozenset[str] = frozenset()
    buckets: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    model_correct: bool | None = None
    proponent_correct: bool | None = None
    score_min: float | None = None
    score_max: float | None = None
    sort: Sort = "file"
    descending: bool = False


def matching_places(file: ResultFile, filters: QueryFilter) -> list[int]:
    """Positions of the matching lines, sorted; queries without a sort key come last."""
    chosen = [_in_facets(line, filters) for line in file.lines]
    return _sorted(file.lines, [place for place in _matching(file.lines, filters) if all(chosen[place])], filters)


def query_page(files: Sequence[ResultFile], run: int, filters: QueryFilter, *, offset: int, limit: int) -> QueryPage:
    """A page of the sidebar, the facets, and each run's metrics over the listed run's matching queries."""
    matches = _matches(tuple(files), run, filters)
    lines = files[run].lines
    return QueryPage(
        total=len(lines),
        matching=len(matches.places),
        offset=offset,
        items=[_row(files, lines[place]) for place in matches.places[offset : offset + limit]],
        metrics=matches.metrics,
        relations=matches.relations,
        buckets=matches.buckets,
        kinds=matches.kinds,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Matches:
    """The matching queries with their metrics and facets, shared by all pages of one filter."""

    places: list[int]
    metrics: list[list[Metric]]
    relations: list[Facet]
    buckets: list[Facet]
    kinds: list[Facet]


@functools.lru_cache(maxsize=16)
def _matches(files: tuple[ResultFile, ...], run: int, filters: QueryFilter) -> _Matches:
    file = files[run]
    lines = file.lines
    base = _matching(lines, filters)
    chosen = {place: _in_facets(lines[place], filters) for place in base}
    places = _sorted(lines, [place for place in base if all(chosen[place])], filters)

    def facets(number: int, value: Callable[[Line], str | None]) -> list[Facet]:
        """Values among the lines that match all other facets."""
        return _facets(
            value(lines[place]) for place in base if all(chosen[place][:number] + chosen[place][number + 1 :])
        )

    names = [lines[place].example_id for place in places]
    metrics = []
    for other in files:
        same = places if other is file else [other.place_of[name] for name in names if name in other.place_of]
        metrics.append(run_metrics(other, same))
    return _Matches(
        places=places,
        metrics=metrics,
        relations=facets(0, lambda line: line.relation),
        buckets=facets(1, lambda line: line.bucket),
        kinds=facets(2, lambda line: line.kind),
    )


def _in_facets(line: Line, filters: QueryFilter) -> tuple[bool, bool, bool]:
    """Whether a line has a chosen relation, bucket and kind."""
    return (
        not filters.relations or line.relation in filters.relations,
        not filters.buckets or line.bucket in filters.buckets,
        not filters.kinds or line.kind in filters.kinds,
    )


def run_metrics(file: ResultFile, places: Sequence[int]) -> list[Metric]:
    """A run's metrics over some of its queries, with 95% intervals."""
    values = _values(file)[list(places)]
    return [
        Metric(name=name, explanation=explanation, unit=unit, estimate=estimate)
        for (name, explanation, unit), estimate in zip(_METRICS, estimates(values), strict=True)
    ]


def estimates(values: Float[np.ndarray, "queries metrics"]) -> list[Estimate | None]:
    """Mean of each column with its 95% interval, over the queries that have a value; None if no query has.

    Queries without a value are NaN. Up to 10,000 queries the interval is a Poisson bootstrap's: each query
    counts Poisson(1) times in each of 1,000 draws. The counts come from one cached table, so that all
    columns take one matrix product and metrics keep up with a filter while the user types. Above 10,000
    queries it is the normal interval.
    """
    present = ~np.isnan(values)
    numbers = np.where(present, values, 0.0)
    counts = present.sum(axis=0)
    means = numbers.sum(axis=0) / np.maximum(counts, 1)
    if len(values) > _MOST_RESAMPLED:
        spread = np.sqrt((np.where(present, values - means, 0.0) ** 2).sum(axis=0) / np.maximum(counts - 1, 1))
        half = 1.96 * spread / np.sqrt(np.maximum(counts, 1))
        low, high = means - half, means + half
    else:
        weights = _weights(len(values))
        totals = weights @ present.astype(np.float32)
        drawn = (weights @ numbers.astype(np.float32)) / np.maximum(totals, 1)
        # With few queries, a draw may hold no query that has the metric.
        drawn = np.where(totals > 0, drawn, means)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [
        Estimate(mean=float(mean), low=float(min(least, mean)), high=float(max(most, mean)), queries=int(count))
        if count
        else None
        for mean, least, most, count in zip(means, low, high, counts, strict=True)
    ]


_METRICS: tuple[tuple[str, str, Unit], ...] = (
    ("MRR", "Mean of 1 / rank of the first proponent that states the fact; 0 if no listed proponent does.", "share"),
    (f"recall@{_AT}", f"Share of queries with at least one correct proponent among the first {_AT}.", "share"),
    (f"precision@{_AT}", f"Share of the first {_AT} proponents that are correct.", "share"),
    (f"entailing@{_AT}", f"Share of the first {_AT} proponents that a model judged to entail the fact.", "share"),
    ("model accuracy", "Share of queries that the model answers correctly.", "share"),
    ("top score", "Mean score of the first proponent.", "number"),
)


def _values(file: ResultFile) -> Float[np.ndarray, "queries metrics"]:
    """Each query's value of each metric, or NaN; computed once per file."""
    values = _VALUES.get(file)
    if values is None:
        values = _VALUES[file] = np.array([_metrics_of(line) for line in file.lines], dtype=np.float64)
    return values


def _metrics_of(line: Line) -> tuple[float, ...]:
    missing = math.nan
    correct, entailing = (None if marks is None else marks[:_AT] for marks in (line.correct, line.entailing))
    return (
        missing if line.correct is None else 1 / line.first_correct if line.first_correct else 0.0,
        missing if correct is None else float(any(correct)),
        sum(correct) / len(correct) if correct else missing,
        sum(entailing) / len(entailing) if entailing else missing,
        missing if line.model_correct is None else float(line.model_correct),
        line.scores[0] if line.scores else missing,
    )


_VALUES: WeakKeyDictionary[ResultFile, Float[np.ndarray, "queries metrics"]] = WeakKeyDictionary()


@functools.cache
def _weight_table() -> Float[np.ndarray, "draws queries"]:
    generator = np.random.default_rng(0)
    return generator.poisson(1.0, size=(_RESAMPLES, _MOST_RESAMPLED)).astype(np.float32)


def _weights(count: int) -> Float[np.ndarray, "draws queries"]:
    return _weight_table()[:, :count]


def prepare(files: Iterable[ResultFile]) -> None:
    """Compute in advance what the first page would wait for."""
    _weight_table()
    for file in files:
        _values(file)


def _matching(lines: Sequence[Line], filters: QueryFilter) -> list[int]:
    """Lines that match all filters except relation, bucket and kind, in the file's order."""
    search = filters.search.casefold()
    return [
        place
        for place, line in enumerate(lines)
        if (not search or search in line.query_text or (filters.search_candidates and search in line.candidates_text))
        and (filters.model_correct is None or line.model_correct is filters.model_correct)
        and (
            filters.proponent_correct is None
            or (line.correct is not None and any(line.correct) is filters.proponent_correct)
        )
        and (filters.score_min is None or (line.scores and line.scores[0] >= filters.score_min))
        and (filters.score_max is None or (line.scores and line.scores[0] <= filters.score_max))
    ]


def _sorted(lines: Sequence[Line], places: list[int], filters: QueryFilter) -> list[int]:
    if filters.sort == "file":
        return places[::-1] if filters.descending else places
    keys: dict[Sort, Callable[[Line], float | int | str | None]] = {
        "prompt": lambda line: line.prompt.casefold(),
        "relation": lambda line: None if line.relation is None else line.relation.casefold(),
        "frequency": lambda line: line.frequency,
        "score": lambda line: line.scores[0] if line.scores else None,
        "rank": lambda line: line.first_correct,
    }
    key = keys[filters.sort]
    with_key = [place for place in places if key(lines[place]) is not None]
    with_key.sort(key=lambda place: key(lines[place]), reverse=filters.descending)  # pyright: ignore[reportArgumentType, reportCallIssue]  # one type per key
    return with_key + [place for place in places if key(lines[place]) is None]


def _row(files: Sequence[ResultFile], line: Line) -> QueryRow:
    return QueryRow(
        places=[file.place_of.get(line.example_id) for file in files],
        example_id=line.example_id,
        prompt=line.prompt[:_LONGEST_ROW],
        completion=line.completion[:_LONGEST_ROW],
        relation=line.relation,
        bucket=line.bucket,
        frequency=line.frequency,
        model_correct=line.model_correct,
        score=line.scores[0] if line.scores else None,
        rank=line.first_correct,
    )


def _facets(values: Iterable[str | None]) -> list[Facet]:
    counts = Counter(value for value in values if value is not None)
    return [Facet(value=value, queries=count) for value, count in counts.most_common(_MOST_FACETS)]
