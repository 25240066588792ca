"""How much memory the devices have and use, as one number for all processes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from socket import gethostname

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

from engine.kv.room import report_of
from engine.planning.host_memory import available_bytes, require_host_memory


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes in all of the device that has least, and bytes in use of the device that uses most."""

    limit_bytes: int
    used_bytes: int


def device_memory(devices: Sequence[jax.Device], *, weight_bytes: int = 0, host_bytes: int = 0) -> DeviceMemory | None:
    """The least memory and the largest use over the devices of all processes.

    Every process must call it, at the same point of its work, and all get the same answer. CPU devices divide what
    their machine has available equally, and use what the weights take.

    Args:
        devices: the devices that the pool will lie on; each process reports its own.
        weight_bytes: bytes of weights that each device holds already.
        host_bytes: bytes of host memory that each process will take for other purposes.

    Returns:
        None where neither device nor system reports its memory.

    Raises:
        ConfigError: the host has less than ``host_bytes`` for each process.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    reports = [report_of(device) for device in local]
    limit = min((report.get("bytes_limit", 0) for report in reports), default=0)
    used = max((report.get("bytes_in_use", 0) for report in reports), default=0)
    processes, sharing = _on_this_host(len(local))
    require_host_memory(
        processes * host_bytes, f"host_tier_bytes={host_bytes} in {processes} processes", "lower host_tier_bytes"
    )
    available = available_bytes()
    if not limit and available is not None and all(device.platform == "cpu" for device in local):
        limit, used = (available - processes * host_bytes) // max(sharing, 1) + weight_bytes, weight_bytes
    if jax.process_count() > 1:
        # In halves, since without jax_enable_x64 jax would truncate a number of bytes to 32 bits.
        gathered = _of_all([divmod(limit, 2**31), divmod(used, 2**31)])
        totals = gathered[..., 0] * 2**31 + gathered[..., 1]
        limit, used = int(totals[:, 0].min()), int(totals[:, 1].max())
    return DeviceMemory(limit, used) if limit else None


def _on_this_host(devices: int) -> tuple[int, int]:
    """How many of the engine's processes run on this process's machine, and how many of its devices they hold.

    Returns once all processes have loaded their weights, so that all then see the same memory available.
    """
    if jax.process_count() == 1:
        return 1, devices
    host = zlib.crc32(gethostname().encode()) >> 1
    processes = _of_all([host, devices])
    here = processes[processes[:, 0] == host]
    return len(here), int(here[:, 1].sum())


def _of_all(numbers: object) -> npt.NDArray[np.int64]:
    """Every process's ``numbers``, each below 2**31, as ``[processes, ...]``."""
    return np.asarray(multihost_utils.process_allgather(np.array(numbers, np.int32))).astype(np.int64)
