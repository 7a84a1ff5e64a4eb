"""Routes that browse result files and export them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator
from pydantic.json_schema import SkipJsonSchema

from trackstar.choices import Kind
from trackstar.explorer.browsing import QueryFilter, matching_places, query_page
from trackstar.explorer.candidates import LONGEST_RAW, candidate_text, query_record, text_part
from trackstar.explorer.downloads import download, export
from trackstar.explorer.exports import MEDIA_TYPES, MOST_IN_HTML, ExportedQuery, ExportFormat
from trackstar.explorer.refusals import MissingError, refusals
from trackstar.explorer.result_files import LARGEST_SCORE, ResultFile
from trackstar.explorer.schemas import LONGEST_SEARCH, PAGE, QueryPage, QueryRecord, Side, Sort, Text

_PREFIX = "/api/runs/{run}"
Value = Annotated[str, Query(max_length=LONGEST_SEARCH)]
Values = Annotated[list[Annotated[str, Query(max_length=LONGEST_SEARCH)]], Query(max_length=200)]
YesNo = Literal["yes", "no"]
EXPORTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {kind.partition(";")[0]: {} for kind in MEDIA_TYPES.values()}}
}
"""The description of a route that answers with a file."""


def _flag(value: object) -> object:
    if value not in ("true", "false"):
        raise ValueError("Input should be true or false")
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
Absent = SkipJsonSchema[None]  # a parameter can be left out, but has no value that says so
Score = Annotated[float, Query(ge=-LARGEST_SCORE, le=LARGEST_SCORE)]


def _facets_from_parameters(
    relation: Values = [],  # noqa: B006 - the framework copies defaults
    bucket: Values = [],  # noqa: B006 - likewise
    kind: Annotated[list[Kind], Query(max_length=200)] = [],  # noqa: B006 - likewise
) -> QueryFilter:
    return QueryFilter(relations=frozenset(relation), buckets=frozenset(bucket), kinds=frozenset(kind))


def _filter_from_parameters(
    facets: Annotated[QueryFilter, Depends(_facets_from_parameters)],
    search: Value = "",
    search_candidates: Flag = False,
    model_correct: YesNo | Absent = None,
    proponent_correct: YesNo | Absent = None,
    score_min: Score = -LARGEST_SCORE,
    score_max: Score = LARGEST_SCORE,
    sort: Sort = "file",
    descending: Flag = False,
) -> QueryFilter:
    return dataclasses.replace(
        facets,
        search=search,
        search_candidates=search_candidates,
        model_correct=None if model_correct is None else model_correct == "yes",
        proponent_correct=None if proponent_correct is None else proponent_correct == "yes",
        score_min=score_min if score_min > -LARGEST_SCORE else None,
        score_max=score_max if score_max < LARGEST_SCORE else None,
        sort=sort,
        descending=descending,
    )


FilterParameters = Annotated[QueryFilter, Depends(_filter_from_parameters)]


def result_routes(files: Sequence[ResultFile]) -> APIRouter:
    """Routes that list a run's queries and show one of them."""
    router = APIRouter(prefix=_PREFIX, responses=refusals(404, 422))

    @router.get("/queries")
    def queries(
        run: int,
        filters: FilterParameters,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 50,
    ) -> QueryPage:
        """One page of the matching queries, with metrics over all matching queries."""
        _run(files, run)
        return query_page(files, run, filters, offset=offset, limit=limit)

    @router.get("/queries/{place}")
    def query(run: int, place: int) -> QueryRecord:
        """One query with its candidates."""
        return query_record(_run(files, run, place), run, place)

    @router.get("/queries/{place}/raw")
    def raw(run: int, place: int) -> Text:
        """The query's line as it is in the file; only the beginning of a long line."""
        return text_part(_run(files, run, place).raw[place].decode("utf-8", "replace"), 0, LONGEST_RAW)

    @router.get("/queries/{place}/{side}/{rank}/text")
    def text(run: int, place: int, side: Side, rank: int, start: Annotated[int, Query(ge=0)] = 0) -> Text:
        """Part of a candidate's text."""
        file = _run(files, run, place)
        try:
            return text_part(candidate_text(file, place, side, rank), start)
        except IndexError:
            raise MissingError(f"query {place} has no {side} of rank {rank}") from None

    return router


