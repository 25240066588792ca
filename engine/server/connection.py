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

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from engine.server.api_error import ApiError, invalid
from engine.server.server_options import ServerOptions

SPARE_CONNECTIONS = 64  # beyond the bound, which are told so
MAX_HEAD_BYTES = 16 * 1024  # of a request's line and headers
MAX_PIPELINED = 32  # requests that a client may send before the answer to the first
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


def connection_class(options: ServerOptions) -> type[HttpToolsProtocol]:
    """The class of connections, for uvicorn, which makes them with arguments of its own."""

    class Bounded(Connection):
        bounds = Bounds(options.max_connections, options.client_timeout)

    return Bounded


class _HeadTooLarge(Exception):
    """More than a request's head may have, or more requests than may wait."""


class Connection(HttpToolsProtocol):
    """A connection within bounds."""

    bounds: ClassVar[Bounds]

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None  # ``cycle`` is the last request, which may wait for this one's answer
    _is_in_head = True
    _head_bytes = 0
    _has_completed = False  # any request, by the bytes that came last
    _bytes_behind = 0  # a request that is not answered yet
    _is_upgrade = False

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
        """Takes bytes; those of a head must all come in time.

        Behind a request that is not answered yet, as much as a head is read on, which uvicorn does not: the client's
        end would not be noticed before the answer's. What is more has to wait in the client's kernel.
        """
        self._unset_keepalive_if_required()
        is_behind = self._running is not None and self._is_answering and not self._running.more_body
        self._bytes_behind = self._bytes_behind + len(data) if is_behind else 0
        if not (self._is_upgrade or self.transport.is_closing()):
            self._parse(data)
        if self._is_answering:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self._later(self.transport.abort)
        if self.flow.read_paused and self.pipeline and self._bytes_behind <= MAX_HEAD_BYTES:
            self.flow.resume_reading()

    def _parse(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        self._has_completed = False
        try:
            self.parser.feed_data(data)
            if was_in_head and self._is_in_head and not self._has_completed:
                self._count_of_head(len(data))  # of a header that is not complete, the parser says nothing
        except httptools.HttpParserUpgrade:  # no other protocol is spoken: the answer is this one's, and the last
            self._is_upgrade = True
            self.cycle.keep_alive = False
        except (httptools.HttpParserError, _HeadTooLarge):
            self.send_400_response("the bytes are no request of HTTP, or its head is too large")

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self._count_of_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._count_of_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete; the request begins, or waits for the answers before its own."""
        self._is_in_head = False
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _HeadTooLarge
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle

    def on_response_complete(self) -> None:
        """An answer is complete; the next request that waits begins."""
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """The request is complete; what comes now is the next one's head."""
        self._is_in_head, self._head_bytes, self._has_completed = True, 0, True
        super().on_message_complete()

    def _count_of_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLarge

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    @property
    def _awaits_answer(self) -> bool:
        """Whether the client has no answer yet to what it is sending."""
        if self._is_in_head:
            return not self._is_answering
        return self.cycle is self._running and not self.cycle.response_started

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
        """Forgets the connection, and tells the request that is being answered, also where others wait behind it."""
        self._head_timer, self._read_timer = _cancelled(self._head_timer), _cancelled(self._read_timer)
        self.pipeline.clear()
        if self._running is not None and self._is_answering:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request of HTTP, or has too large a head; behind an answer there is no place for it."""
        if self._awaits_answer:
            body = json.dumps(invalid(msg).body).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
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
