"""The explorer's ASGI application: the JSON API (described by /api/openapi.json) and the front
end's files.
"""

from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.routing import compile_path

from trackstar.errors import OptionError, TrackstarError
from trackstar.explorer.browsing import prepare
from trackstar.explorer.jobs import Jobs
from trackstar.explorer.live import LiveIndex
from trackstar.explorer.messages import sendable, without_backticks
from trackstar.explorer.question_routes import answer_routes, job_routes, question_routes
from trackstar.explorer.refusals import ALWAYS, MissingError, refusals
from trackstar.explorer.result_files import ResultFile
from trackstar.explorer.result_routes import export_routes, result_routes
from trackstar.explorer.schemas import RunSummary, Session
from trackstar.explorer.security import Guard
from trackstar.text import one_line

STATIC = Path(__file__).resolve().parent / "static"


def make_app(
    files: Sequence[ResultFile], live: LiveIndex | None, *, hosts: frozenset[str], jobs: Jobs | None = None
) -> Guard:
    """The guarded API and page over the opened files and index; no other file can be read through
    it.

    Args:
        files: Result files.
        live: The index, or None.
        hosts: This server's own Host headers, such as `127.0.0.1:8765`.
        jobs: The queue that runs long work; None makes one.
    """
    prepare(files)
    app = make_api(files, live, jobs=jobs)
    methods = _methods(app)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/", StaticFiles(directory=STATIC), name="static")
    return Guard(app, hosts=hosts, methods=methods)


def make_api(files: Sequence[ResultFile], live: LiveIndex | None, *, jobs: Jobs | None = None) -> FastAPI:
    """The JSON API alone, without front end and guard; arguments as for `make_app`."""
    app = FastAPI(
        title="trackstar explorer",
        version=version("trackstar-tda"),
        description=(
            "Result files and live questions to an index. POST needs the header X-Trackstar: 1, and Content-Type: "
            "application/json if it has a body. HEAD is answered as GET, without the body; other methods than a path's "
            "own get 405 with Allow."
        ),
        responses=refusals(*ALWAYS),
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    jobs = jobs or Jobs()
    app.include_router(_session_routes(files, live))
    app.include_router(result_routes(files))
    app.include_router(export_routes(files))
    app.include_router(question_routes(live, jobs))
    app.include_router(answer_routes(live))
    app.include_router(job_routes(jobs))
    app.add_exception_handler(TrackstarError, _user_error)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Exception, _defect)
    return app


def _methods(app: FastAPI) -> Callable[[str], Collection[str]]:
    """Which methods a path answers to, as the API describes; any other path is a file to read."""
    described = [
        (compile_path(path)[0], {method.upper() for method in operations})
        for path, operations in app.openapi()["paths"].items()
    ]

    def methods(path: str) -> Collection[str]:
        found = {method for pattern, names in described if pattern.match(path) for method in names} or {"GET"}
        return found | {"HEAD"} if "GET" in found else found

    return methods


async def _user_error(_request: Request, error: Exception) -> JSONResponse:
    status = 404 if isinstance(error, MissingError) else 400 if isinstance(error, OptionError) else 500
    return _refused(status, without_backticks(str(error)), 500)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return _refused(error.status_code, error.detail, 300)


async def _invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    reasons: dict[str, str] = {}
    for part in error.errors():
        source, *place = part["loc"]
        # What follows a parameter's name is pydantic's own, as is the null that stands for none.
        field = ".".join(map(str, place if source == "body" else place[:1])) or str(source)
        if part["type"] != "none_required":
            reasons.setdefault(field, part["msg"].removeprefix("Value error, "))
    return _refused(422, "; ".join(f"{field}: {reason}" for field, reason in list(reasons.items())[:5]), 500)


async def _defect(_request: Request, error: Exception) -> JSONResponse:
    return _refused(500, f"a defect of trackstar, please report it: {type(error).__name__}: {error}", 300)


def _refused(status: int, detail: str, most: int) -> JSONResponse:
    return JSONResponse({"detail": sendable(one_line(detail, most))}, status_code=status)


def _session_routes(files: Sequence[ResultFile], live: LiveIndex | None) -> APIRouter:
    router = APIRouter()

    @router.get("/api/session")
    def session() -> Session:
        """The result files and the index that are open."""
        runs = [
            RunSummary(
                run=number,
                name=file.name,
                query_set=file.lines[0].query_set,
                queries=len(file.lines),
                has=sorted(file.has),
                kinds=list(file.kinds),
                mixing=file.mixing,
                changed=file.changed,
            )
            for number, file in enumerate(files)
        ]
        return Session(version=version("trackstar-tda"), runs=runs, index=live.summary() if live else None)

    return router
