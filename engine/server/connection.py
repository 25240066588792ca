"""What one client's connection may cost: its time, its bytes, its place among a bounded number.

uvicorn bounds the time between two requests alone. Here a client that sends too slowly, or reads nothing, is cut off;
its request ends then, as where it hangs up.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.server.api_error import ApiError, invalid
from engine.server.server_options import ServerOptions

SPARE_CONNECTIONS = 64  # beyond the bound, which are told so
MAX_HEAD_BYTES = 16 * 1024  # of a request's line and headers, while it is not complete
SEND_BYTES = 128 * 1024  # that the kernel holds; a large buffer would hide for long that nobody reads


@dataclass(frozen=True)
class Bounds:
    """What connections may cost.

    Attributes:
        connections: most at once.
        seconds: time to send a head, and without progress in what the client is to read.
    """

    connections: int
    seconds: float


def connection_class(options: ServerOptions) -> type[H11Protocol]:
    """The class of connections, for uvicorn, which makes them with arguments of its own."""

    class Bounded(Connection):
        bounds = Bounds(options.max_connections, options.client_timeout)

    return Bounded


class Connection(H11Protocol):
    """A connection within bounds."""

    bounds: ClassVar[Bounds]

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection, or tells it, or not even that, that there are too many."""
        super().connection_made(transport)
        beyond = len(self.connections) - self.bounds.connections
        if beyond > SPARE_CONNECTIONS:
            transport.abort()
            return
        if beyond > 0:
            self.app = _too_many
        # So that writing waits, and is watched, as soon as the kernel takes no more.
        transport.set_write_buffer_limits(high=0)
        _watch_peer(transport.get_extra_info("socket"), self.bounds.seconds)
        self._head_timer = self._later(transport.abort)

    def data_received(self, data: bytes) -> None:
        """Takes bytes; those of a head must all come in time."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self._later(self.transport.abort)

    def handle_events(self) -> None:
        """Reads on behind a request, where uvicorn does not: the client's end would not be noticed before the answer's.

        It may send its next request already; what is more than a head has to wait in the client's kernel.
        """
        super().handle_events()
        behind, _ = self.conn.trailing_data
        if self.flow.read_paused and not self.cycle.more_body and len(behind) <= MAX_HEAD_BYTES:
            self.flow.resume_reading()

    def _should_upgrade(self) -> bool:
        """No other protocol is spoken; uvicorn says the same, with two warnings for each request that asks for one."""
        return False

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """The client has read all."""
        self._read_timer = _cancelled(self._read_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._head_timer, self._read_timer = _cancelled(self._head_timer), _cancelled(self._read_timer)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request of HTTP, or has too large a head; behind an answer there is no place for it."""
        if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
            self.transport.close()
            return
        body = json.dumps(invalid(msg).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        parts = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        self.transport.close()

    def _watch_reader(self, waiting_before: int) -> None:
        """Cuts the client off where as many bytes wait as did one period before."""
        waiting = self.transport.get_write_buffer_size()
        if waiting >= waiting_before:
            self.transport.abort()
        else:
            self._read_timer = self._later(lambda: self._watch_reader(waiting))

    def _later(self, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(self.bounds.seconds, call)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What is left of a timer that is not needed any more: nothing."""
    if timer is not None:
        timer.cancel()
    return None


def _watch_peer(connection: socket.socket, seconds: float) -> None:
    """Lets the kernel end a connection whose other machine is gone, also where nothing is written to it."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", seconds), ("TCP_KEEPINTVL", seconds / 4), ("TCP_USER_TIMEOUT", seconds * 1e3)):
        if (option := getattr(socket, name, None)) is not None:  # not every system has them
            connection.setsockopt(socket.IPPROTO_TCP, option, max(1, int(value)))


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"retry-after": "1", "connection": "close"}
    error = ApiError(503, "the server has as many connections as it may", code="too_many_connections", headers=headers)
    await error.to_response()(scope, receive, send)
