"""Whether buffers fit into memory: checked before they are made, and explained if their making fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from jax._src.core import trace_state_clean  # whether a call is being traced has no public name (jax 0.10 to 0.12)

from engine.errors import ConfigError
from engine.planning.host_memory import require_host_memory
from engine.planning.units import format_bytes

REMEDY = "make it smaller, or split it over more devices"


def report_of(device: jax.Device) -> dict[str, int]:
    """What a device reports of its memory, in bytes; empty where it reports nothing, as a CPU."""
    return device.memory_stats() or {}


@contextmanager
def room_for(what: str, bytes_each: int, devices: Sequence[jax.Device]) -> Iterator[None]:
    """Around code that makes buffers: refuses, before it begins or as it fails, what the devices cannot hold.

    The CPU devices of a process share the host's memory. Nothing is checked while a call is traced: it makes no buffer.

    Args:
        what: name of the buffers, e.g. "a pool of 64 tokens".
        bytes_each: bytes that each device is to hold.
        devices: devices that hold them; each process checks its own.

    Raises:
        ConfigError: there is less memory; the message has both numbers.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    if trace_state_clean():
        for device in local:
            limit = report_of(device).get("bytes_limit")
            if limit is not None and bytes_each > limit:
                raise ConfigError(
                    f"{what} takes {format_bytes(bytes_each)} on each device and {device} has {format_bytes(limit)}; "
                    f"{REMEDY}"
                )
        on_host = bytes_each * sum(device.platform == "cpu" for device in local)
        require_host_memory(on_host, what, REMEDY)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"{what} takes {format_bytes(bytes_each)} on each of {len(devices)} devices, which is more than is free; "
            f"{REMEDY}"
        ) from error
