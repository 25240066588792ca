"""The log of the server: it never has a prompt, an answer or a key, whatever fails."""

from __future__ import annotations

import logging
import traceback
from typing import Any

_access = logging.getLogger("engine.server.access")
_logger = logging.getLogger(__name__)


def begin_log() -> None:
    """Sends the log of this process to stderr: warnings of all packages, and each request's line."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlaceFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    _access.setLevel(logging.INFO)


class PlaceFormatter(logging.Formatter):
    """Tells of an exception its kind and place, whoever logs it: its message may quote what a client sent or got."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  as logging calls it
        """The kinds and places of an exception and of those behind it."""
        error: BaseException | None = ei[1]
        lines: list[str] = []
        while error is not None:
            lines += [type(error).__name__ + ":", _place_of(error)]
            error = error.__cause__
        return "\n".join(lines)


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
    _logger.error("a request failed by %s:\n%s", type(error).__name__, _place_of(error))


def _place_of(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()
