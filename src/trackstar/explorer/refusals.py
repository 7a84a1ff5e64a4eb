"""The status codes that the API answers other than success, for its description and its routes."""

from typing import Annotated, Any

from fastapi import Depends, Header

from trackstar.errors import OptionError
from trackstar.explorer.jobs import MOST_WAITING
from trackstar.explorer.schemas import Error
from trackstar.explorer.security import BODY_SECONDS, LARGEST_BODY, LONGEST_URL, SLOWEST_SECONDS

_REASONS = {
    400: "The request cannot be met as it is; the detail says what to change.",
    403: "The request comes from another origin, or lacks the header X-Trackstar: 1 that POST needs.",
    404: "Something that the request names does not exist: an index, a run, a query, a candidate, an answer, a job.",
    408: f"The request's body did not arrive within {BODY_SECONDS:.0f} seconds.",
    413: f"The request's body is larger than {LARGEST_BODY:,} bytes.",
    414: f"The address is longer than {LONGEST_URL:,} characters.",
    415: "The Content-Type is not application/json.",
    421: "The Host header does not name this server.",
    422: "A parameter or the body has another form than described.",
    429: f"{MOST_WAITING} jobs are queued already.",
    500: "A file of the index cannot be read, or trackstar has a defect.",
    503: f"There was no answer within {SLOWEST_SECONDS:.0f} seconds.",
}
ALWAYS = (403, 408, 413, 414, 421, 500, 503)
"""Status codes that every route can answer."""


class MissingError(OptionError):
    """A request names something that does not exist; the status is 404."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of status codes, as a route's `responses` takes it."""
    return {status: {"model": Error, "description": _REASONS[status]} for status in statuses}


def _header(x_trackstar: Annotated[str, Header(pattern="^1$", description="Shows that no other page asks.")]) -> None:
    """Describe the header; `Guard` checks it."""


NEEDS_HEADER = [Depends(_header)]
