"""Routes that ask the index, read its answers, and follow the jobs that compute them."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import StreamingResponse

from trackstar.explorer.candidates import text_part
from trackstar.explorer.downloads import export as export_file
from trackstar.explorer.exports import ExportedQuery, ExportFormat
from trackstar.explorer.jobs import Jobs, TooManyJobsError
from trackstar.explorer.live import ANSWER_GONE, LiveIndex
from trackstar.explorer.question_schemas import (
    MOST_TOP,
    Answer,
    AnswerRequest,
    CandidateRequest,
    Details,
    GenerateRequest,
    Groups,
    Insight,
    Job,
    TokensRequest,
)
from trackstar.explorer.refusals import NEEDS_HEADER, MissingError, refusals
from trackstar.explorer.result_routes import EXPORTED, Value
from trackstar.explorer.schemas import Method, Text


def question_routes(live: LiveIndex | None, jobs: Jobs) -> APIRouter:
    """Routes that submit a job for the index; without an index they answer 404."""
    router = APIRouter(dependencies=NEEDS_HEADER, responses=refusals(400, 404, 415, 422, 429))

    @router.post("/api/generate")
    def generate(request: GenerateRequest) -> Job:
        """Let the model continue a prompt."""
        index = _opened(live)
        return _submit(jobs, "Generating the answer", lambda: index.generate(request))

    @router.post("/api/answers")
    def answer(request: AnswerRequest) -> Job:
        """Attribute a completion."""
        index = _opened(live)
        index.check(request)
        return _submit(jobs, "Attributing the completion", lambda: index.answer(request))

    @router.post("/api/answers/{key}/tokens")
    def tokens(key: str, request: TokensRequest) -> Job:
        """Split a candidate's influence over tokens."""
        index = _opened(live)
        _cached_answer(index, key)
        over_query = request.over == "query"
        return _submit(jobs, "Splitting over tokens", lambda: index.tokens(key, request.row, over_query=over_query))

    @router.post("/api/answers/{key}/tail-patch")
    def tail_patch(key: str, request: CandidateRequest) -> Job:
        """Measure the effect of one training step on a candidate."""
        index = _opened(live)
        _cached_answer(index, key)
        return _submit(jobs, "Measuring the effect", lambda: index.measure(key, request.row))

    return router


def answer_routes(live: LiveIndex | None) -> APIRouter:
    """Routes that read answers in memory, and candidates of the index; without an index they answer 404."""
    router = APIRouter(responses=refusals(404, 422))

    @router.get("/api/answers/{key}")
    def answer_by_key(key: str) -> Answer:
        """An answer that is still in memory."""
        return _cached_answer(_opened(live), key)

    @router.get("/api/answers/{key}/details")
    def details(key: str) -> Details:
        """The token splits and measured effects of an answer so far."""
        index = _opened(live)
        _cached_answer(index, key)
        return index.details(key)

    @router.get("/api/answers/{key}/insight")
    def insight(key: str) -> Insight:
        """The influences of all candidates at a glance."""
        index = _opened(live)
        _cached_answer(index, key)
        return index.insight(key)

    @router.get("/api/answers/{key}/groups")
    def groups(
        key: str, field: Value, method: Method = "TrackStar", top: Annotated[int, Query(ge=1, le=MOST_TOP)] = 100
    ) -> Groups:
        """A method's top candidates, grouped by a field of the corpus."""
        index = _opened(live)
        _cached_answer(index, key)
        return index.groups(key, field=field, method=method, top=top)

    @router.get("/api/answers/{key}/export", response_class=StreamingResponse, responses=EXPORTED)
    def export(key: str, format: ExportFormat) -> StreamingResponse:
        """An answer as a file."""
        return export_file([ExportedQuery.of_answer(_cached_answer(_opened(live), key))], format, "answer")

    @router.get("/api/candidates/{row}/text")
    def text(row: int, start: Annotated[int, Query(ge=0)] = 0) -> Text:
        """Part of a candidate's text."""
        return text_part(_opened(live).text(row), start)

    return router


def job_routes(jobs: Jobs) -> APIRouter:
    """Routes that follow and cancel a job."""
    router = APIRouter(responses=refusals(404, 422))

    @router.get("/api/jobs/{job}")
    def job(job: int) -> Job:
        """The progress of a job, and its result once it is done."""
        return _existing(jobs.get(job), job)

    @router.post("/api/jobs/{job}/cancel", dependencies=NEEDS_HEADER, responses=refusals(415))
    def cancel(job: int) -> Job:
        """Stop a job."""
        return _existing(jobs.cancel(job), job)

    return router


def _opened(live: LiveIndex | None) -> LiveIndex:
    if live is None:
        raise MissingError("no index is open; restart the explorer with an index")
    return live


def _cached_answer(index: LiveIndex, key: str) -> Answer:
    answer = index.cached_answer(key)
    if answer is None:
        raise MissingError(ANSWER_GONE)
    return answer


def _submit(jobs: Jobs, title: str, run: Callable[[], Any]) -> Job:
    try:
        return jobs.submit(title, run)
    except TooManyJobsError:
        raise HTTPException(429, "too many jobs are queued; cancel one, or wait until one is done") from None


def _existing(job: Job | None, number: int) -> Job:
    if job is None:
        raise MissingError(f"job {number} does not exist, or ended so long ago that its result was dropped")
    return job
