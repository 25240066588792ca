"""Errors as clients of the API know them: a status, and a body whose ``code`` a program can act on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping

from starlette.responses import Response

from engine.errors import EngineError, PromptTooLong, QueueFull, RequestError, RequestTooLarge

CALLER, SERVER = "invalid_request_error", "server_error"
ENGINE_NAMES = {"max_new_tokens": "max_tokens"}  # names of the engine for what the API calls otherwise
STOPPING = "the server is stopping"


class ApiError(Exception):
    """A request that is not answered, or not to its end.

    Args:
        status: status of HTTP.
        message: for a person; may name what the client has sent, and goes to that client alone, never to a log.
        kind: the body's ``type``; None is the caller's mistake below 500, and the server's from there.
        param: the field that is wrong.
        code: for a program.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = kind or (CALLER if status < 500 else SERVER)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def to_response(self) -> Response:
        """The error as a whole response."""
        return json_response(self.body, status=self.status, headers=self.headers)


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as a response of JSON."""
    return Response(json.dumps(value), status, headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The caller's mistake."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    """What is said while the server ends."""
    return ApiError(503, STOPPING, code="server_stopping", headers={"retry-after": "10"})


def engine_failed() -> ApiError:
    """What is said of an answer that the engine could not give; why is in the server's log, and not the client's."""
    return ApiError(500, "the engine failed to answer this request", code="engine_error")


def from_engine(error: EngineError, fields: Collection[str], prompt_field: str) -> ApiError:
    """An error of the engine as the API's.

    Args:
        error: what the engine raised.
        fields: names of the fields of the request's body; a message of the engine begins with that which is wrong.
        prompt_field: the field that is meant where the message begins with none.
    """
    if isinstance(error, QueueFull):
        wait = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=wait)
    if not isinstance(error, RequestError):
        return engine_failed()
    message = str(error)
    for inner, outer in ENGINE_NAMES.items():
        message = re.sub(rf"\b{inner}\b", outer, message)
    if isinstance(error, PromptTooLong | RequestTooLarge):
        return invalid(message, prompt_field, "context_length_exceeded")
    first = re.match(r"\w*", message)
    return invalid(message, first[0] if first and first[0] in fields else prompt_field)
