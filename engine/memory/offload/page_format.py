"""What the bytes of a page mean where pages leave the pool (host tier, saved cache, a peer), and pages with tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError
from engine.memory.integers import Int32, is_integer
from engine.memory.prefix import token_vector
from engine.memory.scope import CacheScope

Pages = npt.NDArray[Any]  # [n, layers, page_size, 2H, D], dtype of the pool

_SIZES = ("page_size", "head_num", "head_dim")
_CODE_BITS = {"int8": 8, "int4": 4}  # of the dtypes whose rows are codes and a scale, moved as bytes


@dataclass(frozen=True)
class PageFormat:
    """Shape, dtype and layout descriptor of the pages of one pool.

    Attributes:
        layer_num: buffers that a page spans: the layers of a group.
        dtype: dtype of the elements as moved, ``KVLayout.page_dtype``, in any form that NumPy takes: bytes where the
            layout has scales.
        layout: the pool's layout descriptor, from its ``to_dict``; ``page_size``, ``head_num``, ``head_dim``, ``dtype``
            and ``scale_bytes`` are read, the other fields only compared.
        windows: of each group of layers, the tokens that a query sees, itself included; None is all before it.

    Raises:
        ConfigError: ``layout`` is no mapping, a size is missing or below 1, ``dtype`` is not the descriptor's, or
            there is no group or no such window.
    """

    layer_num: int
    dtype: np.dtype[Any]
    layout: Mapping[str, int | str]
    windows: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Mapping):
            raise ConfigError(f"layout is a {type(self.layout).__name__}; pass a pool's descriptor, its to_dict()")
        object.__setattr__(self, "layout", dict(self.layout))
        try:
            object.__setattr__(self, "dtype", np.dtype(self.dtype))
        except TypeError as error:
            raise ConfigError(f"dtype={self.dtype!r} of a page is no dtype; pass the pool's") from error
        sizes = {"layer_num": self.layer_num} | {name: self.layout.get(name) for name in _SIZES}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} of a page must be an integer from 1; pass a pool's descriptor")
        moved_as = "uint8" if self._scale_bytes else self.layout.get("dtype")
        if moved_as != self.dtype.name or not self.dtype.isnative:  # the name does not say the order
            raise ConfigError(
                f"pages of {self.dtype!r} cannot follow a layout of {self.layout.get('dtype')}, which are moved as "
                f"{moved_as}: pass page_dtype of the layout of the pool"
            )
        if self._scale_bytes and self.layout["dtype"] not in _CODE_BITS:
            raise ConfigError(f"a layout of {self.layout['dtype']} has no scales; pass a pool's descriptor")
        if not isinstance(self.windows, tuple) or not self.windows or not all(map(_is_window, self.windows)):
            raise ConfigError(
                f"windows={self.windows!r} of a page must be a tuple with the window of each group: tokens from 1, or "
                "None; pass LayerGroups.windows of the model"
            )

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return int(self.layout["page_size"])

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """``(layers, page_size, 2H, D)`` of one page, without the padding that a device may store.

        Where a row has a scale, its bytes follow those of the row's codes.
        """
        return self.layer_num, self.page_size, 2 * int(self.layout["head_num"]), self._row_elements

    @property
    def _row_elements(self) -> int:
        head_dim = int(self.layout["head_dim"])
        if not self._scale_bytes:
            return head_dim
        return head_dim * _CODE_BITS[str(self.layout["dtype"])] // 8 + self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        return int(self.layout.get("scale_bytes", 0))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return int(np.prod(self.page_shape)) * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON: the layout descriptor, the number of buffers and the groups' windows."""
        return {**self.layout, "layer_num": self.layer_num, "windows": list(self.windows)}

    def require_same(self, theirs: Mapping[str, Any], what: str) -> None:
        """Refuses pages of another format.

        Args:
            theirs: ``to_dict`` of the other format.
            what: what has that format, for the message.

        Raises:
            ConfigError: they differ; the message lists each field that does.
        """
        ours = self.to_dict()
        if not isinstance(theirs, Mapping):
            raise ConfigError(f"the page format of {what} is a {type(theirs).__name__}; it must be a mapping")
        if dict(theirs) != ours:
            differing = ", ".join(
                f"{name} {theirs.get(name)!r} (here {ours.get(name)!r})"
                for name in sorted(ours.keys() | theirs.keys())
                if theirs.get(name) != ours.get(name)
            )
            raise ConfigError(f"the page format of {what} is another: {differing}; make both with the same settings")

    def checked_group(self, group: int) -> int:
        """Returns the number of a group.

        Raises:
            ShapeError: it is no integer, or there is no such group.
        """
        if not is_integer(group) or not 0 <= group < len(self.windows):
            raise ShapeError(
                f"group={group!r} is none of the {len(self.windows)} groups of these pages, which have windows "
                f"{list(self.windows)}; pass a group's place in that list"
            )
        return int(group)

    def check_pages(self, token_ids: npt.ArrayLike, first_page: int, data: Pages) -> Int32:
        """Checks pages against the prefix that they end, and returns its token ids as int32.

        Args:
            token_ids: ``[(first_page + n) * page_size]``, from the start of the sequence to the end of the last page.
            first_page: how many pages of the prefix come before ``data``.
            data: ``[n, layers, page_size, 2H, D]``.

        Raises:
            ShapeError: a part has the wrong shape or dtype, or they do not fit together.
        """
        tokens = np.ascontiguousarray(token_vector(token_ids))
        if not is_integer(first_page):
            raise ShapeError(f"first_page={first_page!r} must be an integer: how many pages come before the data")
        if not isinstance(data, np.ndarray):
            raise ShapeError(f"pages are a {type(data).__name__}; they must be a NumPy array of this pool's pages")
        if not data.ndim or data.shape[1:] != self.page_shape or data.dtype != self.dtype:
            raise ShapeError(
                f"pages {data.dtype}{list(data.shape)} do not fit: a page here is {self.dtype}{list(self.page_shape)}; "
                "pass pages of the pool that this format describes"
            )
        if first_page < 0 or tokens.size != (first_page + len(data)) * self.page_size:
            raise ShapeError(
                f"{tokens.size} tokens do not end {len(data)} pages of {self.page_size} after first_page={first_page}: "
                "the tokens must reach from the start of the sequence to the end of the last page"
            )
        return tokens


@dataclass(frozen=True)
class PrefixSegment:
    """Consecutive pages of one prefix with its tokens, as the host tier hands them out and a store keeps them.

    Attributes:
        scope: the scope of the prefix.
        token_ids: int32, from the start of the sequence to the end of the last page.
        first_page: how many pages of the prefix come before ``data``.
        data: ``[n, layers, page_size, 2H, D]``.
        group: the group of layers whose pages they are.
    """

    scope: CacheScope
    token_ids: Int32
    first_page: int
    data: Pages
    group: int = 0


def _is_window(window: object) -> bool:
    return window is None or (type(window) is int and window >= 1)
