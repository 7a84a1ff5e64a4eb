"""The explorer's JSON API (described by /api/openapi.json) and the front end's files, as one ASGI application."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request

from trackstar.corpus.data_files import one_line
from trackstar.errors import TrackstarError
from trackstar.explorer.browsing import QueryFilter, matching_places, prepare, query_page
from trackstar.explorer.exports import MEDIA_TYPES, MOST_IN_HTML, ExportFormat, Shown, to_csv, to_html, to_jsonl
from trackstar.explorer.jobs import Jobs, TooManyJobsError
from trackstar.explorer.live import LiveIndex
from trackstar.explorer.passages import LONGEST_RAW, passage_text, query_record, text_part
from trackstar.explorer.result_files import ResultFile
from trackstar.explorer.schemas import (
    LONGEST_SEARCH,
    MOST_TOP,
    PAGE,
    Answer,
    AnswerRequest,
    CandidateRequest,
    Details,
    GenerateRequest,
    Groups,
    Insight,
    Job,
    QueryPage,
    QueryRecord,
    RunSummary,
    Session,
    Side,
    Sort,
    Text,
    TokensRequest,
)
from trackstar.explorer.security import Guard

STATIC = Path(__file__).resolve().parent / "static"

Value = Annotated[str, Query(max_length=LONGEST_SEARCH)]
Values = Annotated[list[Annotated[str, Query(max_length=LONGEST_SEARCH)]], Query(max_length=200)]
YesNo = Literal["yes", "no"]


def make_app(
    files: Sequence[ResultFile], live: LiveIndex | None, *, hosts: frozenset[str], jobs: Jobs | None = None
) -> Guard:
    """The application over what is open, guarded; nothing else of the disk can be asked for.

    Args:
        files: Result files.
        live: The index, or None.
        hosts: Host headers that are this server's own, such as `127.0.0.1:8765`.
        jobs: Where long work runs.
    """
    prepare(files)
    app = make_api(files, live, jobs=jobs)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/", StaticFiles(directory=STATIC), name="static")
    return Guard(app, hosts=hosts)


def make_api(files: Sequence[ResultFile], live: LiveIndex | None, *, jobs: Jobs | None = None) -> FastAPI:
    """The JSON API alone, without front end and guard; arguments as `make_app`'s."""
    app = FastAPI(
        title="trackstar explorer",
        version=version("trackstar-tda"),
        description=(
            "Result files and live questions to an index. POST and DELETE need the header X-Trackstar: 1, POST also "
            "Content-Type: application/json."
        ),
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(_session(files, live))
    app.include_router(_results(files))
    app.include_router(_live(live, jobs or Jobs()))
    app.add_exception_handler(TrackstarError, _mistake)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_request)
    app.add_exception_handler(Exception, _defect)
    return app


async def _mistake(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": one_line(error, 500)}, status_code=400)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"detail": one_line(error.detail, 300)}, status_code=error.status_code)


async def _wrong_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, one['loc'][1:])) or one['loc'][0]}: {one['msg']}" for one in error.errors()[:5]]
    return JSONResponse({"detail": one_line("; ".join(found), 500)}, status_code=422)


async def _defect(_request: Request, error: Exception) -> JSONResponse:
    detail = f"a defect of trackstar, please report it: {one_line(f'{type(error).__name__}: {error}')}"
    return JSONResponse({"detail": detail}, status_code=500)


def _session(files: Sequence[ResultFile], live: LiveIndex | None) -> APIRouter:
    router = APIRouter()

    @router.get("/api/session")
    def session() -> Session:
        """What is open."""
        runs = [
            RunSummary(
                run=number,
                name=file.name,
                query_set=file.lines[0].query_set,
                queries=len(file.lines),
                has=sorted(file.has),
                mixing=file.mixing,
            )
            for number, file in enumerate(files)
        ]
        return Session(version=version("trackstar-tda"), runs=runs, index=live.summary() if live else None)

    return router


