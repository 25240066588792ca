"""The fused KV layout: for every KV head ``h``, row ``2h`` is K and row ``2h + 1`` is V.

The rule is that of the TPU ragged paged attention kernel v3 (tpu_commons): concatenate K and V on the last axis, then
reshape, which interleaves the heads: ``[K0, V0, K1, V1, …]``. Only this file states it, and the padding of the stored
buffers and the packed view that a TPU kernel takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.distributed.mesh import explicit_sharding
from engine.errors import ConfigError, ShapeError
from engine.kv.narrow import KINDS, SCALE_DTYPE, Buffer, NarrowKind, NarrowKV, codes_of, kind_in, row_width

LAYOUT_VERSION = 2
ORDER = "interleaved"
LANES = 128  # a TPU vector register is 8 sublanes of 128 lanes of 32 bits
SUBLANES = 8


def merge_kv(k: jax.Array, v: jax.Array) -> jax.Array:
    """Interleaves K and V by head.

    Args:
        k: ``[..., H, D]``, any dtype.
        v: as ``k``.

    Returns:
        ``[..., 2H, D]``, rows ``K0, V0, K1, V1, …``.

    Raises:
        ShapeError: k and v differ in shape or dtype, or have fewer than two axes.
    """
    if k.shape != v.shape or k.dtype != v.dtype or k.ndim < 2:
        raise ShapeError(
            f"cannot merge k {k.dtype}{list(k.shape)} with v {v.dtype}{list(v.shape)}: both must be [..., heads, "
            "head_dim] of one shape and dtype; cast or reshape one of them"
        )
    *leading, heads, head_dim = k.shape
    # Both give the same order; over an Explicit mesh jax can tell only how the second one's reshape is split.
    halves = jnp.concatenate([k, v], axis=-1) if explicit_sharding(k) is None else jnp.stack([k, v], axis=-2)
    return halves.reshape(*leading, 2 * heads, head_dim)


def extract_k_from_fused_kv(fused: jax.Array) -> jax.Array:
    """Takes the keys out of the fused layout: ``[..., 2H, D] -> [..., H, D]``; ShapeError where 2H is odd."""
    _check_fused(fused)
    return _every_other_row(fused, 0)


def extract_v_from_fused_kv(fused: jax.Array) -> jax.Array:
    """Takes the values out of the fused layout: ``[..., 2H, D] -> [..., H, D]``; ShapeError where 2H is odd."""
    _check_fused(fused)
    return _every_other_row(fused, 1)


def _every_other_row(fused: jax.Array, first: int) -> jax.Array:
    # Not by an index: outside jit that is a gather, and jax cannot tell how it is split over an Explicit mesh.
    return jax.lax.slice_in_dim(fused, first, None, stride=2, axis=fused.ndim - 2)


def _check_fused(fused: jax.Array) -> None:
    if fused.ndim < 2 or fused.shape[-2] % 2:
        raise ShapeError(
            f"cannot extract from {list(fused.shape)}: the fused layout is [..., 2 * heads, head_dim], K and V in turn "
            "on the axis before the last"
        )


def to_stored(values: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts keys or values to the dtype in which they are stored; what is finite saturates at its largest value.

    A plain cast to a narrower float could make an infinity or a NaN of it, which would spoil a whole sequence. An
    infinity stays one, except in 8 bits, whose range depends on a scale: there it saturates too.
    """
    target = jnp.dtype(dtype)
    if jnp.issubdtype(target, jnp.floating) and _largest(target) < _largest(values.dtype):
        most = _largest(target)
        if target.itemsize == 1:
            return jnp.clip(values, -most, most).astype(target)
        # Clipped after the cast: bfloat16 cannot hold float16's largest number, and would clip at one above it.
        stored = values.astype(target)
        reached = jnp.where(values > 0, jnp.asarray(most, target), jnp.asarray(-most, target))
        return jnp.where(jnp.isinf(stored) & jnp.isfinite(values), reached, stored)
    return values.astype(target)


