"""How much memory the devices have and use, as one number for all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclass(frozen=True)
class DeviceMemory:
    """Of the device that has least: bytes in all, and bytes in use."""

    limit_bytes: int
    used_bytes: int


def device_memory(devices: Sequence[jax.Device]) -> DeviceMemory | None:
    """The least memory and the largest use over the devices of all processes.

    Every process must call it, at the same point of its work, and all get the same answer.

    Args:
        devices: what the pool will lie on; of those of other processes, their own report counts.

    Returns:
        None where some device does not say its memory, such as a CPU.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    reports = [report_of(device) for device in local]
    limit = min((report.get("bytes_limit", 0) for report in reports), default=0)
    used = max((report.get("bytes_in_use", 0) for report in reports), default=0)
    if jax.process_count() > 1:
        # Halves of 32 bits: without jax_enable_x64 jax would cut a number of bytes in two.
        words = np.array([divmod(limit, 2**31), divmod(used, 2**31)], np.int32)
        gathered = np.asarray(multihost_utils.process_allgather(words)).astype(np.int64)
        totals = gathered[..., 0] * 2**31 + gathered[..., 1]
        limit, used = int(totals[:, 0].min()), int(totals[:, 1].max())
    return DeviceMemory(limit, used) if limit else None


def report_of(device: jax.Device) -> dict[str, int]:
    """What a device says about its memory; empty where it says nothing."""
    return device.memory_stats() or {}
