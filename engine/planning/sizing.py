"""How large a pool the memory of the devices can hold, and how many requests a pool can serve."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError

MAX_PAGE_TABLE_BYTES = 2**30


@dataclass(frozen=True)
class PoolPlan:
    """The sizes of a pool.

    Attributes:
        size_tokens: usable token slots, over all replicas.
        page_size: tokens per page.
        layers: layers of the model.
        token_bytes: bytes per token and layer, padding included (``KVLayout.bytes_per_token``), on all devices that
            hold a part of the token.
        context_length: most tokens of one request.
        devices: devices that hold the pool, each an equal part.
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
            f"{format_bytes(self.layer_bytes)} per layer, {format_bytes(self.total_bytes)} in {self.layers} layers"
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
    request_tokens: int = 0,
) -> int:
    """Usable token slots that the pool of one replica can have.

    Args:
        page_size: tokens per page.
        layers: layers of the model.
        token_bytes: bytes per token and layer, padding included, on all devices that hold a part of the token.
        wanted_tokens: tokens that are enough: every running request at its full context.
        device_bytes: bytes of memory of each device; None where it does not report them, which gives ``wanted_tokens``.
        weight_bytes: bytes of that memory which the weights take.
        mem_fraction_static: fraction of the device's memory for weights and pool together.
        devices: devices that hold a part of each token.
        request_tokens: tokens that the pool must hold at least; 0 requires one page.

    Returns:
        A multiple of ``page_size``, at most ``wanted_tokens`` rounded up to whole pages.

    Raises:
        ConfigError: no page fits, or ``request_tokens`` do not; the message has the arithmetic.
    """
    wanted_pages = -(-wanted_tokens // page_size)
    if device_bytes is None:
        return wanted_pages * page_size
    page_bytes = page_size * token_bytes * layers // devices
    budget, room = _budget(device_bytes, weight_bytes, mem_fraction_static)
    pages = budget // page_bytes - 1  # the null page takes one
    if pages < 1:
        raise ConfigError(
            f"no room for a KV pool: {room}, and two pages of {page_size} tokens take {format_bytes(2 * page_bytes)}; "
            "raise mem_fraction_static or use more devices"
        )
    if pages * page_size < request_tokens:
        needed = (-(-request_tokens // page_size) + 1) * page_bytes
        raise ConfigError(
            f"no room for one request of {request_tokens:,} tokens: its pool takes {format_bytes(needed)}, {room}; the "
            f"longest context that fits is {pages * page_size:,} tokens: lower context_length to it, raise "
            "mem_fraction_static or use more devices"
        )
    return min(pages, wanted_pages) * page_size


def require_room(plan: PoolPlan, device_bytes: int, weight_bytes: int, mem_fraction_static: float) -> None:
    """Refuses a pool of a requested size that the memory cannot hold; for the arguments see ``size_pool``.

    Raises:
        ConfigError: the pool is too large; the message has the arithmetic and the largest size that fits.
    """
    budget, room = _budget(device_bytes, weight_bytes, mem_fraction_static)
    if plan.device_bytes > budget:
        page_bytes = plan.page_size * plan.token_bytes * plan.layers * plan.replicas // plan.devices
        fitting = max(budget // page_bytes - 1, 0) * plan.page_size
        request = -(-plan.context_length // plan.page_size) * page_bytes
        lower = f"lower max_total_tokens to {fitting * plan.replicas}, " if fitting else ""
        raise ConfigError(
            f"no room for max_total_tokens={plan.size_tokens}: the pool takes {format_bytes(plan.device_bytes)} per "
            f"device, {room}; one request of {plan.context_length:,} tokens takes {format_bytes(request)}, and the "
            f"longest context that fits is {fitting:,} tokens: {lower}raise mem_fraction_static or use more devices"
        )


def _budget(device_bytes: int, weight_bytes: int, mem_fraction_static: float) -> tuple[int, str]:
    """Bytes of a device that the pool may take, and the arithmetic as text."""
    budget = max(int(device_bytes * mem_fraction_static) - weight_bytes, 0)
    return budget, (
        f"{mem_fraction_static} of {format_bytes(device_bytes)} less {format_bytes(weight_bytes)} of weights leaves "
        f"{format_bytes(budget)}"
    )


def require_page_table(max_requests: int, context_length: int, page_size: int) -> None:
    """Refuses a page table that is larger than ``MAX_PAGE_TABLE_BYTES``.

    Raises:
        ConfigError: it is larger; the message has the arithmetic.
    """
    columns = -(-context_length // page_size)
    table_bytes = 4 * max_requests * columns
    if table_bytes > MAX_PAGE_TABLE_BYTES:
        rows = MAX_PAGE_TABLE_BYTES // (4 * columns)
        raise ConfigError(
            f"the page table of max_running_requests={max_requests:,} rows of {columns:,} pages ({context_length:,} "
            f"tokens in pages of {page_size}) takes {format_bytes(table_bytes)}, more than "
            f"{format_bytes(MAX_PAGE_TABLE_BYTES)}; lower max_running_requests{f' to {rows:,}' if rows else ''} or "
            "context_length, or raise page_size"
        )


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest binary unit that leaves at least 1, e.g. ``4.37 GiB``."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
