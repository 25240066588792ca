"""An answer sent piece by piece, as server-sent events, until its end or until its reader goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.server.answer_json import AnswerFormat
from engine.server.api_error import ApiError, engine_failed
from engine.server.choices import Choices, fault_of
from engine.server.safe_log import log_failure

Result = TypeVar("Result")

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies are not to collect events
]


class EventStream:
    """A response of events.

    What a slow reader has not taken yet waits in the engine, merged, and not here: the next piece is asked for when the
    connection has taken the last.

    Args:
        choices: the answers, which are aborted where the reader goes before their end.
        form: how they are written.
    """

    def __init__(self, choices: Choices, form: AnswerFormat) -> None:
        self._choices = choices
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await while_connected(receive, self._send_events(send))
        except ClientDisconnect:
            pass
        finally:
            self._choices.abort()

    async def _send_events(self, send: Send) -> None:
        try:
            rest = await self._send_answers(send)
        except ApiError as error:
            rest = _error_event(error)
        except Exception as error:
            log_failure(error)
            rest = _error_event(engine_failed())
        await send({"type": "http.response.body", "body": rest.encode(), "more_body": False})

    async def _send_answers(self, send: Send) -> str:
        """Sends what the choices gain; returns the last events."""
        form, tokens = self._form, 0
        if opening := form.opening(self._choices.count):
            await send({"type": "http.response.body", "body": opening.encode(), "more_body": True})
        async for deltas in self._choices.deltas():
            if body := "".join([form.event(index, delta) for index, delta in deltas]).encode():
                await send({"type": "http.response.body", "body": body, "more_body": True})
            for _, delta in deltas:
                tokens += len(delta.token_ids)
                if fault := fault_of(delta.finish_reason):
                    raise fault
        return form.last(self._choices.usage(tokens))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What ``work`` returns; cancels it, and raises ClientDisconnect, where the client goes before that."""
    this, has_left = asyncio.current_task(), False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal has_left
        has_left = True
        if this is not None:
            this.cancel()

    leaving = asyncio.ensure_future(_leaving(receive))
    leaving.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and this is not None and not this.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        leaving.remove_done_callback(leave)
        leaving.cancel()


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_event(error: ApiError) -> str:
    return f"data: {json.dumps(error.body)}\n\n"
