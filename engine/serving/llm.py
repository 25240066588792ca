"""The engine as a user sees it: prompts in, tokens out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, RequestError
from engine.kv.pool import TokenToKVPool
from engine.memory.cache_manager import CacheManager
from engine.memory.prefix_cache import RadixCache
from engine.memory.scope import CacheScope, LayoutKey
from engine.models.checkpoint import load_llama
from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.llama import Llama
from engine.models.replacement import require_replaceable
from engine.models.sharding import shard_llama
from engine.models.text import Tokenizer, load_tokenizer
from engine.processes import SharedPlan, lost
from engine.serving.agreement import Agreement
from engine.serving.batcher import parcel_shapes
from engine.serving.build import (
    make_backend,
    make_batcher,
    make_caches,
    make_mesh_of,
    make_pool,
    make_scheduler,
    step_tokens,
    weights_dtype,
    weights_identity,
)
from engine.serving.gate import Gate
from engine.serving.intake import Intake
from engine.serving.metrics import EngineMetrics, collect_metrics
from engine.serving.request import FinishReason, Request, RequestOutput, SamplingParams
from engine.serving.runner import CompileCounter, ModelRunner
from engine.serving.stats import EngineStats
from engine.serving.stepper import Stepper

Progress = Callable[[int, int], None]

_logger = logging.getLogger(__name__)


class LLM:
    """A Llama over a paged pool of fused keys and values, with continuous batching.

    Every program is compiled here, before the first request.

    Args:
        model: checkpoint directory in the Hugging Face layout, a Llama, or None for the one that ships.
        on_compile: called with (programs compiled, programs in all) while the engine compiles.
        **options: the other fields of EngineConfig.

    Raises:
        ConfigError: an option is unknown or wrong.
        CheckpointError: the checkpoint cannot be loaded.
    """

    def __init__(
        self, model: str | Path | Llama | None = None, *, on_compile: Progress | None = None, **options: Any
    ) -> None:
        self.tokenizer: Tokenizer | None = None
        directory = None
        if isinstance(model, Llama):
            self.config = EngineConfig.from_mapping(options)
            self._mesh = make_mesh_of(self.config)
            self.model = model if self._mesh is None else shard_llama(model, self._mesh)
            if self.config.dtype not in ("auto", model.dtype.name):
                raise ConfigError(
                    f"dtype={self.config.dtype!r} for a Llama of {model.dtype}; leave it out, or cast the model"
                )
        else:
            directory = Path(model or DEFAULT_MODEL_DIR)
            self.config = EngineConfig.from_mapping({"model": str(directory), **options})
            self._mesh = make_mesh_of(self.config)
            self.model = load_llama(directory, dtype=weights_dtype(self.config), mesh=self._mesh)
            self.tokenizer = load_tokenizer(directory)
        backend = make_backend(self.config, self.model.config, self._mesh)
        self.plan, pool = make_pool(self.config, self.model, self._mesh)
        slots = self.config.max_running_requests // self.config.dp
        shapes = parcel_shapes(slots, step_tokens(self.config), pool.page_size)
        self._runner = ModelRunner(
            self.model,
            pool,
            backend,
            shapes,
            max_pages=-(-self.plan.context_length // pool.page_size),
            moves_pages=self.config.host_tier_bytes > 0,
        )
        self.caches, self._store = make_caches(self.config, self.model.config, pool, self._runner)
        self._agreement = Agreement(SharedPlan())
        if self._store is not None:
            where = f"saved prefixes from prefix_cache_dir={self.config.prefix_cache_dir}"
            self._agreement.require_same(self._store.loaded, f"{where}; let it be one directory that all can read")
        self.scheduler = make_scheduler(self.config, self.caches, self._agreement.plan.clock)
        self.stats = EngineStats()
        self._identity = self._identity_of(model if isinstance(model, Llama) else self.model, directory)
        self._weights_epoch = 0
        self._layout = LayoutKey.of(pool.layout.to_dict())
        self._intake = Intake(self.model.config, self.tokenizer, self.plan.context_length, self._scope_for)
        self._gate = Gate()
        batcher = make_batcher(self.caches, shapes)
        self._stepper = Stepper(self.scheduler, batcher, self._runner, self.stats, overlap=self.config.overlap_steps)
        self._unfinished: dict[int, Request] = {}  # leaders: the first of the answers to a prompt
        self._leader_of: dict[int, Request] = {}
        self._unforked: list[Request] = []  # leaders with siblings that have not started
        self._ended: list[Request] = []  # not reported yet; kept over a step that fails
        self._compiles = CompileCounter()
        self._runner.compile_all(on_compile)
        self._compiles.count = 0
        _logger.info("%s", self.plan.describe())

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_logits: bool = False,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answers many prompts at once.

        Args:
            prompts: texts, or lists of token ids.
            sampling_params: for all, or one for each prompt; None is greedy with the default length.
            return_logits: also return the float32 logits each token was chosen from.
            on_progress: called with (requests finished, requests in all) after each step.

        Returns:
            The answers in the order of the prompts.

        Raises:
            RequestError: a prompt can never be served, or requests of ``add_request`` are unfinished; then none was
                started.
        """
        if self._unfinished:
            raise RequestError(
                f"generate needs an idle engine, and {len(self._unfinished)} added requests are unfinished; "
                "call step until they are done, or abort them"
            )
        checked = self._agreement.on_requests(lambda: self._intake.check(prompts, sampling_params))
        requests = [self._intake.make(request) for request in checked]
        for request in requests:
            self.scheduler.check_fits(request)
        done: dict[int, RequestOutput] = {}
        try:
            for request in requests:
                self._add(request)
            while self._unfinished:
                done |= self.step(return_logits=return_logits)
                if on_progress:
                    on_progress(len(done), len(requests))
        finally:  # an interrupted call leaves no page behind
            for request in requests:
                self._abort(request.request_id)
        return [done.get(request.request_id) or self._output(request) for request in requests]  # who was aborted: as is

    def add_request(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> int:
        """Queues a request for ``step`` and returns its id; raises RequestError if it can never be served."""
        (checked,) = self._agreement.on_requests(lambda: self._intake.check([prompt], sampling_params))
        request = self._intake.make(checked)
        self._add(request)
        return request.request_id

    def step(self, *, return_logits: bool = False) -> dict[int, RequestOutput]:
        """Advances by one step and returns the answers that are finished, by request id.

        Where steps overlap, what is dispatched now is read and booked by the next call.
        """
        with self._gate:
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

    def _step(self, return_logits: bool) -> dict[int, RequestOutput]:
        self._ended += [request for late in self.scheduler.expire() for request in self._with_unstarted(late)]
        self._start_siblings()  # those whose start failed in the last step
        if self.scheduler.has_work:
            self._stepper.advance(self._ended, return_logits=return_logits)
            self._start_siblings()
        else:
            self._stepper.drop()
        self._gate.interrupts.let_in()  # while what has ended is still to be reported
        outputs = self._outputs_of(self._ended)  # decodes text, which may fail; nothing is forgotten before
        for request in self._ended:
            self._leader_of.pop(request.request_id, None)
        for request_id in outputs:
            del self._unfinished[request_id]
        ended, self._ended = self._ended, []
        self.stats.finished.update(request.finish_reason for request in ended if request.finish_reason)
        return outputs

    def abort(self, request_id: int) -> None:
        """Ends a request, with its siblings, and gives back every page; does nothing if it has ended.

        Of several processes it is process 0's call that counts, and all of them do it before their next step.
        """
        if self._agreement.plan.is_shared:
            self._agreement.later_abort(request_id)
        else:
            self._abort(request_id)

    def _abort(self, request_id: int) -> None:
        with self._gate:
            leader = self._unfinished.pop(request_id, None)
            if leader is not None:
                for request in (leader, *leader.siblings):
                    self._leader_of.pop(request.request_id, None)
                    self.stats.finished[FinishReason.ABORT] += request.finish_reason is None
                    self._end(request, FinishReason.ABORT)
                if not self.scheduler.has_work:
                    self._stepper.drop()  # or the idle time until the next step would count as its own

    def metrics(self) -> EngineMetrics:
        """What the engine does and holds now; from another thread, once the step that runs is done."""
        with self._gate.looking():
            return collect_metrics(self.scheduler, self.stats)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, on the device and on the host; no counter goes back."""
        with self._gate:
            for cache in self.caches:
                cache.reset_prefix_cache()

    def replace_weights(self, model: Llama) -> None:
        """Serves other weights of the same geometry from now on; nothing computed with the old ones is used again.

        Raises:
            RequestError: requests are unfinished.
            ConfigError: the geometry, the dtype or the shape of a parameter differs.
        """
        if self._unfinished:
            raise RequestError(f"{len(self._unfinished)} requests are unfinished; finish or abort them first")
        require_replaceable(model, self.model, self.config.tp)
        if self._mesh is not None:
            model = shard_llama(model, self._mesh)
        self._weights_epoch += 1
        with self._gate:
            for prefix in self._prefixes:
                prefix.raise_weights_epoch(self._identity, self._weights_epoch)
        # An epoch counts within one process: saved prefixes of other weights may have the same number.
        self._identity = self._identity_of(model)
        self.model = model
        self._runner.replace_weights(model)

    def save_prefix_cache(self) -> int:
        """Saves every cached prefix to ``prefix_cache_dir``; returns how many files hold them.

        Of several processes, which all must call it, process 0 writes them; when it returns they are there.

        Raises:
            ConfigError: no directory was configured.
            OSError: the disk refuses; in processes other than 0 an EngineError that says so.
        """
        host = self.caches[0].host  # of all
        if self._store is None or host is None:
            raise ConfigError("there is nowhere to save prefixes; set prefix_cache_dir and host_tier_bytes")
        with self._gate:
            for prefix in self._prefixes:
                prefix.evict(prefix.evictable_pages)
            # Every process has the same prefixes, and a directory takes one writer.
            return self._agreement.done_by_first(partial(self._store.save, host.tier.segments()))

    def check_integrity(self) -> None:
        """Proves that every page of every replica is accounted for; else IntegrityError."""
        with self._gate.looking():
            for cache in self.caches:
                cache.check_integrity()

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
        """Programs that anyone in this process has compiled since this engine was ready."""
        return self._compiles.count

    @property
    def _prefixes(self) -> list[RadixCache]:
        return [cache.prefix for cache in self.caches if cache.prefix]

    def _identity_of(self, model: Llama, directory: Path | None = None) -> str:
        """The name of the weights, process 0's: what was made in memory has another one in each process."""
        name: str = self._agreement.plan.agree(weights_identity(model, directory))
        return name

    def _scope_for(self, tenant_salt: str) -> CacheScope:
        return CacheScope(self._identity, self._weights_epoch, None, tenant_salt, self._layout)

    def _add(self, request: Request) -> None:
        with self._gate:
            self.scheduler.add(request)
            self._unfinished[request.request_id] = request
            for member in (request, *request.siblings):
                self._leader_of[member.request_id] = request
            if request.siblings:
                self._unforked.append(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request whether it has reached the scheduler or not."""
        if request.arrival is None:
            request.finish_reason = reason
        else:
            self.scheduler.end(request, reason)

    def _with_unstarted(self, request: Request) -> list[Request]:
        """A request that ran out of time, and the siblings that wait for it to compute their prompt."""
        unstarted = [sibling for sibling in request.siblings if sibling.arrival is None]
        for sibling in unstarted:
            self._end(sibling, FinishReason.TIMEOUT)
        return [request, *unstarted]

    def _start_siblings(self) -> None:
        """Starts the other answers to a prompt once it has been computed, from its pages."""
        for leader in [leader for leader in self._unforked if leader.output or leader.finish_reason]:
            for sibling in leader.siblings:
                if sibling.arrival is None and sibling.finish_reason is None:
                    self._start(sibling, leader)
            self._unforked.remove(leader)  # not before: what fails here must not lose the others

    def _start(self, sibling: Request, leader: Request) -> None:
        copy = self.scheduler.fork(leader, sibling)
        try:
            if copy is not None:
                self._runner.copy(copy.sources, copy.targets, replica=copy.replica)
        except BaseException:  # an interrupt too: its last page holds nothing
            self.scheduler.give_up(sibling)
            raise

    def _outputs_of(self, ended: list[Request]) -> dict[int, RequestOutput]:
        """The answers that are complete now: a leader's, once its siblings have ended too."""
        outputs = {}
        for request in ended:
            leader = self._leader_of.get(request.request_id)
            if leader is None or leader.request_id in outputs:  # aborted since it ended; or a sibling brought it
                continue
            if all(member.finish_reason is not None for member in (leader, *leader.siblings)):
                outputs[leader.request_id] = self._output(leader)
        return outputs

    def _output(self, request: Request) -> RequestOutput:
        finish = request.finish_reason or FinishReason.ABORT
        return RequestOutput(
            prompt_token_ids=request.prompt.tolist(),
            token_ids=list(request.output),
            text=self.tokenizer.decode(request.output) if self.tokenizer else "",
            finish_reason=finish.value,
            cached_tokens=request.cached_tokens or 0,
            logprobs=None if request.params.logprobs is None else list(request.logprobs),
            logits=np.stack(request.logits) if request.logits else None,
            siblings=tuple(self._output(sibling) for sibling in request.siblings),
        )