def _wanted(
    search: Value = "",
    passages: bool = False,
    relation: Values = [],  # noqa: B006 - the framework copies defaults
    bucket: Values = [],  # noqa: B006 - likewise
    model_correct: YesNo | None = None,
    proponent_correct: YesNo | None = None,
    score_min: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    score_max: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    sort: Sort = "file",
    descending: bool = False,
) -> QueryFilter:
    return QueryFilter(
        search=search,
        passages=passages,
        relations=frozenset(relation),
        buckets=frozenset(bucket),
        model_correct=None if model_correct is None else model_correct == "yes",
        proponent_correct=None if proponent_correct is None else proponent_correct == "yes",
        score_min=score_min,
        score_max=score_max,
        sort=sort,
        descending=descending,
    )


Wanted = Annotated[QueryFilter, Depends(_wanted)]


def _results(files: Sequence[ResultFile]) -> APIRouter:
    router = APIRouter(prefix="/api/runs/{run}")

    def run_of(run: int) -> ResultFile:
        if not 0 <= run < len(files):
            raise HTTPException(404, f"run {run}: expected 0 to {len(files) - 1}")
        return files[run]

    def checked(run: int, place: int) -> ResultFile:
        file = run_of(run)
        if not 0 <= place < len(file.lines):
            raise HTTPException(404, f"query {place}: expected 0 to {len(file.lines) - 1}")
        return file

    @router.get("/queries")
    def queries(
        run: int,
        wanted: Wanted,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 50,
    ) -> QueryPage:
        """Queries that match, a page at a time, with metrics over all that match."""
        run_of(run)
        return query_page(files, run, wanted, offset=offset, limit=limit)

    @router.get("/queries/{place}")
    def query(run: int, place: int) -> QueryRecord:
        """One query with its passages."""
        return query_record(checked(run, place), run, place)

    @router.get("/queries/{place}/raw")
    def raw(run: int, place: int) -> Text:
        """The query's line as it is in the file, its beginning where it is long."""
        return text_part(checked(run, place).raw[place].decode("utf-8", "replace"), 0, LONGEST_RAW)

    @router.get("/queries/{place}/{side}/{rank}/text")
    def text(run: int, place: int, side: Side, rank: int, start: Annotated[int, Query(ge=0)] = 0) -> Text:
        """Part of a passage's text."""
        file = checked(run, place)
        try:
            return text_part(passage_text(file, place, side, rank), start)
        except IndexError:
            raise HTTPException(404, f"query {place} has no {side} of rank {rank}") from None

    @router.get("/export")
    def export_all(run: int, wanted: Wanted, format: ExportFormat) -> StreamingResponse:
        """All queries that match: passages as CSV or HTML, or the lines themselves."""
        file = run_of(run)
        places = matching_places(file, wanted)
        if format == "jsonl":
            return _download((file.raw[p].decode("utf-8", "replace") + "\n" for p in places), format, file.name)
        if format == "html" and len(places) > MOST_IN_HTML:
            raise HTTPException(
                400, f"{len(places):,} queries match, and one page holds {MOST_IN_HTML}; filter, or take CSV or JSONL"
            )
        return _written((_shown(files, [run], place) for place in places), format, file.name)

    @router.get("/queries/{place}/export")
    def export_one(run: int, place: int, format: ExportFormat, other: int | None = None) -> StreamingResponse:
        """One query: passages as CSV or HTML, or its line; with the same query of another run beside it."""
        file = checked(run, place)
        runs = [run]
        if other is not None and run_of(other) is not file:
            runs.append(other)
        if format == "jsonl":
            name = file.lines[place].example_id
            found = [(files[r], files[r].place_of.get(name)) for r in runs]
            lines = (one.raw[at].decode("utf-8", "replace") + "\n" for one, at in found if at is not None)
            return _download(lines, format, file.name)
        return _written([_shown(files, runs, place)], format, file.name)

    return router


def _shown(files: Sequence[ResultFile], runs: Sequence[int], place: int) -> Shown:
    """A query of the first run, with the rankings of all the runs that have it."""
    name = files[runs[0]].lines[place].example_id
    records = [
        (files[run].name, query_record(files[run], run, at))
        for run in runs
        if (at := files[run].place_of.get(name)) is not None
    ]
    first = records[0][1]
    return Shown(
        query_id=first.example_id,
        prompt=first.prompt,
        completion=first.completion,
        rankings=[
            (method, role, passages)
            for method, record in records
            for role, passages in (("proponent", record.proponents), ("opponent", record.opponents))
            if passages
        ],
        heading=first.relation or "",
    )


