"""Refuse requests from other hosts and origins, and requests that are too large, too slow or too
many.

Corpora are untrusted, and so are the other pages that are open in the same browser. The server
listens on loopback only, but a page of another origin can still send it requests, also through a
host name that it resolves to 127.0.0.1 (DNS rebinding). Therefore the Host header must name
loopback, an Origin or Sec-Fetch-Site header must be the page's, and requests that change anything
must carry a header that other origins cannot set. The content security policy blocks every script
and resource except the front end's files.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 1024
LONGEST_URL = 16 * 1024
BODY_SECONDS = 10.0
SLOWEST_SECONDS = 30.0
MOST_AT_ONCE = 32
HEADER = "x-trackstar"
# A refused body is read up to this limit: a client that is still sending would miss the answer.
_DRAINED = 4 * 1024 * 1024
_DRAINED_SECONDS = 1.0

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Refusal(NamedTuple):
    """A refusal's status, its reason in one line, and further headers."""

    status: int
    detail: str
    headers: Mapping[str, str] = {}


# The rest of the body may be unread, so that no further request can follow on the connection.
_TOO_LARGE = Refusal(413, f"the request is larger than {LARGEST_BODY:,} bytes", {"connection": "close"})


class Guard:
    """ASGI middleware that refuses requests that the explorer's page would not send.

    At most `MOST_AT_ONCE` answers are computed at once; further requests wait. A body that is still
    arriving and an answer that is still being read do not count: both take as long as the client
    wants, and are bounded by the number of connections (`connections.py`). HEAD is answered as GET,
    without the body.

    Args:
        app: The application behind it.
        hosts: This server's own Host headers, with port.
        methods: Gives the methods that a path answers to.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], methods: Callable[[str], Collection[str]]) -> None:
        self._app = app
        self._hosts = hosts
        self._methods = methods
        self._computing = asyncio.Semaphore(MOST_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # web sockets are not served
            return
        guarded = _with_headers(send)
        refusal = self._refusal(scope)
        if refusal is not None:
            if scope["method"] not in ("GET", "HEAD"):
                await _drain(receive)
            await _answer(refusal, scope, receive, guarded)
            return
        if scope["method"] == "HEAD":
            scope, guarded = {**scope, "method": "GET"}, _without_body(guarded)
        body = await _body(receive)
        if body is None:  # the client is gone
            return
        if isinstance(body, Refusal):
            await _answer(body, scope, receive, guarded)
            return
        await self._run(scope, _replayed(body, receive), guarded)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; limits the time and the number of requests until an answer begins."""
        begun = False
        try:
            async with asyncio.timeout(SLOWEST_SECONDS) as limit, contextlib.AsyncExitStack() as computing:
                await computing.enter_async_context(self._computing)

                async def watched(message: Message) -> None:
                    nonlocal begun
                    if message["type"] == "http.response.start":
                        begun = True
                        limit.reschedule(None)
                        await computing.aclose()
                    await send(message)

                await self._app(scope, receive, watched)
        except TimeoutError:
            if begun:
                raise
            late = Refusal(503, f"no answer within {SLOWEST_SECONDS:.0f} s; try again in a moment")
            await _answer(late, scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Why a request is refused before its body is read, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self._hosts:
            return Refusal(421, "this server answers to localhost only")
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return Refusal(403, "requests from other origins are refused")
        method = scope["method"]
        opens_page = method in ("GET", "HEAD") and scope["path"] == "/"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opens_page:
            return Refusal(403, "requests from other sites are refused")
        if len(scope["path"]) + len(scope.get("query_string", b"")) > LONGEST_URL:
            return Refusal(414, f"the address is longer than {LONGEST_URL:,} characters")
        allowed = self._methods(scope["path"])
        if method not in allowed:
            listed = ", ".join(sorted(allowed))
            return Refusal(405, f"expected {listed}, found {method[:20]}", {"allow": listed})
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 20 or int(length) > LARGEST_BODY:
            return _TOO_LARGE
        if method not in ("GET", "HEAD"):
            if headers.get(HEADER) != "1":
                return Refusal(403, "the header X-Trackstar: 1 is missing")
            has_body = length.strip("0") or "transfer-encoding" in headers
            content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if has_body and content_type != "application/json":
                return Refusal(415, "expected Content-Type: application/json")
        return None


async def _answer(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse({"detail": refusal.detail}, status_code=refusal.status, headers=dict(refusal.headers))
    await response(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Read the rest of a refused request's body, within limits."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAINED_SECONDS):
            drained = 0
            while drained < _DRAINED:
                message = await receive()
                drained += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def _body(receive: Receive) -> bytes | Refusal | None:
    """The request's body; a refusal if it is too large or too slow, None if the client is gone."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > LARGEST_BODY:
                    await _drain(receive)
                    return _TOO_LARGE
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        late = f"the request's body did not arrive within {BODY_SECONDS:.0f} s; send it again"
        return Refusal(408, late, {"connection": "close"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Receive a body that was read already, then whatever follows it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _without_body(send: Send) -> Send:
    """Send the head of a response and its end, but none of its body."""

    async def without_body(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
        elif not message.get("more_body"):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return without_body


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return with_headers
