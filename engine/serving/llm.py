"""The engine as a user sees it: prompts in, tokens out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.distributed.agreement import Agreement
from engine.distributed.processes import SharedPlan, lost
from engine.errors import ConfigError, EngineError, IntegrityError, ProcessLost, RequestError
from engine.kv.pool import TokenToKVPool
from engine.memory.manager import CacheManager
from engine.memory.saved_segments import cached_segments
from engine.memory.scope import CacheScope, LayoutKey
from engine.models.decoder import Decoder
from engine.models.replacement import require_replaceable
from engine.models.sharding import shard_model
from engine.serving.build import (
    at_first_epoch,
    make_attention,
    make_caches,
    make_pool,
    make_recorder,
    make_scheduler,
    step_tokens,
    weights_identity,
)
from engine.serving.compile_cache import use_compile_cache
from engine.serving.deltas import Deltas, Follower, Last, StepOutput
from engine.serving.device.batcher import Batcher, parcel_shapes
from engine.serving.device.page_mover import PageMover
from engine.serving.device.runner import CompileCounter, ModelRunner
from engine.serving.gate import Gate
from engine.serving.groups import AnswerGroups, group_of, is_new
from engine.serving.intake import Intake
from engine.serving.loading import load_parts
from engine.serving.recovery import Recovery
from engine.serving.reports import Reports
from engine.serving.request import AnswerDelta, FinishReason, Request, RequestOutput
from engine.serving.sampling_params import SamplingParams
from engine.serving.stepper import Stepper
from engine.serving.watch.board import SnapshotBoard
from engine.serving.watch.metrics import EngineMetrics, collect_metrics
from engine.serving.watch.stats import EngineStats

Progress = Callable[[int, int], None]

_logger = logging.getLogger(__name__)


class LLM:
    """A language model over a paged pool of fused keys and values, with continuous batching.

    Every program is compiled here, before the first request.

    Args:
        model: checkpoint directory in the Hugging Face layout, a Decoder, or None for the one that ships.
        on_compile: called with (programs compiled, programs in all) while the engine compiles.
        before_compile: called with the engine when all but that is done, such as to ``check_requests``.
        **options: the other fields of EngineConfig.

    Raises:
        ConfigError: an option is unknown or wrong.
        CheckpointError: the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path | Decoder | None = None,
        *,
        on_compile: Progress | None = None,
        before_compile: Callable[[LLM], None] | None = None,
        **options: Any,
    ) -> None:
        use_compile_cache()
        loaded = load_parts(model, options)
        self.config, self._mesh, self.model, self.tokenizer = loaded.config, loaded.mesh, loaded.model, loaded.tokenizer
        attention = make_attention(self.config, self.model.config, self._mesh)
        self.plan, pool = make_pool(self.config, self.model, self._mesh)
        rows = self.config.max_running_requests // self.config.dp
        shapes = parcel_shapes(rows, step_tokens(self.config), pool.page_size, attention.groups.num_groups)
        self._runner = ModelRunner(
            self.model,
            pool,
            attention,
            shapes,
            max_pages=-(-self.plan.context_length // pool.page_size),
            moves_pages=self.config.host_tier_bytes > 0,
        )
        recorder = make_recorder(self.config)
        self.caches, self._store = make_caches(self.config, self.model.config, pool, recorder)
        self._agreement = Agreement(SharedPlan())
        if self._store is not None:
            where = f"saved prefixes from prefix_cache_dir={self.config.prefix_cache_dir}"
            self._agreement.require_same(self._store.loaded, f"{where}; let it be one directory that all can read")
        self.scheduler = make_scheduler(self.config, self.caches, self._agreement.plan.clock, recorder)
        self.stats = EngineStats()
        self._identity = self._identity_of(self.model)
        self._weights_epoch = 0
        self._layout = LayoutKey.of(pool.layout.to_dict())
        self._intake = Intake(self.model.config, self.tokenizer, self.plan.context_length, self._scope_for)
        self._gate = Gate()
        batcher, mover = Batcher(shapes, self.config.dp), PageMover(self._runner, self.caches[0].host_tier)
        self._stepper = Stepper(
            self.scheduler, batcher, self._runner, mover, self.stats, overlap=self.config.overlap_steps
        )
        self._groups = AnswerGroups()
        self._recovery = Recovery(self.scheduler, self._stepper, self._runner, self._groups, self.stats)
        self._deltas = Deltas(self.tokenizer, self._text_of)
        self._reports = Reports(
            self._groups, self._recovery, self.stats, self._text_of, partial(StepOutput, self._gained), self._deltas
        )
        token_bytes = {pool.dtype.name: self.plan.model_token_bytes}
        self._board = SnapshotBoard(
            lambda: collect_metrics(self.scheduler, self.stats, token_bytes),
            self._gate,
            lambda: self.scheduler.has_work,
        )
        if before_compile:
            before_compile(self)
        self._compiles = CompileCounter()
        self._runner.compile_all(on_compile)
        self._compiles.count = 0
        _logger.info("%s", self.plan.describe())

    def generate(
        self,
        prompts: Iterable[str | Sequence[int]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        return_logits: bool = False,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answers many prompts at once.

        Requests that another thread or ``on_progress`` adds meanwhile are served with them; ``step`` reports those. A
        step that fails is run again by the rule of ``engine.serving.recovery``.

        Args:
            prompts: texts, or lists of token ids; any iterable of them that has an order.
            sampling_params: for all, or one for each prompt; None is greedy with the default length. Where it has no
                seed each prompt draws its own, which its answer reports.
            return_logits: also return the model's own float32 logits at each token, before a request adjusts them.
            on_progress: called with (requests finished, requests in all) after each step.

        Returns:
            The answers in the order of the prompts.

        Raises:
            RequestError: a prompt can never be served, or requests of ``add_request`` are unfinished; then none was
                started.
            Interrupted: Ctrl-C, a KeyboardInterrupt that carries the answers so far.
        """
        if self._groups.unfinished:
            raise RequestError(
                f"generate needs an idle engine, and {len(self._groups.unfinished)} added requests are unfinished; "
                "call step until they are done, or abort them"
            )
        checked = self._intake.check_in_all(self._agreement, prompts, sampling_params)
        requests = [self._intake.make(request) for request in checked]
        for request in requests:
            self.scheduler.check_fits(request)
        with self._reports.claimed(requests) as done:
            try:
                for request in requests:
                    self.add_made(request)
                open_ids = {request.request_id for request in requests}
                while open_ids := open_ids & self._groups.unfinished.keys():
                    self._advance_or_recover(return_logits)
                    if on_progress:
                        on_progress(len(done), len(requests))
            finally:  # an interrupted call leaves no page behind
                self._abort_all(requests)
        return self._reports.answers(requests, done)

    def check_requests(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> None:
        """Raises RequestError where ``generate`` would refuse these requests; starts nothing."""
        for checked in self._intake.check(prompts, sampling_params):
            self.scheduler.check_fits(self._intake.make(checked))

    def add_request(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> int:
        """Queues a request for ``step`` and returns its id; raises RequestError if it can never be served."""
        request = self.make_request(prompt, sampling_params)
        self.add_made(request)
        return request.request_id

    def make_request(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> Request:
        """A request for ``add_made``, from a thread of one's own if need be; raises as ``add_request``."""
        (checked,) = self._intake.check_in_all(self._agreement, [prompt], sampling_params)
        request = self._intake.make(checked)
        self.scheduler.check_fits(request)
        return request

    def add_made(self, request: Request) -> None:
        """Queues a request of ``make_request`` for ``step``."""
        with self._gate.entered():
            try:
                self.stats.latency.note_arrival(group_of(request), self.stats.clock())
                self._groups.add(request)
                self.scheduler.add(request)
            except BaseException:
                self._groups.forget(request)
                if request in self.scheduler.waiting:
                    self.scheduler.waiting.remove(request)
                raise

    def follow(self, request: Request) -> Follower:
        """Tells what the answers to a request gain, each gain once and from their beginning."""
        return self._deltas.follow(request)

    def is_unfinished(self, request_id: int) -> bool:
        """Whether a request was queued and has neither ended nor been aborted."""
        return request_id in self._groups.unfinished

    def output_so_far(self, request: Request) -> RequestOutput:
        """A request's answer, or what there is of it; without its text where that cannot be had."""
        try:
            return self._reports.output(request)
        except Exception as error:
            _logger.exception("the text of request %d cannot be had", request.request_id)
            request.error = request.error or f"{type(error).__name__}: {error}"
            return self._reports.output(request, has_text=False)

    def stream(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> Generator[AnswerDelta, None, RequestOutput]:
        """Answers a prompt and yields what its answers gain, step by step.

        Other requests are served meanwhile, in the steps of whoever drives the engine. Closing the generator early
        aborts the request. A step that fails is run again by the rule of ``engine.serving.recovery``.

        Args:
            prompt: a text or a list of token ids.
            sampling_params: as for ``generate``.

        Returns:
            A generator of deltas, whose value at its end is the whole output: the texts of the deltas of an answer
            together are its text.

        Raises:
            RequestError: at once, where the prompt can never be served.
        """
        return self._streamed(self.make_request(prompt, sampling_params))

    def step(self, *, return_logits: bool = False) -> StepOutput:
        """Advances by one step and returns the answers that are finished, by request id.

        Its ``new`` reports what every request has gained, finished or not. Where steps overlap, what is dispatched now
        is read and booked by the next call. Answers to a running ``generate`` or ``stream`` are left to it.

        Raises:
            Exception: whatever made the step fail. The engine has recovered by the rule of ``engine.serving.recovery``:
                call again to go on; a request that keeps failing ends with the reason "error".
            ProcessLost: another process is gone; this one cannot go on.
        """
        self._advance(return_logits)
        return self._reports.take()

    def _gained(self, last: Last) -> dict[int, tuple[AnswerDelta, ...]]:
        with self._gate.entered():
            return self._deltas.take(last, self._reports.unclaimed())

    def _streamed(self, request: Request) -> Generator[AnswerDelta, None, RequestOutput]:
        follower = self.follow(request)
        with self._reports.claimed([request]) as done:
            try:
                self.add_made(request)
                is_unfinished = True
                while is_unfinished:
                    with self._gate.entered():  # or a step of another thread would change what is being taken
                        if request.request_id in self._groups.unfinished:  # else a step of others has ended it
                            self._advance_or_recover(return_logits=False)
                        is_unfinished = request.request_id in self._groups.unfinished
                        deltas = follower.take()
                    yield from deltas
            finally:
                self._abort_all([request])
        return self._reports.answers([request], done)[0]

    def _advance(self, return_logits: bool) -> None:
        """A step, with what it has finished put where it belongs."""
        with self._gate.entered():
            try:
                self._agreed_step(return_logits)
                failures = [*self.scheduler.queue.faults, *self._reports.make()]
                if self.scheduler.queue.faults:
                    self._recovery.check_books(failures[0])
                    self.scheduler.queue.faults.clear()
            except ProcessLost:
                raise
            except BaseException as error:
                self._recovery.after(error)
                raise
            if failures:
                raise failures[0]

    def _advance_or_recover(self, return_logits: bool) -> None:
        """A step of ``generate``, which goes on where one fails: the rule of recovery ends what keeps failing."""
        try:
            self._advance(return_logits)
        except (ProcessLost, IntegrityError):
            raise
        except Exception:
            if self._agreement.plan.is_shared:
                raise
            _logger.exception("a step failed; generate goes on")

    def _agreed_step(self, return_logits: bool) -> None:
        if not self._agreement.plan.is_shared:
            return self._step(return_logits)
        try:
            for request_id in self._agreement.on_step(self._runner.parcels):
                self._abort(request_id)
            return self._step(return_logits)
        except (RuntimeError, ValueError) as error:  # as jax reports that a collective lost its partner
            if isinstance(error, EngineError):
                raise
            raise lost(f"the step failed: {error}") from error

    def _step(self, return_logits: bool) -> None:
        ended = self._groups.ended
        ended += [request for late in self.scheduler.expire() for request in self._with_unstarted(late)]
        self._start_siblings()  # those whose start failed in the last step
        if self.scheduler.has_work:
            self._stepper.advance(ended, return_logits=return_logits)
            self._start_siblings()
        else:
            self._stepper.finish()
        if self.scheduler.recorder is not None and not self.scheduler.has_work:
            self.scheduler.recorder.flush()

    def abort(self, request_id: int) -> None:
        """Ends a request, with its siblings, and gives back every page; does nothing if it has ended.

        Of several processes it is process 0's call that counts, and all of them do it before their next step.
        """
        if self._agreement.plan.is_shared:
            self._agreement.later_abort(request_id)
        else:
            self._abort(request_id)

    def _abort(self, request_id: int) -> None:
        with self._gate.entered():
            leader = self._groups.unfinished.get(request_id)
            if leader is None:
                return
            try:
                for request in group_of(leader):
                    self.scheduler.end(request, FinishReason.ABORT)
            except BaseException as error:
                self._recovery.after(error)
                raise
            self._reports.count(leader)
            self._groups.forget(leader)
            if not self.scheduler.has_work:
                self._stepper.finish()  # or the idle time until the next step would count as its own

    def _abort_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self._abort(request.request_id)
            except Exception:
                _logger.exception("request %d could not be aborted; once more", request.request_id)
                self._abort(request.request_id)  # the books have been put right

    def metrics(self) -> EngineMetrics:
        """What the engine does and holds: now, or of a busy engine from another thread, after one of its last steps.

        Readers never hold a step up, however many there are: see ``SnapshotBoard``.
        """
        return self._board.read()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, on the device and on the host; no counter goes back."""
        with self._gate.entered():
            self._stepper.forget_saves()
            for cache in self.caches:
                cache.reset_prefix_cache()

    def replace_weights(self, model: Decoder) -> None:
        """Serves other weights of the same geometry from now on; nothing computed with the old ones is used again.

        Raises:
            RequestError: requests are unfinished.
            ConfigError: the geometry, the dtype, another setting of a module or the shape of a parameter differs.
        """
        if self._groups.unfinished:
            raise RequestError(f"{len(self._groups.unfinished)} requests are unfinished; finish or abort them first")
        require_replaceable(model, self.model, self.config.tp)
        model = shard_model(model, self._mesh)
        identity, weights = self._identity_of(model), self._runner.weights_of(model)
        with self._gate.entered():
            self._weights_epoch += 1  # first: an engine that got no further serves the old weights, from an empty cache
            for cache in self.caches:
                cache.raise_weights_epoch(self._identity, self._weights_epoch)
            self._runner.replace_weights(weights)
            self._identity, self.model = identity, model

    def save_prefix_cache(self) -> int:
        """Saves all that is cached, on device and host, to ``prefix_cache_dir``; returns how many files hold it.

        It stays cached. Of several processes, which all must call it, process 0 writes; when it returns they are there.

        Raises:
            ConfigError: no directory was configured, or another engine has been saving to it for a minute.
            OSError: writing failed; processes other than 0 raise EngineError with that message.
        """
        if self._store is None:
            raise ConfigError("there is nowhere to save prefixes; set prefix_cache_dir and host_tier_bytes")
        with self._gate.entered():
            self._stepper.land_saves()  # first: what is in the tier is listed before what is on the device
            # Every process has the same prefixes and its part in reading them; a directory takes one writer.
            segments = map(at_first_epoch, cached_segments(self.caches, self._stepper.read_pages))
            return self._agreement.done_by_first(partial(self._store.save, segments), partial(deque, segments, 0))

    def check_integrity(self) -> None:
        """Proves that every page of every replica is accounted for; else IntegrityError."""
        with self._gate.entered():
            self.scheduler.check_integrity()

    @property
    def is_shared(self) -> bool:
        """Whether several processes run this engine, each of which makes every call."""
        return self._agreement.plan.is_shared

    @property
    def cache(self) -> CacheManager:
        """The books of the only replica; raises ConfigError where there are several: ``caches`` has them."""
        if len(self.caches) > 1:
            raise ConfigError(f"there are {len(self.caches)} replicas, each with a cache of its own; use caches")
        return self.caches[0]

    @property
    def pool(self) -> TokenToKVPool:
        """The pool as the last step left it."""
        return self._runner.pool

    @property
    def programs(self) -> int:
        """Programs compiled ahead."""
        return self._runner.num_programs

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled in this process since this engine was ready, by any code."""
        return self._compiles.count

    def _identity_of(self, model: Decoder) -> str:
        """The name of the weights, as process 0 has it: an engine that saves nothing has one per process."""
        name: str = self._agreement.plan.agree(weights_identity(self.config, model))
        return name

    def _scope_for(self, tenant_salt: str) -> CacheScope:
        return CacheScope(self._identity, self._weights_epoch, None, tenant_salt, self._layout)

    def _with_unstarted(self, request: Request) -> list[Request]:
        """A request that ran out of time, and the siblings that wait for it to compute their prompt."""
        unstarted = [sibling for sibling in request.siblings if is_new(sibling)]
        for sibling in unstarted:
            sibling.end(FinishReason.TIMEOUT)
        return [request, *unstarted]

    def _start_siblings(self) -> None:
        """Starts the other answers to a prompt once it has been computed, from its pages."""
        for leader, sibling in self._groups.to_start():
            self.scheduler.queue.acting_for = sibling
            self.scheduler.fork(leader, sibling)
            self.stats.latency.note_fork(sibling, self.stats.clock())
            self.scheduler.queue.acting_for = None

    def _text_of(self, request: Request) -> str:
        text = request.text
        if text is None:
            return self.tokenizer.decode(request.output, prompt=request.prompt) if self.tokenizer else ""
        text.read(request.output)
        text.finish()
        return text.text
