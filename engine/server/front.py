"""What holds for every request, before it has a path: an id, a key, a line in the log, and errors with a body."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.api_error import ApiError, engine_failed, stopping
from engine.server.live_view import PAGES, STATE, ask_for_key
from engine.server.safe_log import log_access, log_failure
from engine.server.service import Service

CLIENT_GONE = 499  # in the log, of a client that left before it was answered
FOR_ALL = ("/health",)  # answered without a key
WHILE_STOPPING = ("/health", "/metrics", PAGES, STATE)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass
class _Seen:
    """What is known of a request when it ends."""

    status: int = 0


class Front:
    """The outermost application.

    Args:
        app: answers the requests that are let through; what it raises becomes a response.
        service: has the keys, and says whether it is stopping.
        paths: the fixed paths that there are.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        self._app = app
        self._service = service
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, whatever comes of it."""
        begun, request_id, seen = time.monotonic(), secrets.token_hex(12), _Seen()
        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self._app  # for the router, which else answers unknown paths itself

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self._service.in_flight += 1
        try:
            await self._answer(scope, receive, watched, seen)
        except asyncio.CancelledError:
            seen.status = seen.status or CLIENT_GONE
            raise
        finally:
            self._service.in_flight -= 1
            method = scope["method"] if scope["method"] in METHODS else "?"
            log_access(request_id, method, self._shown(scope["path"]), seen.status, time.monotonic() - begun)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, seen: _Seen) -> None:
        try:
            self._let_in(scope)
            await self._app(scope, receive, send)
        except ClientDisconnect:
            seen.status = seen.status or CLIENT_GONE
        except Exception as error:
            told = _told(error)
            if not seen.status:
                is_shown = scope["path"] == PAGES and "text/html" in Headers(scope=scope).get("accept", "")
                response = ask_for_key() if is_shown and told.status == 401 else told.to_response()
                await response(scope, receive, send)

    def _let_in(self, scope: Scope) -> None:
        """Finds the caller's key; raises ApiError where there is none, or no request is taken any more."""
        path = scope["path"]
        if path not in FOR_ALL:
            scope["state"]["key"] = self._service.prepared.keys.find(Headers(scope=scope).get("authorization"))
        if self._service.is_stopping and path not in WHILE_STOPPING:
            raise stopping()

    def _shown(self, path: str) -> str:
        """A path for the log: one of ours, since another may be anything."""
        if path in self._paths:
            return path
        return "/v1/models/…" if path.startswith("/v1/models/") else "…"


def _told(error: Exception) -> ApiError:
    """What a client is told of an error; one that nobody expected is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # of the router: no such path, or not by this method
        return ApiError(error.status_code, error.detail, headers=error.headers)
    log_failure(error)
    return engine_failed()
