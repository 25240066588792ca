"""A small HTTP server that no client can hold up: connections and their time are bounded, and its end is prompt."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

MOST_CONNECTIONS = 16
CONNECTION_SECONDS = 5.0  # a connection's whole life
_TICK_SECONDS = 0.1
_SLOT_SECONDS = 0.2  # time for a connection that is cut off to end

_logger = logging.getLogger(__name__)


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Answers one request per connection, each in a thread.

    At most ``MOST_CONNECTIONS`` are open: one more takes the place of the one that has been open for longest. Each is
    cut off after ``CONNECTION_SECONDS``, whatever it has sent or read until then.

    Args:
        address: address of this machine to listen on.
        port: TCP port to listen on; 0 takes a free one.
        application: answers the requests.

    Raises:
        OSError: the address or the port cannot be used.
        OverflowError: the number is no port.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, address: str, port: int, application: WSGIApplication) -> None:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._opened: dict[socket.socket, float] = {}  # to the time it was opened, oldest first
        super().__init__((str(place[0]), port), _QuietHandler)
        self.set_app(application)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serves while the context lasts; then closes the port and every connection."""
        thread = threading.Thread(target=self.serve_forever, args=(_TICK_SECONDS,), name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()
            for connection in list(self._opened):
                _cut_off(connection)

    def service_actions(self) -> None:
        """Cuts off connections that have been open for too long; called every tick."""
        latest = time.monotonic() - CONNECTION_SECONDS
        for connection, opened in list(self._opened.items()):
            if opened < latest:
                _cut_off(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a connection's thread; where there are too many connections, the oldest makes room."""
        if not self._slots.acquire(blocking=False):
            for oldest in list(self._opened)[:1]:
                _cut_off(oldest)
            if not self._slots.acquire(timeout=_SLOT_SECONDS):
                self.shutdown_request(request)
                return
        self._opened[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # the thread could not start
            self._end(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: socket.socket) -> None:
        self._opened.pop(request, None)
        self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a broken connection at debug level: it is its client's matter."""
        _logger.debug("a connection to the metrics broke", exc_info=True)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Writes no line per request."""


def _cut_off(connection: socket.socket) -> None:
    with suppress(OSError):  # the connection has ended by itself
        connection.shutdown(socket.SHUT_RDWR)
