"""Connections of the explorer's server: every request is timed, and new clients always find room."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 128
HEAD_SECONDS = 10.0
IDLE_SECONDS = 15


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that does not wait long for a client, nor for one client at the cost of another.

    * The head of every request must be complete `HEAD_SECONDS` after the connection was made or after the
      request's first byte. The server closes a connection without a request after `IDLE_SECONDS`.
      `Guard` times the body.
    * If there are more than `MOST_CONNECTIONS`, the one that has waited longest for its client is dropped:
      for the rest of a request, or for the client to read its answer. If there is none, an idle connection
      is dropped, or else the one whose request is the oldest: its client has waited so long that it may
      have given up, while the new one certainly waits.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._waiting_since = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None

    # The base declares asyncio.BaseTransport; its server passes an asyncio.Transport.
    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make room for the connection, and time its first request."""
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > MOST_CONNECTIONS:
            others = [other for other in self.connections if isinstance(other, TimedProtocol) and other is not self]
            oldest = min(others, key=lambda other: (other._worth(), other._waiting_since))
            # `connection_lost` runs later, when further connections may have been made.
            self.connections.discard(oldest)
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Time the request that the data begins, or stop timing the one whose head it completes."""
        if self._between_requests():
            self._start_timer()
        try:
            super().data_received(data)
        except h11.ProtocolError:  # what follows an answer that was sent early is no HTTP
            self.transport.abort()
        if not self._between_requests():
            self._stop_timer()

    def on_response_complete(self) -> None:
        """Note that the client's turn begins."""
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        """Note that the client has read a part of its answer."""
        self._waiting_since = self.loop.time()
        super().resume_writing()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _worth(self) -> int:
        """0 if the connection waits for its client, 1 if it is idle, 2 if the client waits for an answer."""
        if self.cycle is not None and self.cycle.response_complete and not self.conn.trailing_data[0]:
            return 1
        return 0 if self._between_requests() or self.cycle.more_body or self.flow.write_paused else 2

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if self._between_requests() and not self.transport.is_closing():
            self.transport.close()