def export_routes(files: Sequence[ResultFile]) -> APIRouter:
    """Routes that download matching queries, or one query."""
    router = APIRouter(prefix=_PREFIX, responses=refusals(404, 422) | EXPORTED)

    @router.get("/export", response_class=StreamingResponse, responses=refusals(400))
    def export_all(run: int, filters: FilterParameters, format: ExportFormat) -> StreamingResponse:
        """All matching queries: their candidates as CSV or HTML, or their lines."""
        file = _run(files, run)
        places = matching_places(file, filters)
        if format == "jsonl":
            return download((f"{file.json_line(place)}\n" for place in places), format, file.name)
        if format == "html" and len(places) > MOST_IN_HTML:
            raise HTTPException(
                400, f"{len(places):,} queries match, and one page holds {MOST_IN_HTML}; filter, or take CSV or JSONL"
            )
        return export((query for place in places for query in _exported(files, [run], place)), format, file.name)

    @router.get("/queries/{place}/export", response_class=StreamingResponse)
    def export_one(run: int, place: int, format: ExportFormat, other: int | Absent = None) -> StreamingResponse:
        """One query, also from another run if given: its candidates as CSV or HTML, or its line."""
        file = _run(files, run, place)
        runs = [run]
        if other is not None and _run(files, other) is not file:
            runs.append(other)
        if format == "jsonl":
            name = file.lines[place].example_id
            places = [(files[r], files[r].place_of.get(name)) for r in runs]
            lines = (f"{f.json_line(at)}\n" for f, at in places if at is not None)
            return download(lines, format, file.name)
        return export(_exported(files, runs, place), format, file.name)

    return router


def _run(files: Sequence[ResultFile], run: int, place: int | None = None) -> ResultFile:
    """A run's file; 404 if there is no such run, or no such query in it."""
    if not 0 <= run < len(files):
        raise MissingError(f"run {run}: expected 0 to {len(files) - 1}")
    file = files[run]
    if place is not None and not 0 <= place < len(file.lines):
        raise MissingError(f"query {place}: expected 0 to {len(file.lines) - 1}")
    return file


def _exported(files: Sequence[ResultFile], runs: Sequence[int], place: int) -> list[ExportedQuery]:
    """A query of the first run, with its rankings in every run that has it; one for each completion that
    the runs explain.
    """
    name = files[runs[0]].lines[place].example_id
    by_text: dict[tuple[str, str], list[tuple[str, QueryRecord]]] = {}
    for run in runs:
        at = files[run].place_of.get(name)
        if at is not None:
            record = query_record(files[run], run, at)
            by_text.setdefault((record.prompt.strip(), record.completion.strip()), []).append((files[run].name, record))
    return [_exported_query(records) for records in by_text.values()]


def _exported_query(records: Sequence[tuple[str, QueryRecord]]) -> ExportedQuery:
    """A query as several runs, of these names, answer it."""
    first = records[0][1]
    other_truth = first.groundtruth is not None and first.groundtruth.strip() != first.completion.strip()
    return ExportedQuery(
        query_id=first.example_id,
        prompt=first.prompt,
        completion=first.completion,
        separator=first.separator,
        rankings=[
            (method, role, candidates)
            for method, record in records
            for role, candidates in (("proponent", record.proponents), ("opponent", record.opponents))
            if candidates
        ],
        heading=" · ".join(
            [*([first.relation] if first.relation else []), *([f"the true answer: {first.groundtruth}"] * other_truth)]
        ),
    )
