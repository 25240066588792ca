"""Any ragged batch, drawn as for the other backends: the contract that all of them share, in the interpreter."""

from __future__ import annotations

import pytest
from attention_strategies import cases
from gpu_cases import NEEDS_MOSAIC, check, geometry
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = [*NEEDS_MOSAIC, pytest.mark.slow]

GEOMETRIES = {
    "plain": geometry(tokens=90, rows=4, columns=12),
    "window, sinks, soft cap, page 8": geometry(
        tokens=70, rows=3, page_size=8, columns=24, window=33, sinks=True, soft_cap=5.0
    ),
    "one query head a KV head, float16": geometry(tokens=90, rows=3, columns=12, q_heads=2, dtype="float16"),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=6)
@given(data=st.data())
def test_it_is_attention_over_the_pages(name: str, data: st.DataObject) -> None:
    check(data.draw(cases(GEOMETRIES[name])), blocks=data.draw(st.sampled_from([1, 3, 16])))
