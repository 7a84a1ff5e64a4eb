"""Refuse requests from other hosts and origins, and requests that are too large, too slow or too many.

Corpora are untrusted, and so are the other pages that are open in the same browser. The server listens
on loopback only, but a page of another origin can still send it requests, also through a host name that
it resolves to 127.0.0.1 (DNS rebinding). Therefore the Host header must name loopback, an Origin or
Sec-Fetch-Site header must be the page's, and requests that change anything must carry a header that
other origins cannot set. The content security policy blocks every script and resource except the front
end's files.
"""

import asyncio
import contextlib

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 1024
LONGEST_URL = 16 * 1024
SLOWEST_SECONDS = 30.0
MOST_AT_ONCE = 32
HEADER = "x-trackstar"
_TOO_LARGE = f"the request is larger than {LARGEST_BODY:,} bytes"
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


class Guard:
    """ASGI middleware that refuses requests that the explorer's page would not send.

    Args:
        app: The application behind it.
        hosts: This server's own Host headers, with port.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # web sockets are not served
            return
        guarded = _with_headers(send)
        refusal = self._refusal(scope)
        if refusal is None and self._running >= MOST_AT_ONCE:
            refusal = (429, f"more than {MOST_AT_ONCE} requests at once; try again in a moment")
        if refusal is not None:
            await _answer(refusal, scope, receive, guarded)
            return
        self._running += 1
        try:
            async with asyncio.timeout(SLOWEST_SECONDS) as limit:

                async def watched(message: Message) -> None:
                    # Once the answer has begun, a slow reader may take any time: downloads can be long.
                    if message["type"] == "http.response.start":
                        limit.reschedule(None)
                    await guarded(message)

                await self._app(scope, _bounded(receive), watched)
        except TimeoutError:
            late = (503, f"the request took longer than {SLOWEST_SECONDS:.0f} s")
            await _answer(late, scope, receive, guarded)
        finally:
            self._running -= 1

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is refused, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self._hosts:
            return 421, "this server answers to localhost only"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "requests from other origins are refused"
        opens_page = scope["method"] == "GET" and scope["path"] == "/"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opens_page:
            return 403, "requests from other sites are refused"
        if len(scope["path"]) + len(scope.get("query_string", b"")) > LONGEST_URL:
            return 414, f"the address is longer than {LONGEST_URL:,} characters"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return 413, _TOO_LARGE
        if scope["method"] not in ("GET", "HEAD"):
            if headers.get(HEADER) != "1":
                return 403, "the header X-Trackstar: 1 is missing"
            if scope["method"] == "POST" and not headers.get("content-type", "").startswith("application/json"):
                return 415, "expected Content-Type: application/json"
        return None


async def _answer(refusal: tuple[int, str], scope: Scope, receive: Receive, send: Send) -> None:
    status, detail = refusal
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAINED_SECONDS):
            drained = 0
            while drained < _DRAINED and scope["method"] not in ("GET", "HEAD"):
                message = await receive()
                drained += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
    await JSONResponse({"detail": detail}, status_code=status)(scope, receive, send)


def _bounded(receive: Receive) -> Receive:
    """Receive the body's parts and raise 413 once they exceed `LARGEST_BODY`."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LARGEST_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return bounded


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return with_headers
