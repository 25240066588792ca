"""The GPU that a program is lowered for, and whether the Pallas kernels run there."""

from __future__ import annotations

import jax

OLDEST_JAX = (0, 11, 2)  # older versions lack what the kernels and their interpreter need
HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # words of the names that the driver gives


def not_hopper() -> str | None:
    """The reason why no Hopper kernel can be lowered here; None where one can.

    The target is the device that the abstract mesh names, else the first of the default backend.
    """
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, OLDEST_JAX))} (which needs Python 3.12)"
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind
    elif jax.default_backend() == "gpu":
        kind = jax.devices()[0].device_kind
    else:
        kind = jax.default_backend()
    if not any(name in kind.split() for name in HOPPER):
        return f"it is lowered for {kind!r}, not for a Hopper GPU"
    return None


def multiprocessors(default: int) -> int:
    """Number of streaming multiprocessors of this machine's GPU; ``default`` where a program is lowered for another."""
    if jax.sharding.get_abstract_mesh().abstract_device is None and jax.default_backend() == "gpu":
        return int(getattr(jax.devices()[0], "core_count", default))
    return default


def may_be_split() -> bool:
    """Whether arrays may be split over several GPUs unseen by the trace: not on one GPU, nor within shard_map."""
    return (
        jax.default_backend() == "gpu" and jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
    )
