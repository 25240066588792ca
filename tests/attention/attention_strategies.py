"""Hypothesis strategies for ragged batches, and the geometries that cover heads, dims, pages, options and dtypes."""

from __future__ import annotations

from attention_oracle import Case, Geometry, make_case
from hypothesis import strategies as st

# Few geometries, because each is a compile; lengths vary freely within one.
GEOMETRIES = {
    "gqa": Geometry(),
    "mha_d80_page1": Geometry(q_heads=3, kv_heads=3, head_dim=80, page_size=1, columns=70),
    "mqa_d96_page3": Geometry(q_heads=5, kv_heads=1, head_dim=96, page_size=3, columns=30),
    "d256_page256": Geometry(q_heads=4, kv_heads=2, head_dim=256, page_size=256, columns=3, tokens=40, rows=3),
    "d128_tiles": Geometry(q_heads=4, kv_heads=1, head_dim=128, page_size=16, columns=24, tokens=200, rows=3),
    "window": Geometry(window=7, page_size=4, columns=20),
    "window_beyond_block": Geometry(window=130, page_size=32, columns=20, tokens=100, rows=3),
    "soft_cap": Geometry(soft_cap=2.5, sm_scale=0.3),
    "sinks": Geometry(sinks=True),
    "everything_bf16": Geometry(dtype="bfloat16", window=20, soft_cap=5.0, sinks=True, page_size=8, columns=12),
    "bf16": Geometry(dtype="bfloat16", head_dim=128, columns=20),
    "f16": Geometry(dtype="float16", page_size=64, columns=5),
}


@st.composite
def cases(draw: st.DrawFn, geometry: Geometry) -> Case:
    """Prefill, chunks, decode, padding and zero-length rows, in any order, with tokens to spare or none."""
    room = geometry.tokens
    q_lens, prefix_lens = [], []
    for _ in range(geometry.rows):
        kind = draw(st.sampled_from(["nothing", "decode", "extend"]))
        most = min(room, geometry.row_tokens)
        q_len = {"nothing": 0, "decode": min(1, most), "extend": draw(st.integers(0, most))}[kind]
        room -= q_len
        q_lens.append(q_len)
        prefix_lens.append(draw(st.integers(0, geometry.row_tokens - q_len)))
    return make_case(geometry, q_lens, prefix_lens, seed=draw(st.integers(0, 2**32 - 1)))
