"""Bytes to tokens: how large a pool a device can hold, and what a pool of some size can serve."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError


@dataclass(frozen=True)
class PoolPlan:
    """What a pool holds.

    Attributes:
        size_tokens: usable token slots, of all replicas.
        page_size: tokens a page.
        layers: layers of the model.
        token_bytes: bytes a token and layer, padding included (``KVLayout.bytes_per_token``), on all devices that
            share it.
        context_length: most tokens of one request.
        devices: that hold the pool, each as much as any other.
        replicas: groups of devices with tokens of their own, and a null page each.
    """

    size_tokens: int
    page_size: int
    layers: int
    token_bytes: int
    context_length: int
    devices: int = 1
    replicas: int = 1

    @property
    def pages(self) -> int:
        """Usable pages."""
        return self.size_tokens // self.page_size

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's buffer on all devices, the null pages included."""
        return (self.size_tokens + self.replicas * self.page_size) * self.token_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all layers' buffers on all devices."""
        return self.layers * self.layer_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of all layers' buffers on each device."""
        return self.total_bytes // self.devices

    @property
    def max_concurrency(self) -> float:
        """How many requests of the full context fit at once, each in whole pages; no replica has part of one."""
        return self.pages / -(-self.context_length // self.page_size)

    def describe(self) -> str:
        """One line in the form that users of serving engines know."""
        split = f", {format_bytes(self.device_bytes)} on each of {self.devices} devices" if self.devices > 1 else ""
        return (
            f"KV cache size: {self.size_tokens:,} tokens in {self.pages:,} pages of {self.page_size}, "
            f"{format_bytes(self.layer_bytes)} a layer, {format_bytes(self.total_bytes)} in {self.layers} layers"
            f"{split}; "
            f"maximum concurrency for {self.context_length:,} tokens per request: {self.max_concurrency:.2f}x"
        )


def size_pool(
    *,
    page_size: int,
    layers: int,
    token_bytes: int,
    wanted_tokens: int,
    device_bytes: int | None = None,
    weight_bytes: int = 0,
    mem_fraction_static: float = 0.85,
    devices: int = 1,
) -> int:
    """Usable token slots of a pool, of one replica where there are several.

    Args:
        page_size: tokens a page.
        layers: layers of the model.
        token_bytes: bytes a token and layer, padding included, on all devices that share it.
        wanted_tokens: what would be enough: every slot of the batch at its full context.
        device_bytes: the device's memory; None where it does not say, which leaves ``wanted_tokens``.
        weight_bytes: what the weights take of it.
        mem_fraction_static: share of the device's memory for weights and pool together.
        devices: that share each token.

    Returns:
        A multiple of ``page_size``, at most ``wanted_tokens`` rounded up to whole pages.

    Raises:
        ConfigError: not one page fits, with the arithmetic.
    """
    wanted_pages = -(-wanted_tokens // page_size)
    if device_bytes is None:
        return wanted_pages * page_size
    page_bytes = page_size * token_bytes * layers // devices
    budget = int(device_bytes * mem_fraction_static) - weight_bytes
    pages = budget // page_bytes - 1  # the null page takes one
    if pages < 1:
        raise ConfigError(
            f"no room for a KV pool: {mem_fraction_static} of {format_bytes(device_bytes)} less "
            f"{format_bytes(weight_bytes)} of weights leaves {format_bytes(max(budget, 0))}, and two pages of "
            f"{page_size} tokens take {format_bytes(2 * page_bytes)}; raise mem_fraction_static or use more devices"
        )
    return min(pages, wanted_pages) * page_size


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest binary unit that leaves at least 1, e.g. ``4.37 GiB``."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
