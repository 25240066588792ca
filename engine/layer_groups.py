"""How unlike layers share one heap of pages: groups of layers that need the same tokens, of equally many layers each.

A group needs every token of a request (full attention), or the last ``w`` (a window). Layer ``i`` of each group lies in
the same physical buffer ``i``; so a page of any group fills a page of every buffer, all pages have the same bytes, and
one heap serves all groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from engine.errors import ConfigError

# A page table and a list of new pages a group: beyond so many, what they cost a step outweighs what a remainder wastes.
MAX_GROUPS = 8
# Layers are shared out for contexts of so many windows.
CONTEXT_WINDOWS = 8


class LayerPlace(NamedTuple):
    """Where a layer's keys and values lie: its group, and the buffer, which is its number within the group."""

    group: int
    buffer: int


@dataclass(frozen=True)
class LayerGroups:
    """The groups of a model's layers.

    Attributes:
        windows: of each group, the tokens that a query sees, itself included; None is all before it.
        places: of each layer, in the order of the model.
    """

    windows: tuple[int | None, ...]
    places: tuple[LayerPlace, ...]

    @classmethod
    def of(cls, layer_windows: Sequence[int | None], token_bytes: Sequence[int] | None = None) -> LayerGroups:
        """Groups layers by their windows; layers of one kind are one group.

        Of several kinds, each is cut into groups of ``n`` layers, the last perhaps with a remainder, whose buffers its
        pages fill for nothing. ``n`` is the number for which a request of a long context takes the least memory, with
        at most ``MAX_GROUPS`` groups where there are not more kinds than that.

        Args:
            layer_windows: the window of each layer, None for full attention.
            token_bytes: bytes of keys and values per token of each layer; None says that all are equal.

        Raises:
            ConfigError: there are no layers, a window is below 1, or layers take unequal bytes per token.
        """
        if not layer_windows:
            raise ConfigError("a model without layers has no KV cache; give the window of each layer")
        for layer, window in enumerate(layer_windows):
            if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
                raise ConfigError(f"the window of layer {layer} is {window!r}; it must be 1 token or more, or None")
        _require_equal_bytes(layer_windows, token_bytes)
        kinds = Counter(layer_windows)  # in the order of their first layers
        size = _layers_per_group(kinds)
        windows: list[int | None] = []
        first_group: dict[int | None, int] = {}
        for window in sorted(kinds, key=lambda window: window is not None):  # full attention first
            first_group[window] = len(windows)
            windows += [window] * -(-kinds[window] // size)
        places, seen = [], Counter[int | None]()
        for window in layer_windows:
            group, buffer = divmod(seen[window], size)
            places.append(LayerPlace(first_group[window] + group, buffer))
            seen[window] += 1
        return cls(tuple(windows), tuple(places))

    @cached_property
    def num_buffers(self) -> int:
        """Physical buffers, which is the number of layers of a group."""
        return 1 + max(place.buffer for place in self.places)

    @property
    def num_groups(self) -> int:
        """Groups."""
        return len(self.windows)

    @property
    def empty_places(self) -> int:
        """Buffers of groups that no layer lies in, whose part of each page of the group is wasted."""
        return self.num_groups * self.num_buffers - len(self.places)

    def describe(self) -> str:
        """The groups in words, such as ``1 group of 10 full layers, 6 groups of 10 layers with a window of 1,024``."""
        parts = []
        for window, count in Counter(self.windows).items():
            groups = f"{count} group{'s' * (count > 1)} of {self.num_buffers}"
            kind = "full layers" if window is None else f"layers with a window of {window:,}"
            parts.append(f"{groups} {kind}")
        return ", ".join(parts)


def _layers_per_group(kinds: Counter[int | None]) -> int:
    """How many layers each group has."""
    context = CONTEXT_WINDOWS * max((window or 1 for window in kinds), default=1)

    def cost(size: int) -> tuple[bool, int, int]:
        groups = {window: -(-count // size) for window, count in kinds.items()}
        tokens = sum(count * size * (context if window is None else window) for window, count in groups.items())
        return sum(groups.values()) > max(MAX_GROUPS, len(kinds)), tokens, -size

    return min(range(1, max(kinds.values()) + 1), key=cost)


def _require_equal_bytes(layer_windows: Sequence[int | None], token_bytes: Sequence[int] | None) -> None:
    if token_bytes is None or len(set(token_bytes)) == 1:
        return
    if len(token_bytes) != len(layer_windows):
        raise ConfigError(f"{len(token_bytes)} sizes for {len(layer_windows)} layers; give the bytes of each layer")
    kinds = {
        f"{'full attention' if window is None else f'a window of {window:,}'}: {size:,} bytes per token"
        for window, size in zip(layer_windows, token_bytes, strict=True)
    }
    raise ConfigError(
        f"layers cannot share pages: {'; '.join(sorted(kinds))}; a page of one heap has equal bytes in every layer, so "
        "heads * head_dim * bytes of the dtype must be equal: serve a model whose layers have equal KV heads"
    )


def first_kept_page(window: int, computed_tokens: int, page_size: int) -> int:
    """The first page of a sequence that a token after the first ``computed_tokens`` can still see."""
    return max(computed_tokens - window + 1, 0) // page_size


def most_pages_held(window: int | None, tokens: int, page_size: int, ahead_tokens: int) -> int:
    """The most pages that a sequence holds in one group on its way to ``tokens`` tokens.

    Args:
        window: the group's window; None keeps every page.
        tokens: tokens of the sequence at its end.
        page_size: tokens per page.
        ahead_tokens: the most tokens that it is granted and has not computed yet.
    """
    whole = -(-tokens // page_size)
    return whole if window is None else min(whole, -(-(window - 1 + ahead_tokens) // page_size) + 1)
