"""What one step tells attention: built on the host once per step, shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from engine.attention.checks import check_lengths, check_metadata_shapes
from engine.errors import ShapeError

Int32Array: TypeAlias = jax.Array | npt.NDArray[np.int32]
# Up to so many pairs comparing each is as fast as a search on a CPU, 0.1 ms, and one program in place of many on a TPU.
MOST_PAIRS = 2**17


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """The sequences of one step, as int32 arrays of NumPy or JAX. A pytree.

    Attributes:
        page_table: ``[B, P]`` page ids, one row per sequence; unused entries are the null page.
        cu_q_lens: ``[B + 1]`` running sum of new tokens per sequence, from 0.
        kv_lens: ``[B]`` cached plus new tokens.
        out_cache_loc: ``[T]`` slot to which each new token's K and V go; -1 writes nothing.
        positions: ``[T]`` position of each new token in its sequence; 0 in padding.
        by_table: whether ``out_cache_loc`` is what the page table says of each new token, so that an implementation may
            look there itself; static.
    """

    page_table: Int32Array
    cu_q_lens: Int32Array
    kv_lens: Int32Array
    out_cache_loc: Int32Array
    positions: Int32Array
    by_table: bool = field(default=False, metadata={"static": True})

    @classmethod
    def build(
        cls,
        page_table: npt.ArrayLike,
        cu_q_lens: npt.ArrayLike,
        kv_lens: npt.ArrayLike,
        *,
        num_tokens: int,
        page_size: int,
        rows: int | None = None,
        columns: int | None = None,
    ) -> AttentionMetadata:
        """Builds a step's metadata on the host, with NumPy alone.

        Every array is a fresh, read-only copy: the CPU backend may alias a NumPy buffer, so changing the caller's
        page table in place after dispatch would change the step that is running.

        Args:
            page_table: ``[B, P]`` page ids.
            cu_q_lens: ``[B + 1]`` running sum of new tokens per sequence, from 0.
            kv_lens: ``[B]`` cached plus new tokens; 0 in padding rows.
            num_tokens: T, the step's static token count, padding included.
            page_size: tokens per page.
            rows: static number of rows to pad to, so that one compiled program serves steps of fewer sequences; None
                leaves them.
            columns: static number of columns of the page table to pad to, likewise.

        Raises:
            ShapeError: shapes disagree, the lengths contradict each other (see ``check_lengths``), or there are more
                rows or columns than ``rows`` and ``columns``.
        """
        named = {"page_table": page_table, "cu_q_lens": cu_q_lens, "kv_lens": kv_lens}
        table, bounds, lens = (_int32_copy(name, array) for name, array in named.items())
        check_metadata_shapes(table, bounds, lens)
        bounds = running_sum(bounds)
        table, bounds, lens = _padded_to(table, bounds, lens, rows or len(lens), columns or table.shape[1])
        check_lengths(bounds, lens, num_tokens=num_tokens, row_tokens=table.shape[1] * page_size)
        positions, out_cache_loc = locate_new_tokens(table, bounds, lens, num_tokens=num_tokens, page_size=page_size)
        for array in (table, bounds, lens, out_cache_loc, positions):
            array.flags.writeable = False
        return cls(table, bounds, lens, out_cache_loc, positions)

    def to_device(self) -> AttentionMetadata:
        """The same metadata as JAX arrays, moved in one transfer."""
        moved: AttentionMetadata = jax.device_put(self)
        return moved


def _padded_to(
    table: npt.NDArray[np.int32], bounds: npt.NDArray[np.int32], lens: npt.NDArray[np.int32], rows: int, columns: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Appends rows without tokens, and columns of null pages."""
    more, wider = rows - table.shape[0], columns - table.shape[1]
    if more < 0 or wider < 0:
        raise ShapeError(
            f"page_table is {list(table.shape)}, more than the {rows} rows and {columns} columns to pad to; raise them"
        )
    return np.pad(table, ((0, more), (0, wider))), np.pad(bounds, (0, more), mode="edge"), np.pad(lens, (0, more))


