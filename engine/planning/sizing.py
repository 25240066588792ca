"""How large a pool the memory of the devices can hold, and how many requests a pool can serve."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.layer_groups import LayerGroups
from engine.planning.page_demand import PageDemand
from engine.planning.units import format_bytes

MAX_PAGE_TABLE_BYTES = 2**30


@dataclass(frozen=True)
class PoolPlan:
    """The sizes of a pool.

    Attributes:
        size_tokens: usable token slots of each buffer, over all replicas.
        groups: the groups of the model's layers.
        demand: the pages that requests take.
        token_bytes: bytes per token and layer, padding included (``KVLayout.bytes_per_token``), on all devices that
            hold a part of the token.
        context_length: most tokens of one request.
        devices: devices that hold the pool, each an equal part.
        replicas: groups of devices with tokens of their own, and a null page each.
    """

    size_tokens: int
    groups: LayerGroups
    demand: PageDemand
    token_bytes: int
    context_length: int
    devices: int = 1
    replicas: int = 1

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.demand.page_size

    @property
    def buffers(self) -> int:
        """Buffers of the pool: the layers of the model, or of one of its groups where it has several."""
        return self.groups.num_buffers

    @property
    def model_token_bytes(self) -> int:
        """Bytes of a token in all layers of the model."""
        return self.token_bytes * len(self.groups.places)

    @property
    def pages(self) -> int:
        """Usable pages."""
        return self.size_tokens // self.page_size

    @property
    def layer_bytes(self) -> int:
        """Bytes of one buffer on all devices, the null pages included."""
        return (self.size_tokens + self.replicas * self.page_size) * self.token_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all buffers on all devices."""
        return self.buffers * self.layer_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of all buffers on each device."""
        return self.total_bytes // self.devices

    @property
    def max_concurrency(self) -> float:
        """How many requests of the full context fit at once, each in whole pages; no replica has part of one."""
        return self.replicas * self.demand.requests_in(self.pages // self.replicas, self.context_length)

    def describe(self) -> str:
        """One line in the form that users of serving engines know; where layers have windows, also what they keep."""
        split = f", {format_bytes(self.device_bytes)} on each of {self.devices} devices" if self.devices > 1 else ""
        buffers = "layers" if self.groups.num_groups == 1 else "buffers"
        return (
            f"KV cache size: {self.size_tokens:,} tokens in {self.pages:,} pages of {self.page_size}, "
            f"{format_bytes(self.layer_bytes)} per {buffers[:-1]}, {format_bytes(self.total_bytes)} in {self.buffers} "
            f"{buffers}{split}; "
            f"maximum concurrency for {self.context_length:,} tokens per request: {self.max_concurrency:.2f}x"
            f"{'' if self.groups.windows == (None,) else self._describe_groups()}"
        )

    def _describe_groups(self) -> str:
        tokens, page_bytes = self.context_length, self.page_size * self.token_bytes * self.buffers
        kept = []
        for window, count in self.demand.kinds.items():
            pages = self.demand.pages_in(window, tokens)
            each = f"each of {count} groups with" if count > 1 else "the group with"
            kind = "full attention" if window is None else f"a window of {window:,}"
            kept.append(f"{min(tokens, pages * self.page_size):,} tokens in {pages:,} pages of {each} {kind}")
        pages = self.demand.most_pages(tokens)
        line = (
            f"; {self.groups.describe()}; one request holds at most {' and '.join(kept)}: {pages:,} pages, "
            f"{format_bytes(pages * page_bytes)}"
        )
        if not self.groups.empty_places:
            return line
        share, places = self._empty_share(), self.groups.num_groups * self.buffers
        return (
            f"{line}; {self.groups.empty_places} of {places} places in the groups have no layer, which wastes "
            f"{share:.2%} of a pool full of such requests, {format_bytes(int(share * self.total_bytes))}"
        )

    def _empty_share(self) -> float:
        """What part of the bytes of a request of the full context lies where a group has no layer."""
        layers = Counter(place.group for place in self.groups.places)
        empty = sum(
            self.demand.pages_in(window, self.context_length) * (self.buffers - layers[group])
            for group, window in enumerate(self.groups.windows)
        )
        return empty / (self.demand.most_pages(self.context_length) * self.buffers)


def size_pool(
    groups: LayerGroups,
    demand: PageDemand,
    *,
    token_bytes: int,
    wanted_pages: int,
    device_bytes: int | None = None,
    weight_bytes: int = 0,
    mem_fraction_static: float = 0.85,
    devices: int = 1,
    request_tokens: int = 0,
) -> int:
    """Usable token slots that the pool of one replica can have.

    Args:
        groups: the groups of the model's layers.
        demand: the pages that requests take.
        token_bytes: bytes per token and layer, padding included, on all devices that hold a part of the token.
        wanted_pages: pages that are enough: every token of every running request at its full context; what windows
            leave free of them keeps prefixes.
        device_bytes: bytes of memory of each device; None where it does not report them, which gives ``wanted_pages``.
        weight_bytes: bytes of that memory which the weights take.
        mem_fraction_static: fraction of the device's memory for weights and pool together.
        devices: devices that hold a part of each token.
        request_tokens: tokens of a request that the pool must hold at least; 0 requires one page.

    Returns:
        A multiple of the page size, at most ``wanted_pages`` pages.

    Raises:
        ConfigError: no page fits, or ``request_tokens`` do not; the message has the arithmetic.
    """
    page_size = demand.page_size
    if device_bytes is None:
        return wanted_pages * page_size
    page_bytes = page_size * token_bytes * groups.num_buffers // devices
    budget, room = _budget(device_bytes, weight_bytes, mem_fraction_static)
    pages = budget // page_bytes - 1  # the null page takes one
    if pages < 1:
        raise ConfigError(
            f"no room for a KV pool: {room}, and two pages of {page_size} tokens take {format_bytes(2 * page_bytes)}; "
            "raise mem_fraction_static or use more devices"
        )
    if demand.most_pages(request_tokens) > pages:
        needed, fits = (demand.most_pages(request_tokens) + 1) * page_bytes, demand.most_tokens(pages, request_tokens)
        raise ConfigError(
            f"no room for one request of {request_tokens:,} tokens: its pool takes {format_bytes(needed)}, {room}; the "
            f"longest context that fits is {fits:,} tokens: lower context_length to it, raise mem_fraction_static or "
            "use more devices"
        )
    return min(pages, wanted_pages) * page_size


def require_room(plan: PoolPlan, device_bytes: int, weight_bytes: int, mem_fraction_static: float) -> None:
    """Refuses a pool of a requested size that the memory cannot hold; for the arguments see ``size_pool``.

    Raises:
        ConfigError: the pool is too large; the message has the arithmetic and the largest size that fits.
    """
    budget, room = _budget(device_bytes, weight_bytes, mem_fraction_static)
    if plan.device_bytes > budget:
        page_bytes = plan.page_size * plan.token_bytes * plan.buffers * plan.replicas // plan.devices
        pages = max(budget // page_bytes - 1, 0)
        fitting = pages * plan.page_size
        request = plan.demand.most_pages(plan.context_length) * page_bytes
        longest = plan.demand.most_tokens(pages, plan.context_length)
        lower = f"lower max_total_tokens to {fitting * plan.replicas}, " if fitting else ""
        raise ConfigError(
            f"no room for max_total_tokens={plan.size_tokens}: the pool takes {format_bytes(plan.device_bytes)} per "
            f"device, {room}; one request of {plan.context_length:,} tokens takes {format_bytes(request)}, and the "
            f"longest context that fits is {longest:,} tokens: {lower}raise mem_fraction_static or use more devices"
        )


def _budget(device_bytes: int, weight_bytes: int, mem_fraction_static: float) -> tuple[int, str]:
    """Bytes of a device that the pool may take, and the arithmetic as text."""
    budget = max(int(device_bytes * mem_fraction_static) - weight_bytes, 0)
    return budget, (
        f"{mem_fraction_static} of {format_bytes(device_bytes)} less {format_bytes(weight_bytes)} of weights leaves "
        f"{format_bytes(budget)}"
    )


def require_page_table(max_requests: int, context_length: int, page_size: int, groups: int = 1) -> None:
    """Refuses a page table that is larger than ``MAX_PAGE_TABLE_BYTES``; it has ``groups`` lists of pages a row.

    Raises:
        ConfigError: it is larger; the message has the arithmetic.
    """
    columns = groups * -(-context_length // page_size)
    table_bytes = 4 * max_requests * columns
    if table_bytes > MAX_PAGE_TABLE_BYTES:
        rows = MAX_PAGE_TABLE_BYTES // (4 * columns)
        times = "" if groups == 1 else f", for each of {groups} groups of layers"
        raise ConfigError(
            f"the page table of max_running_requests={max_requests:,} rows of {columns:,} pages ({context_length:,} "
            f"tokens in pages of {page_size}{times}) takes {format_bytes(table_bytes)}, more than "
            f"{format_bytes(MAX_PAGE_TABLE_BYTES)}; lower max_running_requests{f' to {rows:,}' if rows else ''} or "
            "context_length, or raise page_size"
        )
