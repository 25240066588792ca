"""``/pages``: every page of the pool, live. Any number of readers cost the engine one look a while."""

from __future__ import annotations

import asyncio
import gzip
import json
import time

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from engine.errors import EngineError
from engine.server.api_error import ApiError
from engine.serving.async_llm import AsyncLLM
from engine.serving.llm import LLM
from engine.serving.watch.live_pages import LivePages
from engine.trace.page_html import live_page

PAGES, STATE = "/pages", "/pages/state"
LEAST_SECONDS = 0.5  # between two looks
BUSY_DIVISOR = 50  # a look takes at most this part of the time
FAST = 1  # level of compression
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
HEADERS = {"content-security-policy": POLICY, "cache-control": "no-store", "x-content-type-options": "nosniff"}
ASK_FOR_KEY = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Pages</title>
<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark;font:16px system-ui}</style>
<form style="max-width:24rem;margin:20vh auto;padding:1rem"><h1 style="font-size:1.2rem">Pages</h1>
<label>API key of this server <input type="password" autocomplete="off" required autofocus></label>
<button>show</button><p role="alert"></p></form><script>"use strict";
document.forms[0].onsubmit = async (event) => {
  event.preventDefault();
  const key = document.querySelector("input").value;
  const answer = await fetch("/pages", { headers: { authorization: `Bearer ${key}` } });
  if (!answer.ok) { document.querySelector("p").textContent = "The server does not know this key."; return; }
  const page = await answer.text();
  window.pagesKey = key;
  document.open(); document.write(page); document.close();
};</script></html>
"""


class LivePageEndpoints:
    """The page, and the state that it asks for.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._live: LivePages | None = None
        self._turn = asyncio.Lock()
        self._packed, self._due = b"", 0.0

    async def show_page(self, request: Request) -> Response:
        """``GET /pages``."""
        return HTMLResponse(live_page(STATE), headers=HEADERS)

    async def show_state(self, request: Request) -> Response:
        """``GET /pages/state``: JSON, compressed; not newer than ``LEAST_SECONDS`` where others ask too."""
        async with self._turn:
            if time.monotonic() >= self._due:
                await self._look()
        content, headers = self._packed, {**HEADERS, "content-encoding": "gzip"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            content, headers = await asyncio.to_thread(gzip.decompress, content), HEADERS
        return Response(content, headers=headers, media_type="application/json")

    async def _look(self) -> None:
        seconds = [0.0]

        def look(llm: LLM) -> dict[str, object]:
            begun = time.monotonic()
            self._live = self._live or LivePages(llm.scheduler)
            state = self._live.state(llm.stats.steps)
            seconds[0] = time.monotonic() - begun
            return state

        try:
            state = await self._llm.call(look)
        except EngineError as error:
            raise ApiError(503, "the engine is closed or has failed", code="engine_error") from error
        self._packed = await asyncio.to_thread(lambda: gzip.compress(json.dumps(state).encode(), FAST))
        self._due = time.monotonic() + max(LEAST_SECONDS, seconds[0] * BUSY_DIVISOR)


def ask_for_key() -> Response:
    """What a browser without a key gets: a form for it. It stays in the page, and the status is that of a refusal."""
    return HTMLResponse(ASK_FOR_KEY, status_code=401, headers={**HEADERS, "www-authenticate": "Bearer"})
