"""Search, filter, sort and page through a result file's queries, and the metrics of those that match."""

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
    """Which queries are wanted, and in which order.

    Attributes:
        search: Words or part of a word that prompt, completion, name or relation hold, whatever their case.
        passages: Whether passages are searched too.
        relations: Any of these; empty is all.
        buckets: Any of these frequency buckets; empty is all.
        model_correct: Whether the model answers right; None is either.
        proponent_correct: Whether any proponent is right; None is either.
        score_min: The first proponent's score is at least this.
        score_max: And at most this.
        sort: By what.
        descending: Whether the largest come first.
    """

    search: str = ""
    passages: bool = False
    relations: frozenset[str] = frozenset()
    buckets: frozenset[str] = frozenset()
    model_correct: bool | None = None
    proponent_correct: bool | None = None
    score_min: float | None = None
    score_max: float | None = None
    sort: Sort = "file"
    descending: bool = False


def matching_places(file: ResultFile, wanted: QueryFilter) -> list[int]:
    """Lines of the file that match, in the order asked for; queries without what is sorted by come last."""
    lines = file.lines
    places = _matching(lines, wanted)
    if wanted.relations:
        places = [place for place in places if lines[place].relation in wanted.relations]
    if wanted.buckets:
        places = [place for place in places if lines[place].bucket in wanted.buckets]
    return _sorted(lines, places, wanted)


