"""The engine under asyncio: one thread owns it, and coroutines of any number of event loops wait for its answers.

    event loops                       the engine's thread
    submit ──── commands ───────────▶ add, abort, call          between two steps
    Answering ◀─ one call a report ── step, what each gained    and loop

A step never waits for a reader: what a reader has not taken is merged, and no more than the answer itself is kept.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence, Sized
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar, cast

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, IntegrityError, ProcessLost, QueueFull, RequestError, shown
from engine.models.decoder import Decoder
from engine.models.text import LONG_TEXT, Tokenizer
from engine.planning.sizing import PoolPlan
from engine.serving.answering import Answering, Gain, gain_all
from engine.serving.groups import group_of
from engine.serving.llm import LLM
from engine.serving.request import AnswerDelta, Request, RequestOutput
from engine.serving.sampling_params import SamplingParams
from engine.serving.watch.metrics import EngineMetrics

# Steps that come within this of a report are reported with the next one, an answer's first token and its end apart:
# nobody reads faster, and a reader's event costs more than such a step.
REPORT_SECONDS = 0.02
RECENT_ENDS = 32  # whose pace tells how long a queue takes
LONGEST_WAIT = 60.0  # seconds that a refusal asks to wait at most
EXIT_SECONDS = 30.0  # that the end of the process waits for a step

Result = TypeVar("Result")
# What to do, and what to do with the error where that cannot be done.
Command = tuple[Callable[[], None], Callable[[BaseException], None]]
Prompt = str | Sequence[int]

_logger = logging.getLogger(__name__)


class AsyncLLM:
    """An LLM for asyncio.

    A thread of its own makes every step. The methods are called in any running event loop, those that are not
    coroutines from any thread. Nobody else may use the LLM until this is closed. Cancelling a task that waits for an
    answer aborts it, and its pages go back within a step.

    Args:
        model: as for ``LLM``; the engine is made, and its programs compiled, before this returns.
        max_waiting: most answers that wait for a place among the ``max_running_requests``; None is any number.
        **options: as for ``LLM``.

    Raises:
        ConfigError, CheckpointError: as for ``LLM``.
    """

    def __init__(
        self, model: str | Path | Decoder | None = None, *, max_waiting: int | None = None, **options: Any
    ) -> None:
        self._start(LLM(model, **options), max_waiting)

    @classmethod
    def over(cls, llm: LLM, *, max_waiting: int | None = None) -> AsyncLLM:
        """Takes an LLM that was made already.

        Raises:
            ConfigError: ``max_waiting`` is not a whole number from 0, or the LLM runs in several processes, which
                would have to be told of every request.
        """
        made = cls.__new__(cls)
        made._start(llm, max_waiting)
        return made

    def _start(self, llm: LLM, max_waiting: int | None) -> None:
        if llm.is_shared:
            raise ConfigError("AsyncLLM runs in one process, which drives all of its devices; start it without launch")
        if max_waiting is not None and (not isinstance(max_waiting, int) or max_waiting < 0):
            raise ConfigError(f"max_waiting={max_waiting!r} is not allowed: it must be None or a whole number from 0")
        self.llm = llm
        self._most = None if max_waiting is None else llm.config.max_running_requests + max_waiting
        self._count = 0  # of answers that have not ended
        self._lock = threading.Lock()  # of the count
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._live: dict[int, Answering] = {}  # by request id; the engine's thread alone changes it
        self._untold: dict[int, Answering] = {}  # which have ended and may not have been told
        self._due = 0.0  # when the next gains are reported
        self._failure: EngineError | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        # A thread that is within the device's library when the interpreter goes would bring the process down.
        atexit.register(self._end_at_exit)

    # What it is.

    @property
    def config(self) -> EngineConfig:
        """The engine's options."""
        return self.llm.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer."""
        return self.llm.tokenizer

    @property
    def plan(self) -> PoolPlan:
        """The sizes of the pool."""
        return self.llm.plan

    @property
    def is_healthy(self) -> bool:
        """Whether it takes requests: it was not closed, and its engine has not failed."""
        return self._failure is None and not self._is_closing

    @property
    def unfinished(self) -> int:
        """Answers that have not ended; of a request with ``n`` there are ``n``."""
        return self._count

    def metrics(self) -> EngineMetrics:
        """As ``LLM.metrics``."""
        return self.llm.metrics()

    # Requests.

    async def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, streams: bool = True) -> Answering:
        """Begins to answer a prompt.

        Args:
            prompt: a text or a list of token ids.
            params: how; None is the default.
            streams: whether its deltas will be read; otherwise there is only the output at the end.

        Raises:
            RequestError: it can never be served.
            QueueFull: as many wait as may.
            EngineError: this was closed, or the engine has failed.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is {shown(params)}; give a SamplingParams, or None")
        answers = params.n
        self._enter(answers)
        try:
            if isinstance(prompt, Sized) and len(prompt) > LONG_TEXT:  # else a thread would cost more than it takes
                request = await asyncio.to_thread(self.llm.make_request, prompt, params)
            else:
                request = self.llm.make_request(prompt, params)
        except BaseException:
            self._leave(answers)
            raise
        answering = Answering(request, self.llm.follow(request) if streams else None, self.abort)
        try:
            self._command(partial(self._add, answering), partial(self._refuse, answering))
        except BaseException:
            self._leave(answers)
            raise
        return answering

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[AnswerDelta, None]:
        """Yields what the answers to a prompt gain; raises as ``submit`` at the first item."""
        answering = await self.submit(prompt, params)
        each = answering.__aiter__()
        try:
            async for deltas in each:
                for delta in deltas:
                    yield delta
        finally:
            await each.aclose()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Answers a prompt; raises as ``submit``."""
        return await (await self.submit(prompt, params, streams=False)).result()

    def abort(self, request: Request) -> None:
        """Ends a request; see ``Answering.abort``."""
        self._commands.put((partial(self._abort, request.request_id), _told_already))

    async def call(self, function: Callable[[LLM], Result]) -> Result:
        """Calls a function with the LLM between two steps, in the engine's thread, and returns its result.

        For what changes the engine, such as ``reset_prefix_cache``, or ``check_integrity``. It must not make steps.

        Raises:
            BaseException: what the function raises.
            EngineError: this was closed, or the engine has failed.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[Result | None, BaseException | None]] = loop.create_future()

        def report(result: Result | None, error: BaseException | None = None) -> None:
            with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result((result, error)))

        def do() -> None:
            self._require_sound()
            report(function(self.llm))

        self._command(do, partial(report, None))
        result, error = await done
        if error is not None:
            raise error
        return cast(Result, result)

    # The end.

    async def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Ends the engine's thread. No more requests are taken; the LLM can be used again afterwards.

        Where this is cancelled, the requests that are still under way are aborted and the thread ends by itself.

        Args:
            drain: whether the requests under way are answered first; otherwise they are aborted.
            timeout: seconds after which those that are still under way are aborted; None is any time.
        """
        with self._lock:
            self._is_closing = True
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while drain and self._count and self._failure is None and self._thread.is_alive():
                if deadline is not None and time.monotonic() >= deadline:
                    break
                await asyncio.sleep(0.01)
        finally:
            self._end_thread()
        await asyncio.to_thread(self._thread.join)

    def _end_thread(self) -> None:
        with self._lock:
            self._is_closing = True
        self._commands.put((self._abort_all, _told_already))
        self._commands.put(None)

    def _end_at_exit(self) -> None:
        self._end_thread()
        self._thread.join(EXIT_SECONDS)

    async def __aenter__(self) -> AsyncLLM:
        """Itself; the context's end closes it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Answers what is under way and closes; after an error it aborts that."""
        await self.close(drain=kind is None)

    # How many there are.

    def _enter(self, answers: int) -> None:
        with self._lock:
            if self._most is not None and answers > self._most:
                raise RequestError(
                    f"n={answers} answers to a prompt are more than the {self.config.max_running_requests} that may "
                    f"run and the {self._most - self.config.max_running_requests} that may wait; lower n"
                )
            if self._most is not None and self._count + answers > self._most:
                waiting = max(self._count - self.config.max_running_requests, 0)
                raise QueueFull(
                    f"{waiting} answers wait and {self._most - self.config.max_running_requests} may, beside "
                    f"{self.config.max_running_requests} that run; {answers} more were asked for: try again later",
                    retry_after=self._seconds_for(waiting + answers),
                )
            self._count += answers

    def _leave(self, answers: int) -> None:
        with self._lock:
            self._count -= answers

    def _seconds_for(self, answers: int) -> float:
        """How long it will take until so many more answers have ended, at the pace of the last ones."""
        if len(self._ends) < 2:
            return 1.0
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(max(pace * answers, 1.0), LONGEST_WAIT)

    def _command(self, do: Callable[[], None], refuse: Callable[[BaseException], None]) -> None:
        """Has the engine's thread do something, or refuse it: all that is taken here comes before its end."""
        with self._lock:
            self._require_sound()
            if self._is_closing:
                raise EngineError("the engine is closed and takes no requests; make another one")
            self._commands.put((do, refuse))

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine has failed: {self._failure}") from self._failure

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._do_commands():
                self._report(self._step())
            if self._live:
                self._fail(EngineError("the engine was closed, and what was under way could not be aborted"))
        except BaseException as error:
            _logger.exception("the engine has failed")
            self._fail(error)
            while self._do_commands():  # which are refused
                pass
        finally:
            atexit.unregister(self._end_at_exit)

    def _do_commands(self) -> bool:
        """Does what was asked for between two steps, and waits for more while nothing is to be answered.

        Returns:
            Whether to go on.
        """
        while True:
            try:
                command = self._commands.get(block=not self._live)
            except Empty:
                return True
            if command is None:
                return False
            do, refuse = command
            try:
                do()
            except BaseException as error:  # also what would end a thread: it is whose command this was that is told
                refuse(error)

    def _step(self) -> dict[int, RequestOutput]:
        try:
            return self.llm.step()
        except (ProcessLost, IntegrityError):
            raise
        except Exception:  # it has recovered; what keeps failing ends by the rule of recovery
            _logger.exception("a step failed; the engine goes on")
            return {}

    def _report(self, finished: dict[int, RequestOutput]) -> None:
        """Tells every event loop, in one call each, what its requests have gained; see ``REPORT_SECONDS``."""
        gains: dict[asyncio.AbstractEventLoop, list[Gain]] = {}
        now = time.monotonic()
        is_due = now >= self._due
        if is_due:
            self._due = now + REPORT_SECONDS
        for request_id, answering in list(self._live.items()):
            output = finished.get(request_id)
            if output is None and not self.llm.is_unfinished(request_id):  # as after a step that failed
                output = self.llm.output_so_far(answering.request)
            deltas = answering.take() if is_due or output is not None or not answering.has_begun else ()
            if output is not None:
                self._forget(answering)
            if answering.loop.is_closed():
                self._abort(request_id)
            elif deltas or output is not None:
                gains.setdefault(answering.loop, []).append((answering, deltas, output, None))
        for loop, gained in gains.items():
            self._tell(loop, gained)
        self._untold.clear()

    def _tell(self, loop: asyncio.AbstractEventLoop, gained: list[Gain]) -> None:
        try:
            loop.call_soon_threadsafe(gain_all, gained)
        except RuntimeError:  # the loop was closed, and nobody waits any more
            for answering, *_ in gained:
                self._abort(answering.request_id)

    def _add(self, answering: Answering) -> None:
        self._require_sound()
        self.llm.add_made(answering.request)
        self._live[answering.request_id] = answering

    def _refuse(self, answering: Answering, error: BaseException) -> None:
        """Tells that a request was not added."""
        self._leave(len(group_of(answering.request)))
        self._tell(answering.loop, [(answering, (), None, _as_engine_error(error))])
        self.llm.abort(answering.request_id)  # where the fault came after it was added

    def _abort(self, request_id: int) -> None:
        answering = self._live.get(request_id)
        if answering is None:
            return
        try:
            self.llm.abort(request_id)
        except Exception:
            _logger.exception("request %d could not be aborted; once more", request_id)
            self.llm.abort(request_id)  # the books have been put right
        gain = answering, answering.take(), self.llm.output_so_far(answering.request), None
        self._forget(answering)
        self._tell(answering.loop, [gain])
        self._untold.pop(request_id, None)

    def _abort_all(self) -> None:
        for request_id in list(self._live):
            try:
                self._abort(request_id)
            except Exception:
                _logger.exception("request %d could not be aborted", request_id)

    def _forget(self, answering: Answering) -> None:
        """Notes that an answer has ended; ``_fail`` tells those that nobody has told."""
        self._untold[answering.request_id] = answering
        del self._live[answering.request_id]
        self._leave(len(group_of(answering.request)))
        self._ends.append(time.monotonic())

    def _fail(self, error: BaseException) -> None:
        """Ends everything with an error, where the engine cannot go on."""
        self._failure = failure = _as_engine_error(error)
        for answering in list(self._live.values()):
            self._forget(answering)
        for answering in self._untold.values():
            with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                answering.loop.call_soon_threadsafe(answering.gain, (), None, failure)
        self._untold.clear()


def _told_already(error: BaseException) -> None:
    """Refuses to abort: whoever waits for the answer is told of its end anyway."""
    _logger.error("no request could be aborted: %r", error)


def _as_engine_error(error: BaseException) -> EngineError:
    return error if isinstance(error, EngineError) else EngineError(f"{type(error).__name__}: {error}")
