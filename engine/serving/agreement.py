"""What the processes of one engine agree on before they act: requests, aborts, the time, and that they did the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from engine.distributed.processes import SharedPlan
from engine.errors import ConfigError, EngineError, IntegrityError, RequestError
from engine.serving.intake import Checked
from engine.serving.request import SamplingParams


class Agreement:
    """Process 0's requests and aborts, in every process; with one process, its own at once.

    Args:
        plan: carries them.
    """

    def __init__(self, plan: SharedPlan) -> None:
        self.plan = plan
        self._aborts: list[int] = []

    def on_requests(self, check: Callable[[], list[Checked]]) -> list[Checked]:
        """The requests that process 0's ``check`` lets pass, or its refusal, in every process.

        Seeds that nobody gave are drawn by ``check``, so they are process 0's.

        Raises:
            RequestError: a request can never be served; in processes other than 0 whatever stopped its ``check``.
            ProcessLost: process 0 is gone.
        """
        if not self.plan.is_shared:
            return check()
        refused: Exception | None = None
        offer: object = None
        if self.plan.leads:
            try:
                offer = [[ids.tolist(), dataclasses.asdict(params)] for ids, params in check()]
            except Exception as error:  # the caller's iterator may raise anything, and the others must not wait
                refused, offer = error, str(error)
        agreed = self.plan.agree(offer)
        if isinstance(agreed, str):
            raise refused or RequestError(agreed)
        return [(np.array(ids, np.int32), _params(values)) for ids, values in agreed]

    def done_by_first(self, action: Callable[[], int], part: Callable[[], object] | None = None) -> int:
        """What process 0's ``action`` returns, in every process, once it is done; the others do not call theirs.

        Args:
            action: process 0's.
            part: what each process has to do for it, such as its part in reading what all hold; process 0 calls it
                after the action, which may have failed half way, for what is left.

        Raises:
            Exception: what the action raises, in process 0.
            EngineError: it raised there, in the others.
            ProcessLost: process 0 is gone.
        """
        if not self.plan.is_shared:
            return action()
        failed: Exception | None = None
        done: object = None
        if self.plan.leads:
            try:
                done = action()
            except Exception as error:  # whatever it is, the others must not wait for it
                failed, done = error, f"{type(error).__name__}: {error}"
        if part:
            part()
        agreed: int | str = self.plan.agree(done)
        if isinstance(agreed, str):
            raise failed or EngineError(f"process 0 could not do its part: {agreed}; see what it said")
        return agreed

    def require_same(self, value: str, what: str) -> None:
        """Refuses to go on where this process has something else than process 0.

        Args:
            value: what tells it from others.
            what: names it in the message, with what would make it the same.

        Raises:
            ConfigError: the values differ.
            ProcessLost: process 0 is gone.
        """
        if self.plan.agree(value) != value:
            raise ConfigError(f"process {jax.process_index()} has not what process 0 has: {what}")

    def later_abort(self, request_id: int) -> None:
        """Has every process abort a request before the next step; counts in process 0 alone."""
        if self.plan.leads:
            self._aborts.append(request_id)

    def on_step(self, parcels: int) -> Sequence[int]:
        """What process 0 says about the next step.

        Args:
            parcels: a checksum of all parcels that this process has sent to its devices.

        Returns:
            The requests to abort before it.

        Raises:
            IntegrityError: this process did not send what process 0 sent.
            ProcessLost: process 0 is gone.
        """
        aborts: Sequence[int]
        aborts, of_first = self.plan.agree([self._aborts, parcels])
        self._aborts = []
        if parcels != of_first:
            raise IntegrityError(
                f"the steps of this process (checksum {parcels:#x}) are not those of process 0 ({of_first:#x}): the "
                "processes were not given the same configuration or did not make the same calls"
            )
        return aborts


def _params(values: dict[str, object]) -> SamplingParams:
    stops = values["stop_token_ids"]
    return SamplingParams(**{**values, "stop_token_ids": tuple(stops)})  # type: ignore[arg-type]
