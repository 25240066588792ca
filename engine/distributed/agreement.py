"""What the processes of one engine agree on before they act: requests, aborts, the time, and that they did the same.

It carries JSON values: a caller whose values are of another kind says how they are encoded and decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from engine.distributed.processes import SharedPlan
from engine.errors import ConfigError, EngineError, IntegrityError, RequestError

T = TypeVar("T")


class Agreement:
    """Process 0's decisions in every process; with one process, its own at once.

    Args:
        plan: carries them.
    """

    def __init__(self, plan: SharedPlan) -> None:
        self.plan = plan
        self._aborts: list[int] = []

    def decided_by_first(self, decide: Callable[[], T], *, encode: Callable[[T], Any], decode: Callable[[Any], T]) -> T:
        """What process 0's ``decide`` returns, in every process; the other processes do not call theirs.

        Args:
            decide: checks a caller's request, and draws what the caller left open.
            encode: turns the result into a JSON value.
            decode: turns that value back.

        Raises:
            Exception: in process 0 whatever ``decide`` raises.
            RequestError: it raised there, in the other processes.
            ProcessLost: process 0 is gone.
        """
        if not self.plan.is_shared:
            return decide()
        outcome = self._outcome_of_first(lambda: encode(decide()))
        if "error" in outcome:
            raise RequestError(outcome["error"][1])
        return decode(outcome["value"])

    def done_by_first(self, action: Callable[[], int], part: Callable[[], object] | None = None) -> int:
        """What process 0's ``action`` returns, in every process once it is done; the others do not call theirs.

        Args:
            action: process 0's.
            part: what each process has to do for it, such as its part in a gather; process 0 calls it after the
                action, which may have failed half way, for what is left.

        Raises:
            Exception: in process 0 whatever ``action`` raises.
            EngineError: it raised there, in the other processes.
            ProcessLost: process 0 is gone.
        """
        if not self.plan.is_shared:
            return action()
        outcome = self._outcome_of_first(action, part)
        if "error" in outcome:
            raise EngineError(f"process 0 could not do its part: {': '.join(outcome['error'])}; see what it said")
        value: int = outcome["value"]
        return value

    def _outcome_of_first(self, action: Callable[[], Any], part: Callable[[], object] | None = None) -> dict[str, Any]:
        """The ``value`` that process 0's ``action`` returned, or the ``error`` that it raised: type and message."""
        failed: Exception | None = None
        outcome: dict[str, Any] = {}
        if self.plan.leads:
            try:
                outcome = {"value": action()}
            except Exception as error:  # a caller's iterator or a disk may raise anything; the others must not wait
                failed, outcome = error, {"error": [type(error).__name__, str(error)]}
        if part:
            part()
        agreed: dict[str, Any] = self.plan.agree(outcome)
        if failed:
            raise failed
        return agreed

    def require_same(self, value: str, what: str) -> None:
        """Raises where this process has another value than process 0.

        Args:
            value: identifies what this process has.
            what: its name in the message, with the remedy.

        Raises:
            ConfigError: the values differ.
            ProcessLost: process 0 is gone.
        """
        if self.plan.agree(value) != value:
            raise ConfigError(f"process {jax.process_index()} does not have what process 0 has: {what}")

    def later_abort(self, request_id: int) -> None:
        """Makes every process abort a request before the next step; only process 0's call counts."""
        if self.plan.leads:
            self._aborts.append(request_id)

    def on_step(self, parcels: int) -> Sequence[int]:
        """Agrees on the next step: which requests to abort, and that all processes have sent the same steps so far.

        Args:
            parcels: a checksum of all parcels that this process has sent to its devices.

        Returns:
            Ids of the requests to abort before it.

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
