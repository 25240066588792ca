"""The engine as a user sees it: prompts in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.kv.pool import TokenToKVPool
from engine.memory.cache_manager import CacheManager
from engine.models.checkpoint import load_llama
from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.llama import Llama
from engine.models.text import Tokenizer, load_tokenizer
from engine.serving.batcher import Batcher
from engine.serving.build import context_length, make_backend, make_pool, weights_dtype
from engine.serving.intake import Intake
from engine.serving.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from engine.serving.runner import CompileCounter, ModelRunner
from engine.serving.sampler import Sampled
from engine.serving.scheduler import ScheduledStep, Scheduler
from engine.serving.stats import EngineStats

Progress = Callable[[int, int], None]


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
        self.model: Llama
        self.tokenizer: Tokenizer | None = None
        if isinstance(model, Llama):
            self.config = EngineConfig.from_mapping(options)
            self.model = model
            if self.config.dtype not in ("auto", model.dtype.name):
                raise ConfigError(
                    f"dtype={self.config.dtype!r} for a Llama of {model.dtype}; leave it out, or cast the model"
                )
        else:
            directory = Path(model or DEFAULT_MODEL_DIR)
            self.config = EngineConfig.from_mapping({"model": str(directory), **options})
            self.model = load_llama(directory, dtype=weights_dtype(self.config))
            self.tokenizer = load_tokenizer(directory)
        longest = context_length(self.config, self.model.config)
        backend = make_backend(self.config, self.model.config)
        self.plan, pool = make_pool(self.config, self.model)
        slots, budget = self.config.max_running_requests, self.config.chunked_prefill_size
        self.cache = CacheManager(pool.size, pool.page_size, slots, longest)
        self.scheduler = Scheduler(self.cache, max_running_requests=slots, max_step_tokens=budget)
        self.stats = EngineStats()
        self._intake = Intake(self.model.config, self.tokenizer, longest)
        self._batcher = Batcher(self.cache, slots, self.scheduler.max_step_tokens)
        self._runner = ModelRunner(self.model, pool, backend, self._batcher.shapes)
        self._requests: dict[int, Request] = {}
        self._compiles = CompileCounter()
        self._runner.compile_all(on_compile)
        self._compiles.count = 0

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
        if self._requests:
            raise RequestError(
                f"generate needs an idle engine, and {len(self._requests)} added requests are unfinished; "
                "call step until they are done, or abort them"
            )
        requests = self._intake.requests(prompts, sampling_params)
        for request in requests:
            self.scheduler.check_fits(request)
        for request in requests:
            self._add(request)
        try:
            while self._requests:
                self.step(return_logits=return_logits)
                if on_progress:
                    on_progress(len(requests) - len(self._requests), len(requests))
        finally:  # an interrupted call leaves no page behind
            for request in requests:
                self.abort(request.request_id)
        return [self._output(request) for request in requests]

    def add_request(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> int:
        """Queues a request for ``step`` and returns its id; raises RequestError if it can never be served."""
        request = self._intake.request(prompt, sampling_params or SamplingParams())
        self._add(request)
        return request.request_id

    def step(self, *, return_logits: bool = False) -> dict[int, RequestOutput]:
        """Runs one step and returns the answers that it finished, by request id."""
        if not self._requests:
            return {}
        start = time.perf_counter()
        step = self.scheduler.next_step()
        try:
            parcel, shape = self._batcher.fill(step)
            wants_logprobs = any(row.request.params.logprobs is not None for row in step.rows)
            sampled, logits = self._runner.step(parcel, shape, logprobs=wants_logprobs)
        except BaseException:  # an interrupt too: what did not run must not be taken for computed
            self.scheduler.undo(step)
            raise
        _keep_logprobs(step, sampled)
        if return_logits:
            _keep_logits(step, np.asarray(logits))
        self.stats.note(step, time.perf_counter() - start, self.cache.held_tokens)
        finished = self.scheduler.commit(step, np.asarray(sampled.tokens))
        return {request.request_id: self._output(self._requests.pop(request.request_id)) for request in finished}

    def abort(self, request_id: int) -> None:
        """Ends a request and gives back every page it holds; does nothing if it has ended."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.abort(request)

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

    def _add(self, request: Request) -> None:
        self.scheduler.add(request)
        self._requests[request.request_id] = request

    def _output(self, request: Request) -> RequestOutput:
        finish = request.finish_reason or FinishReason.ABORT
        return RequestOutput(
            prompt_token_ids=request.prompt.tolist(),
            token_ids=list(request.output),
            text=self.tokenizer.decode(request.output) if self.tokenizer else "",
            finish_reason=finish.value,
            logprobs=None if request.params.logprobs is None else list(request.logprobs),
            logits=np.stack(request.logits) if request.logits else None,
        )


def _keep_logits(step: ScheduledStep, logits: npt.NDArray[np.float32]) -> None:
    for row, values in zip(step.rows, logits, strict=False):  # padding rows follow
        if row.samples:
            row.request.logits.append(values)


def _keep_logprobs(step: ScheduledStep, sampled: Sampled) -> None:
    if sampled.logprob is None or sampled.top_ids is None or sampled.top_logprobs is None:
        return
    for index, row in enumerate(step.rows):
        wanted = row.request.params.logprobs
        if wanted is not None and row.samples:
            ids, values = sampled.top_ids[index, :wanted].tolist(), sampled.top_logprobs[index, :wanted].tolist()
            top = tuple(zip(ids, values, strict=True))
            row.request.logprobs.append(TokenLogprobs(float(sampled.logprob[index]), top))