def _int32_copy(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    array = np.asarray(values)
    limits = np.iinfo(np.int32)
    if array.dtype.kind not in "iu" or (array.size and (array.min() < limits.min or array.max() > limits.max)):
        raise ShapeError(f"{name} is {array.dtype}{list(array.shape)}; it must hold integers within int32")
    return array.astype(np.int32)  # always a copy


def locate_new_tokens(
    page_table: Any, cu_q_lens: Any, kv_lens: Any, *, num_tokens: int, page_size: int, xp: ModuleType = np
) -> tuple[Any, Any]:
    """Finds the position of each new token in its sequence and its slot in the pool.

    Args:
        page_table: ``[B, P]`` int32 page ids.
        cu_q_lens: ``[B + 1]`` int32 running sum of new tokens per sequence, from 0.
        kv_lens: ``[B]`` int32 cached plus new tokens.
        num_tokens: T, padding included.
        page_size: tokens per page.
        xp: the array module, ``numpy`` or ``jax.numpy``.

    Returns:
        ``positions[T]`` (0 in padding) and ``out_cache_loc[T]`` (-1 in padding), int32. A token of unchecked lengths
        whose position is not in its row of the page table, or whose page's slots int32 cannot count, gets -1 as well.
    """
    rows = sequence_of_tokens(cu_q_lens, num_tokens=num_tokens, xp=xp)
    live = is_live(cu_q_lens, num_tokens=num_tokens, xp=xp)
    positions = positions_of_tokens(cu_q_lens, kv_lens, rows, live, xp)
    return positions, slots_of_tokens(page_table, rows, live, positions, page_size, xp)


def positions_of_tokens(cu_q_lens: Any, kv_lens: Any, rows: Any, live: Any, xp: ModuleType) -> Any:
    """The position ``[T]`` of each new token, whose sequence is ``rows[T]``; 0 where it is not ``live[T]``."""
    tokens = xp.arange(len(rows), dtype=xp.int32)
    return xp.where(live, kv_lens[rows] - cu_q_lens[rows + 1] + tokens, 0).astype(xp.int32)


def slots_of_tokens(page_table: Any, rows: Any, live: Any, positions: Any, page_size: int, xp: ModuleType) -> Any:
    """The slot ``[T]`` of each new token of ``rows[T]`` at ``positions[T]``, by one page table; see above."""
    columns = positions // page_size
    # As an index a position outside the row would name its last column, whose page may belong to another sequence.
    inside = live & (positions >= 0) & (columns < page_table.shape[1])
    pages = page_table[rows, xp.where(inside, columns, 0)]
    inside &= (pages >= 0) & (pages < (2**31 - 1) // page_size)  # else the slot would wrap round
    return xp.where(inside, pages * page_size + positions % page_size, -1).astype(xp.int32)


def sequence_of_tokens(cu_q_lens: Any, *, num_tokens: int, xp: ModuleType = np) -> Any:
    """Which sequence of the step each new token belongs to; int32 ``[num_tokens]``, 0 in padding."""
    tokens = xp.arange(num_tokens, dtype=xp.int32)
    # jax's default is a loop of tiny programs, one after the other, before the first layer of each step. To compare
    # every pair is one program, and unrolling the loop a dozen, which pays where there are many pairs.
    few = num_tokens * cu_q_lens.shape[0] <= MOST_PAIRS
    options: dict[str, Any] = {} if xp is np else {"method": "compare_all" if few else "scan_unrolled"}
    # side="right" steps over sequences without new tokens, wherever they stand.
    rows = xp.searchsorted(cu_q_lens, tokens, side="right", **options) - 1
    return xp.where(is_live(cu_q_lens, num_tokens=num_tokens, xp=xp), rows, 0)


def is_live(cu_q_lens: Any, *, num_tokens: int, xp: ModuleType = np) -> Any:
    """Which tokens belong to some sequence; bool ``[num_tokens]``. The sum may begin above 0 where it is traced."""
    tokens = xp.arange(num_tokens, dtype=xp.int32)
    return (tokens >= cu_q_lens[0]) & (tokens < cu_q_lens[-1])


def running_sum(cu_q_lens: Any) -> Any:
    """``cu_q_lens`` padded with its last value, where it may be padded with zeros; int32 ``[B + 1]``.

    In a NumPy array only trailing zeros change, so that ``check_lengths`` can refuse other falls. In a JAX array, whose
    values may be unknown, a sequence at which the sum falls counts as one without new tokens.
    """
    if isinstance(cu_q_lens, jax.Array):
        if cu_q_lens.shape[0] ** 2 > MOST_PAIRS:
            return lax.cummax(cu_q_lens)
        # Every pair is compared: on a TPU lax.cummax is a chain of five programs.
        later, earlier = (lax.broadcasted_iota(np.int32, (cu_q_lens.shape[0],) * 2, axis) for axis in (0, 1))
        return jnp.where(later >= earlier, cu_q_lens[None], jnp.iinfo(cu_q_lens.dtype).min).max(1)
    ends = np.flatnonzero(cu_q_lens)
    last = ends[-1] if ends.size else 0
    padded = np.array(cu_q_lens)
    padded[last:] = cu_q_lens[last]
    return padded
