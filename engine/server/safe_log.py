"""The log of the server: it never has a prompt, an answer or a key, whatever fails."""

from __future__ import annotations

import logging
import traceback

ACCESS_LOGGER = "engine.server.access"

_access = logging.getLogger(ACCESS_LOGGER)
_logger = logging.getLogger(__name__)


def log_access(request_id: str, method: str, path: str, status: int, seconds: float) -> None:
    """One line for a request.

    Args:
        request_id: the server's own name for it, which the client has too.
        method: of HTTP.
        path: the route, not what the client wrote where that is none.
        status: as it was sent; 499 where the client went before.
        seconds: from its first line to the end of its answer.
    """
    _access.info("%s %s %d %.3fs %s", method, path, status, seconds, request_id)


def log_failure(error: BaseException) -> None:
    """Where a request failed and by what kind of error: its message may quote what the client sent."""
    place = "".join(traceback.format_tb(error.__traceback__))
    _logger.error("a request failed by %s:\n%s", type(error).__name__, place.rstrip())