def _live(live: LiveIndex | None, jobs: Jobs) -> APIRouter:
    router = APIRouter()

    def index() -> LiveIndex:
        if live is None:
            raise HTTPException(404, "no index is open; start with: trackstar explore INDEX")
        return live

    def submitted(title: str, run: Callable[[], Any]) -> Job:
        try:
            return jobs.submit(title, run)
        except TooManyJobsError:
            raise HTTPException(429, "too much is waiting already; cancel something or wait") from None

    def found(job: Job | None, number: int) -> Job:
        if job is None:
            raise HTTPException(404, f"job {number} is not known any more")
        return job

    def answered(key: str) -> Answer:
        answer = index().known_answer(key)
        if answer is None:
            raise HTTPException(404, "the answer is not held any more; attribute again")
        return answer

    @router.post("/api/generate")
    def generate(request: GenerateRequest) -> Job:
        """Let the model go on from a prompt."""
        opened = index()
        return submitted("The model's answer", lambda: opened.generate(request))

    @router.post("/api/answers")
    def answer(request: AnswerRequest) -> Job:
        """Attribute a completion."""
        opened = index()
        opened.check(request)
        return submitted("Attributing", lambda: opened.answer(request))

    @router.get("/api/answers/{key}")
    def known(key: str) -> Answer:
        """An answer that is still held."""
        return answered(key)

    @router.post("/api/answers/{key}/tokens")
    def tokens(key: str, request: TokensRequest) -> Job:
        """Split a candidate's influence over tokens."""
        answered(key)
        opened = index()
        over_query = request.over == "query"
        return submitted("Splitting", lambda: opened.tokens(key, request.row, over_query=over_query))

    @router.post("/api/answers/{key}/tail-patch")
    def tail_patch(key: str, request: CandidateRequest) -> Job:
        """Measure what a training step on a candidate does."""
        answered(key)
        opened = index()
        return submitted("Measuring", lambda: opened.measure(key, request.row))

    @router.get("/api/answers/{key}/details")
    def details(key: str) -> Details:
        """What has been split and measured of an answer so far."""
        answered(key)
        return index().details(key)

    @router.get("/api/answers/{key}/insight")
    def insight(key: str) -> Insight:
        """All candidates at a glance."""
        answered(key)
        return index().insight(key)

    @router.get("/api/answers/{key}/groups")
    def groups(
        key: str, field: Value, method: Value = "TrackStar", top: Annotated[int, Query(ge=1, le=MOST_TOP)] = 100
    ) -> Groups:
        """A method's top candidates by a field of the corpus."""
        answered(key)
        return index().groups(key, field=field, method=method, top=top)

    @router.get("/api/answers/{key}/export")
    def export(key: str, format: ExportFormat) -> StreamingResponse:
        """An answer as a file."""
        return _written([Shown.of_answer(answered(key))], format, "answer")

    @router.get("/api/passages/{row}/text")
    def text(row: int, start: Annotated[int, Query(ge=0)] = 0) -> Text:
        """Part of a candidate's text."""
        return text_part(index().text(row), start)

    @router.get("/api/jobs/{job}")
    def job(job: int) -> Job:
        """How far a job is, and what it gave."""
        return found(jobs.get(job), job)

    @router.delete("/api/jobs/{job}")
    def cancel(job: int) -> Job:
        """Stop a job."""
        return found(jobs.cancel(job), job)

    return router


def _written(shown: Sequence[Shown] | Iterator[Shown], format: ExportFormat, name: str) -> StreamingResponse:
    if format == "html":
        return _download(to_html(shown, f"trackstar: {name}"), format, name)
    return _download(to_csv(shown) if format == "csv" else to_jsonl(shown), format, name)


def _joined(parts: Iterator[str]) -> Iterator[bytes]:
    """The parts in pieces of some 64 KiB: each piece costs a change of threads."""
    held, size = [], 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= 1 << 16:
            yield "".join(held).encode("utf-8", "replace")
            held, size = [], 0
    if held:
        yield "".join(held).encode("utf-8", "replace")


def _download(parts: Iterator[str], format: ExportFormat, name: str) -> StreamingResponse:
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name.split(".")[0])[:80]
    return StreamingResponse(
        _joined(parts),
        media_type=MEDIA_TYPES[format],
        headers={"content-disposition": f'attachment; filename="{stem or "trackstar"}.{format}"'},
    )