def query_page(files: Sequence[ResultFile], run: int, wanted: QueryFilter, *, offset: int, limit: int) -> QueryPage:
    """A page of the sidebar, the facets, and each run's metrics over the queries that match in the one browsed."""
    found = _found(tuple(files), run, wanted)
    lines = files[run].lines
    return QueryPage(
        total=len(lines),
        matching=len(found.places),
        offset=offset,
        items=[_row(files, lines[place]) for place in found.places[offset : offset + limit]],
        metrics=found.metrics,
        relations=found.relations,
        buckets=found.buckets,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What all pages of one filter share."""

    places: list[int]
    metrics: list[list[Metric]]
    relations: list[Facet]
    buckets: list[Facet]


@functools.lru_cache(maxsize=16)
def _found(files: tuple[ResultFile, ...], run: int, wanted: QueryFilter) -> _Found:
    file = files[run]
    lines = file.lines
    base = _matching(lines, wanted)
    in_relation = [p for p in base if not wanted.relations or lines[p].relation in wanted.relations]
    in_bucket = [p for p in base if not wanted.buckets or lines[p].bucket in wanted.buckets]
    chosen = set(in_bucket)
    places = _sorted(lines, [p for p in in_relation if p in chosen], wanted)
    names = [lines[place].example_id for place in places]
    metrics = []
    for other in files:
        same = places if other is file else [other.place_of[name] for name in names if name in other.place_of]
        metrics.append(run_metrics(other, same))
    return _Found(
        places=places,
        metrics=metrics,
        relations=_facets(lines[place].relation for place in in_bucket),
        buckets=_facets(lines[place].bucket for place in in_relation),
    )


def run_metrics(file: ResultFile, places: Sequence[int]) -> list[Metric]:
    """A run's metrics over some of its queries, with 95% intervals over them."""
    values = _values(file)[list(places)]
    return [
        Metric(name=name, explanation=explanation, unit=unit, estimate=estimate)
        for (name, explanation, unit), estimate in zip(_METRICS, estimates(values), strict=True)
    ]


def estimates(values: Float[np.ndarray, "queries metrics"]) -> list[Estimate | None]:
    """Each column's mean over the queries that have it (not NaN), with its 95% interval; None where none has.

    The interval is a bootstrap's, and the normal one above 10,000 queries. The bootstrap is Poisson's (each query
    counts Poisson(1) times in each of 1,000 draws) from a table made once, one product for all columns: metrics must
    follow a filter while a person types.
    """
    known = ~np.isnan(values)
    numbers = np.where(known, values, 0.0)
    counts = known.sum(axis=0)
    means = numbers.sum(axis=0) / np.maximum(counts, 1)
    if len(values) > _MOST_RESAMPLED:
        spread = np.sqrt((np.where(known, values - means, 0.0) ** 2).sum(axis=0) / np.maximum(counts - 1, 1))
        half = 1.96 * spread / np.sqrt(np.maximum(counts, 1))
        low, high = means - half, means + half
    else:
        weights = _weights(len(values))
        totals = weights @ known.astype(np.float32)
        drawn = (weights @ numbers.astype(np.float32)) / np.maximum(totals, 1)
        # A draw without any query that has the metric says nothing; with few queries there are some.
        drawn = np.where(totals > 0, drawn, means)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [
        Estimate(mean=float(mean), low=float(min(least, mean)), high=float(max(most, mean)), queries=int(count))
        if count
        else None
        for mean, least, most, count in zip(means, low, high, counts, strict=True)
    ]


_METRICS: tuple[tuple[str, str, Unit], ...] = (
    ("MRR", "Mean of 1 / rank of the first proponent that states the fact; 0 where none that is listed does.", "share"),
    (f"recall@{_AT}", f"Share of queries with at least one right proponent among the first {_AT}.", "share"),
    (f"precision@{_AT}", f"Share of the first {_AT} proponents that are right.", "share"),
    (f"entailing@{_AT}", f"Share of the first {_AT} proponents that a model judged to entail the fact.", "share"),
    ("model right", "Share of queries that the model answers right.", "share"),
    ("top score", "The first proponent's score, on average.", "number"),
)


def _values(file: ResultFile) -> Float[np.ndarray, "queries metrics"]:
    """Each query's value of each metric, NaN where it has none; made once a file."""
    held = _HELD.get(file)
    if held is None:
        held = _HELD[file] = np.array([_metrics_of(line) for line in file.lines], dtype=np.float64)
    return held


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


_HELD: WeakKeyDictionary[ResultFile, Float[np.ndarray, "queries metrics"]] = WeakKeyDictionary()


@functools.cache
def _weight_table() -> Float[np.ndarray, "draws queries"]:
    generator = np.random.default_rng(0)
    return generator.poisson(1.0, size=(_RESAMPLES, _MOST_RESAMPLED)).astype(np.float32)


def _weights(count: int) -> Float[np.ndarray, "draws queries"]:
    return _weight_table()[:, :count]


def prepare(files: Iterable[ResultFile]) -> None:
    """Make beforehand what the first page would wait for."""
    _weight_table()
    for file in files:
        _values(file)


def _matching(lines: Sequence[Line], wanted: QueryFilter) -> list[int]:
    """Lines that match everything but relation and bucket, in the file's order."""
    search = wanted.search.casefold()
    return [
        place
        for place, line in enumerate(lines)
        if (not search or search in line.query_text or (wanted.passages and search in line.passages_text))
        and (wanted.model_correct is None or line.model_correct is wanted.model_correct)
        and (
            wanted.proponent_correct is None
            or (line.correct is not None and any(line.correct) is wanted.proponent_correct)
        )
        and (wanted.score_min is None or (line.scores and line.scores[0] >= wanted.score_min))
        and (wanted.score_max is None or (line.scores and line.scores[0] <= wanted.score_max))
    ]


def _sorted(lines: Sequence[Line], places: list[int], wanted: QueryFilter) -> list[int]:
    if wanted.sort == "file":
        return places[::-1] if wanted.descending else places
    keys: dict[Sort, Callable[[Line], float | int | str | None]] = {
        "prompt": lambda line: line.prompt.casefold(),
        "relation": lambda line: None if line.relation is None else line.relation.casefold(),
        "frequency": lambda line: line.frequency,
        "score": lambda line: line.scores[0] if line.scores else None,
        "rank": lambda line: line.first_correct,
    }
    key = keys[wanted.sort]
    known = [place for place in places if key(lines[place]) is not None]
    known.sort(key=lambda place: key(lines[place]), reverse=wanted.descending)  # pyright: ignore[reportArgumentType, reportCallIssue]  # one type a key
    return known + [place for place in places if key(lines[place]) is None]


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
