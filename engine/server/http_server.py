"""One run of the server: its socket, its loop, its signals, and its end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from engine.server.connection import connection_class
from engine.server.endpoints import make_app
from engine.server.logprob_json import TokenNames
from engine.server.safe_log import begin_log
from engine.server.service import Prepared, Service
from engine.serving.async_llm import AsyncLLM
from engine.serving.llm import LLM
from engine.terminal import FAILED, INTERRUPTED, leave

KEEP_ALIVE_SECONDS = 30
BACKLOG = 256
SENDING_SECONDS = 5  # for the last words to clients, when all answers have ended
_TICK_SECONDS = 0.02


class HttpServer:
    """Serves requests until it is stopped.

    Args:
        service: the engine and what is set of the server.
        bound: a socket at the address to listen on.
        on_ready: called with the server's address when it listens.
    """

    def __init__(self, service: Service, bound: socket.socket, on_ready: Callable[[str], None]) -> None:
        self._service = service
        self._socket = bound
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._signals: list[int] = []
        config = uvicorn.Config(
            make_app(service),
            http=connection_class(service.options),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SENDING_SECONDS,
        )
        self._server = _Server(config)

    async def run(self) -> int:
        """Serves; returns the process's exit code when it has been stopped, and the engine is closed.

        Ctrl-C and SIGTERM stop it, where the loop runs in the main thread; a second one ends the process at once.
        """
        loop = asyncio.get_running_loop()
        caught = []
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError, RuntimeError):  # not the main thread
                loop.add_signal_handler(number, self._signalled, number)
                caught.append(number)
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        try:
            await self._until_started(serving)
            await asyncio.wait(
                (serving, waiting := asyncio.create_task(self._stop.wait())), return_when="FIRST_COMPLETED"
            )
            waiting.cancel()
            cut_off = await self._drain()
        finally:
            self._server.should_exit = True
            await serving
            for number in caught:
                loop.remove_signal_handler(number)
        if signal.SIGINT in self._signals:
            return INTERRUPTED
        return FAILED if cut_off else 0

    def stop(self) -> None:
        """Lets no request in any more, and ends the run when those that are in have been answered."""
        self._service.is_stopping = True
        self._stop.set()

    def _signalled(self, number: int) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            leave(INTERRUPTED)
        self.stop()

    async def _until_started(self, serving: asyncio.Task[None]) -> None:
        while not self._server.started and not serving.done():
            await asyncio.sleep(_TICK_SECONDS)
        host, port = self._socket.getsockname()[:2]
        self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def _drain(self) -> int:
        """Waits for the requests that are in, for as long as they may take; returns how many were cut off."""
        await self._until_idle(self._service.options.stop_timeout)
        cut_off = self._service.in_flight
        await self._service.llm.close(drain=False)
        await self._until_idle(SENDING_SECONDS)
        return cut_off

    async def _until_idle(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._service.in_flight:
                    await asyncio.sleep(_TICK_SECONDS)


def serve(llm: LLM, prepared: Prepared, bound: socket.socket, on_ready: Callable[[str], None]) -> int:
    """Serves an engine until the process is told to stop; returns its exit code.

    Args:
        llm: the engine, which is idle again afterwards.
        prepared: what is set of the server.
        bound: a socket at the address to listen on.
        on_ready: called with a line for the user when the server listens.
    """
    begin_log()
    name = prepared.model_name

    async def run() -> int:
        engine = AsyncLLM.over(llm, max_waiting=prepared.options.max_waiting)
        service = Service(engine, prepared, TokenNames(llm.tokenizer))
        return await HttpServer(service, bound, lambda url: on_ready(f"serving {name} at {url}/v1; Ctrl-C stops")).run()

    with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
        return runner.run(run())


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The event loop of uvloop, where it can be had; None is asyncio's own."""
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to its owner."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield
