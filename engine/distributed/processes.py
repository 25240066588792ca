"""Several processes as one engine: joining jax's distributed runtime, and sharing what process 0 decides.

Every process runs the same program. What a step does follows from the requests and the clock of process 0: before each
step process 0 publishes them through jax's coordination service, and every process plans the step from that alone. The
service is a channel between hosts, so a plan never waits behind the step that a device runs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the coordination service's client has no public name (jax 0.10 to 0.12)

from engine.errors import ConfigError, ProcessLost

COORDINATOR, COUNT, INDEX = "ENGINE_COORDINATOR", "ENGINE_PROCESSES", "ENGINE_PROCESS"
HEARTBEAT_SECONDS = 30  # without a heartbeat for so long a process counts as dead, and the others are ended
JOIN_SECONDS = 120
LEAVE_SECONDS = 10
PLAN_SECONDS = 600  # a plan follows a step: longer than any step, or the first compile of one
PLANS_KEPT = 256

_engines = itertools.count()


def join_from(environment: Mapping[str, str]) -> None:
    """Joins the other processes where ``environment`` says that there are any; call it before any use of a device.

    Args:
        environment: ``ENGINE_COORDINATOR`` (host and port of process 0), ``ENGINE_PROCESSES`` and ``ENGINE_PROCESS``
            (from 0), as ``python -m engine launch`` sets them. A coordinator with a loopback address listens on it
            alone; any other listens, as is jax's default, on every address of its machine, or on
            ``JAX_COORDINATOR_BIND_ADDRESS``.

    Raises:
        ConfigError: only some variables are set, a number is invalid or out of range, or the coordinator has no port.
        ProcessLost: the other processes did not join within ``JOIN_SECONDS``.
    """
    given = {name: environment[name] for name in (COORDINATOR, COUNT, INDEX) if name in environment}
    if not given:
        return
    try:
        count, index = int(given[COUNT]), int(given[INDEX])
        coordinator = given[COORDINATOR]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{COORDINATOR}, {COUNT} and {INDEX} must all be set, the last two to numbers; got {given}; use "
            "python -m engine launch"
        ) from error
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= index < count:
        raise ConfigError(
            f"{COORDINATOR}={coordinator!r} must be host:port, and {INDEX}={index} from 0 to {COUNT}-1 of {count}"
        )
    # The CPU backend needs it to reach other processes; other backends ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            coordinator_bind_address=coordinator if _is_loopback(host) else None,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except RuntimeError as error:
        raise ProcessLost(
            f"process {index} of {count} could not join the others at {coordinator} within {JOIN_SECONDS} s: {error}; "
            "start all of them, with the same address"
        ) from error


def _is_loopback(host: str) -> bool:
    """Whether the host part of an address is a loopback address."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a host name
        return False


class SharedPlan:
    """Carries what process 0 decides to every process. With one process every value is its own, at no cost.

    Each engine has its own plan; processes must make their engines in the same order.
    """

    def __init__(self) -> None:
        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        self._name = f"engine/{next(_engines)}"
        self._sent = itertools.count()
        self._now = time.monotonic()

    @property
    def is_shared(self) -> bool:
        """Whether there are other processes."""
        return self._client is not None

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return jax.process_index() == 0

    def clock(self) -> float:
        """Time in seconds: that of process 0 at the last agreement; with one process the present time."""
        return self._now if self.is_shared else time.monotonic()

    def agree(self, value: Any) -> Any:
        """Returns process 0's ``value`` in every process; all processes must make the same calls in the same order.

        Args:
            value: a value that JSON can hold; ignored in processes other than 0.

        Raises:
            ProcessLost: process 0 is gone, or publishes nothing for ``PLAN_SECONDS``.
        """
        if self._client is None:
            return value
        group, number = divmod(next(self._sent), PLANS_KEPT)
        key = f"{self._name}/{group}/{number}"
        try:
            if number == 0 and group:
                self._forget(self._client, group - 1)
            if self.leads:
                self._client.key_value_set(key, json.dumps([time.monotonic(), value], default=_as_python))
            agreed = self._client.blocking_key_value_get(key, PLAN_SECONDS * 1000)
        except (RuntimeError, ValueError) as error:
            raise lost(f"the plan of process 0 did not come: {error}") from error
        self._now, value = json.loads(agreed)
        return value

    def _forget(self, client: Any, group: int) -> None:
        """Deletes plans that every process has read."""
        client.wait_at_barrier(f"{self._name}/{group}/read", PLAN_SECONDS * 1000)
        if self.leads:
            client.key_value_delete(f"{self._name}/{group}/")


def _as_python(number: Any) -> Any:
    """A NumPy number as Python's, for JSON."""
    return number.item()


def is_first() -> bool:
    """Whether this process is the one that prints for the user."""
    return int(os.environ.get(INDEX, "0")) == 0


def lost(what: str) -> ProcessLost:
    """The error of a process that has lost the others."""
    return ProcessLost(
        f"process {jax.process_index()} of {jax.process_count()} stops: {what}. Another process has died or hangs; "
        "look at what the processes said before, and start all of them again"
    )


def leave_at_once(code: int) -> NoReturn:
    """Ends this process without the runtime's shutdown, which would wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