def _largest(dtype: DTypeLike) -> float:
    return float(jnp.finfo(dtype).max) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def packing(dtype: DTypeLike) -> int:
    """Rows of ``dtype`` that share one 32-bit lane of a TPU register: f32 1, bf16 2, fp8 4; at least 1."""
    return max(1, 4 // jnp.dtype(dtype).itemsize)


def padded_rows(head_num: int, dtype: DTypeLike) -> int:
    """Rows that a TPU stores for ``2 * head_num``: whole words, in a count that XLA tiles without a copy.

    Up to 8 words the sublane tiles are powers of two, above that multiples of 8.
    """
    return _whole_words(2 * head_num, dtype)


def _whole_words(rows: int, dtype: DTypeLike) -> int:
    pack = packing(dtype)
    words = -(-rows // pack)
    words = 1 << (words - 1).bit_length() if words <= SUBLANES else _round_up(words, SUBLANES)
    return words * pack


def padded_head_dim(head_dim: int) -> int:
    """``head_dim`` in whole lanes of a TPU."""
    return _round_up(head_dim, LANES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pad_fused(fused: jax.Array, rows: int, lanes: int) -> jax.Array:
    """Brings ``[..., 2H, D]`` to the stored ``[..., rows, lanes]``: as pairs where they are stored so, and padded."""
    heads, width = fused.shape[-2] // 2, fused.shape[-1]
    if stores_pairs(rows, lanes, heads, width):
        fused = fused.reshape(*fused.shape[:-2], heads, 2 * width)
    extra = (rows - fused.shape[-2], lanes - fused.shape[-1])
    if extra == (0, 0):
        return fused
    if min(extra) < 0:
        raise ShapeError(f"cannot pad {list(fused.shape)} to {rows} rows of {lanes}: padding only adds; ask for more")
    return jnp.pad(fused, [(0, 0)] * (fused.ndim - 2) + [(0, extra[0]), (0, extra[1])])


def unpad_fused(stored: jax.Array, head_num: int, head_dim: int) -> jax.Array:
    """Drops the padding: ``[..., 2H', D'] -> [..., 2H, D]``, and takes pairs apart where they are stored."""
    rows, lanes = stored.shape[-2:]
    if (rows, lanes) == (2 * head_num, head_dim):
        return stored
    if stores_pairs(rows, lanes, head_num, head_dim):
        return stored[..., :head_num, :].reshape(*stored.shape[:-2], 2 * head_num, head_dim)
    return stored[..., : 2 * head_num, :head_dim]


def stores_pairs(rows: int, lanes: int, head_num: int, head_dim: int) -> bool:
    """Whether ``[rows, lanes]`` are pairs ``[K_h, V_h]`` side by side: the bytes of ``[2H, D]``, in whole lanes."""
    return lanes == 2 * head_dim and head_num <= rows < 2 * head_num


def pack_pages(stored: jax.Array, page_size: int) -> jax.Array:
    """The packed view of tpu_commons' kernel v3, where p rows share one 32-bit lane.

    One reshape without a copy where p divides 2H and 128 divides D, as in storage laid out for a TPU; else it pads.

    Args:
        stored: ``[S, 2H, D]``, S a multiple of ``page_size``.
        page_size: tokens per page.

    Returns:
        ``[S / page_size, page_size, ceil(2H / p), p, D rounded up to 128]``.

    Raises:
        ShapeError: S is not a whole number of pages.
    """
    slots, rows, head_dim = stored.shape
    if slots % page_size:
        raise ShapeError(
            f"cannot view {slots} slots as pages of {page_size}: the last would not be whole; pad the slots"
        )
    pack = packing(stored.dtype)
    padded = pad_fused(stored, _round_up(rows, pack), padded_head_dim(head_dim))
    return padded.reshape(slots // page_size, page_size, -1, pack, padded.shape[-1])


def unpack_pages(packed: jax.Array, rows: int, head_dim: int) -> jax.Array:
    """Inverse of ``pack_pages``: ``[pages, page_size, words, p, D'] -> [pages * page_size, rows, head_dim]``."""
    pages, page_size, words, pack, lanes = packed.shape
    return packed.reshape(pages * page_size, words * pack, lanes)[:, :rows, :head_dim]


def check_storage(fused: Buffer, head_num: int, head_dim: int) -> None:
    """Checks that a stored buffer can hold ``head_num`` heads of ``head_dim``, unpadded or padded for a TPU.

    A buffer that was made for a few more heads of 128 has the shape of a padded one and passes: only its pool knows.

    Args:
        fused: ``[S, 2H', D']``, or a narrow buffer; only shapes and dtypes are read.
        head_num: KV heads, H.
        head_dim: elements per head, D.

    Raises:
        ShapeError: the buffer is not 3-D, its rows are neither 2H of D nor a padding of them, or the scales of a narrow
            buffer are not one for each row and token.
    """
    codes, width = codes_of(fused), row_width(head_dim, kind_in(fused))
    if codes.ndim != 3:
        raise ShapeError(f"the fused buffer must be [slots, 2 * heads, head_dim]; got {codes.dtype}{list(codes.shape)}")
    rows, lanes = codes.shape[1:]
    if isinstance(fused, NarrowKV):
        check_scales_shape(fused, 2 * rows if stores_pairs(rows, lanes, head_num, width) else rows)
    if (rows, lanes) == (2 * head_num, width) or stores_pairs(rows, lanes, head_num, width):
        return
    most_rows, most_lanes = padded_rows(head_num, codes.dtype), padded_head_dim(width)
    if lanes != most_lanes or rows % 2 or not 2 * head_num <= rows <= most_rows:
        raise ShapeError(
            f"a fused buffer {codes.dtype}{list(codes.shape)} does not hold {head_num} KV heads of {head_dim}: a slot "
            f"must be [{2 * head_num}, {width}], or up to [{most_rows}, {most_lanes}] where it is padded for a TPU; "
            "pass the buffer of a pool made for these heads"
        )


def check_scales_shape(fused: NarrowKV, rows: int) -> None:
    """Checks that a narrow buffer has ``rows`` scales for each slot, in pages; raises ShapeError."""
    slots, scales = fused.codes.shape[0], fused.scales
    if scales.ndim != 2 or scales.dtype != SCALE_DTYPE or scales.size != slots * rows or slots % scales.shape[0]:
        raise ShapeError(
            f"scales {scales.dtype}{list(scales.shape)} are not one float32 for each of {rows} rows of {slots} slots, "
            "[slots / page_size, rows * page_size]; pass the buffer as the pool made it"
        )


def refuse_donated(name: str, array: Any) -> None:
    """Raises ShapeError for an array that was donated to a program: jax would say only that it is deleted."""
    if isinstance(array, NarrowKV):
        for part in array:
            refuse_donated(name, part)
    elif isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.is_deleted():
        raise ShapeError(
            f"{name} {array.dtype}{list(array.shape)} was donated to a program and has no memory any more; use the "
            "array that this program returned, for a pool by replace_buffers"
        )


def bits_of(dtype: DTypeLike) -> int:
    """Bits of one element of a floating or integer dtype, e.g. 4 for int4, which numpy counts as a byte."""
    kind = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return int(kind(dtype).bits)


def require_count(name: str, value: object) -> int:
    """Returns ``value`` where it is a whole number of at least 1, else raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name}={value!r} of a KV pool must be a whole number, at least 1")
    return int(value)


def _storable(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        exact = jnp.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype={dtype!r} of a KV pool is not known; use a floating type, e.g. bfloat16") from error
    if exact.name in KINDS:
        return exact
    if not (jnp.issubdtype(exact, jnp.floating) or jnp.issubdtype(exact, jnp.integer)) or bits_of(exact) < 8:
        raise ConfigError(
            f"a KV pool cannot store dtype {exact}: use int4, or a floating or integer type of 8 bits or more"
        )
    if jax.dtypes.canonicalize_dtype(exact) != exact:
        raise ConfigError(f"a KV pool of {exact} needs jax_enable_x64; enable it or use {exact.kind}4")
    return exact


@dataclass(frozen=True)
class KVLayout:
    """Descriptor of the bytes of a pool; two sides that exchange pages compare theirs first.

    Attributes:
        head_num: KV heads, H.
        head_dim: elements per head, D.
        rows: stored rows per slot, 2H or more; or H or more, where a row is a pair ``[K_h, V_h]``.
        lanes: stored elements per row, at least those of a row or pair.
        dtype: dtype of the elements; int8 and int4 are narrow, codes with a scale for each token and row.
        page_size: tokens per page.
        scale_bytes: bytes of the scale of each token and row; 0 where the dtype is not narrow.
        order: order of K and V among the rows.
        version: version of this descriptor.
    """

    head_num: int
    head_dim: int
    rows: int
    lanes: int
    dtype: np.dtype[Any]
    page_size: int
    scale_bytes: int = 0
    order: str = ORDER
    version: int = LAYOUT_VERSION

    @classmethod
    def create(
        cls, *, head_num: int, head_dim: int, dtype: DTypeLike, page_size: int, platform: str = "cpu"
    ) -> KVLayout:
        """Chooses the stored sizes for a platform: padded for "tpu", unpadded for any other.

        Args:
            head_num: KV heads, at least 1.
            head_dim: elements per head, at least 1.
            dtype: dtype of the elements, a floating or integer type.
            page_size: tokens per page, at least 1.
            platform: name as in ``jax.Device.platform``.

        Raises:
            ConfigError: a count is below 1, or the dtype is not numeric.
        """
        for name, value in (("head_num", head_num), ("head_dim", head_dim), ("page_size", page_size)):
            require_count(name, value)
        dtype = _storable(dtype)
        kind = KINDS.get(dtype.name)
        try:
            width = row_width(head_dim, kind)
        except ShapeError as error:
            raise ConfigError(f"cannot make a KV pool of {dtype}: {error}") from error
        rows, lanes = _stored_sizes(head_num, width, kind, dtype) if platform == "tpu" else (2 * head_num, width)
        return cls(head_num, head_dim, rows, lanes, dtype, page_size, SCALE_DTYPE.itemsize if kind else 0)

    @property
    def kind(self) -> NarrowKind | None:
        """What the codes are; None where the dtype is not narrow."""
        return KINDS.get(self.dtype.name)

    @property
    def element_dtype(self) -> np.dtype[Any]:
        """Dtype of the stored array: ``dtype``, or that of the codes."""
        return self.dtype if self.kind is None else self.kind.code_dtype

    @property
    def width(self) -> int:
        """Stored elements of a row of K or V, without padding."""
        return row_width(self.head_dim, self.kind)

    @property
    def scale_rows(self) -> int:
        """Scales of a slot, padding included; 0 where the dtype is not narrow."""
        if self.kind is None:
            return 0
        return 2 * self.rows if self.has_pairs else self.rows

    @property
    def has_pairs(self) -> bool:
        """Whether a stored row is a pair ``[K_h, V_h]``."""
        return stores_pairs(self.rows, self.lanes, self.head_num, self.width)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one slot in one layer, scales and padding included; every report of bytes uses this formula."""
        return self.rows * self.lanes * self.element_dtype.itemsize + self.scale_rows * self.scale_bytes

    @property
    def padding_overhead(self) -> float:
        """Padding bytes over the bytes that hold data, e.g. 0.6 for head_dim 80 on a TPU."""
        row_bytes = self.width * self.element_dtype.itemsize + self.scale_bytes
        return self.bytes_per_token / (2 * self.head_num * row_bytes) - 1

    @property
    def page_dtype(self) -> np.dtype[Any]:
        """Dtype of pages off the device: ``dtype``, or bytes where it is narrow."""
        return self.dtype if self.kind is None else np.dtype(np.uint8)

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """Shape of a page of a layer off the device, ``(page_size, 2H, D)``; a narrow row's scale follows its codes."""
        return self.page_size, 2 * self.head_num, self.width + self.scale_bytes

    def buffer_shape(self, slots: int) -> tuple[int, int, int]:
        """Shape of one layer's buffer of ``slots`` slots, or of its codes: ``[slots, 2H', D']``."""
        return slots, self.rows, self.lanes

    def buffer_like(self, slots: int) -> Any:
        """Shapes and dtypes of one layer's buffer of ``slots`` slots: a ShapeDtypeStruct, or a NarrowKV of two."""
        stored = jax.ShapeDtypeStruct(self.buffer_shape(slots), self.element_dtype)
        if self.kind is None:
            return stored
        scales = slots // self.page_size, self.scale_rows * self.page_size
        parts: Any = stored, jax.ShapeDtypeStruct(scales, SCALE_DTYPE)
        return NarrowKV(*parts)

    def require_same(self, other: KVLayout, what: str) -> None:
        """Refuses bytes of another layout.

        Args:
            other: the layout of the bytes that come in.
            what: name of these bytes, for the message.

        Raises:
            ConfigError: the layouts differ; the message lists each field that does.
        """
        ours, theirs = self.to_dict(), other.to_dict()
        if ours != theirs:
            differing = ", ".join(f"{key} {theirs[key]} (here {ours[key]})" for key in ours if ours[key] != theirs[key])
            raise ConfigError(
                f"the KV layout of {what} is not this pool's: {differing}; make both with the same settings"
            )

    def to_dict(self) -> dict[str, int | str]:
        """Every field by its name, for JSON."""
        return dataclasses.asdict(self) | {"dtype": self.dtype.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KVLayout:
        """Reads what ``to_dict`` wrote.

        Raises:
            ConfigError: a field is missing or unknown, or this code does not know the version or order.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ConfigError(
                f"not a KV layout: missing {sorted(names - values.keys())}, unknown {sorted(values.keys() - names)}; "
                f"write it with to_dict of version {LAYOUT_VERSION}"
            )
        if (values["version"], values["order"]) != (LAYOUT_VERSION, ORDER):
            raise ConfigError(
                f"KV layout version {values['version']}, order {values['order']!r} cannot be read; this code knows "
                f"version {LAYOUT_VERSION}, order {ORDER!r} only; write it again with this version"
            )
        for name in ("head_num", "head_dim", "rows", "lanes", "page_size"):
            require_count(name, values[name])
        dtype = _storable(values["dtype"])
        if values["scale_bytes"] != (SCALE_DTYPE.itemsize if dtype.name in KINDS else 0):
            raise ConfigError(
                f"a KV layout of {dtype} has no scales of {values['scale_bytes']!r} bytes; write it again"
            )
        return cls(**{**values, "dtype": dtype})


def _stored_sizes(head_num: int, width: int, kind: NarrowKind | None, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Stored rows and lanes on a TPU."""
    stored = dtype if kind is None else kind.code_dtype
    # Only narrow caches: the kernel for TPUs, which reads the others, does not take pairs yet.
    if kind is not None and 2 * width == LANES:
        pairs = _whole_words(head_num, stored)
        if stores_pairs(pairs, LANES, head_num, width):
            return pairs, LANES
    return padded_rows(head_num, stored), padded_head_dim(width)
