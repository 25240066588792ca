from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case, Geometry, make_case, same_bits

from engine.attention import AttentionMetadata, FlashAttentionBackend, ragged_paged_attention
from engine.attention import call as attention_call
from engine.attention.impl.implementation import Implementation
from engine.errors import BackendUnsupported, ConfigError, ShapeError
from engine.native import library

GEOMETRY = Geometry()
Call = dict[str, Any]


def call_of(case: Case) -> Call:
    return {"q": case.q, "k": case.k, "v": case.v, "fused_kv": jnp.array(case.pool), **case.arguments()}


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Call], Call]:
    return lambda call: {**call, name: change(np.array(call[name]))}


def with_item(name: str, index: Any, value: int) -> Callable[[Call], Call]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return replaced(name, change)


WRONG_SHAPES = {
    "q of two axes": (replaced("q", lambda q: q[0]), "q has shape"),
    "q without tokens": (replaced("q", lambda q: q[:0]), "none of them empty"),
    "integer q": (replaced("q", lambda q: q.astype(np.int32)), "int32"),
    "k and v unlike": (replaced("v", lambda v: v[:, :1]), "must be alike"),
    "fewer keys than queries": (lambda c: {**c, "k": c["k"][1:], "v": c["v"][1:]}, "48.*47"),
    "other dtype of k": (lambda c: {**c, "k": c["k"].astype(np.float16), "v": c["v"].astype(np.float16)}, "float16"),
    "heads that do not divide": (replaced("q", lambda q: q[:, :7]), "7 query heads cannot share 2"),
    "pool of other heads": (replaced("fused_kv", lambda f: f[:, :2]), "2 KV heads of 64"),
    "page_size that does not divide": (lambda c: {**c, "page_size": 5}, "448 slots, which page_size=5"),
    "sinks of other heads": (lambda c: {**c, "sinks": np.ones(3, np.float32)}, r"\(8,\)"),
    "int64 page table": (replaced("page_table", lambda t: t.astype(np.int64)), "int64.*int32"),
    "flat page table": (replaced("page_table", lambda t: t[0]), r"\[B, P\]"),
    "kv_lens of other rows": (replaced("kv_lens", lambda n: n[:3]), "4 rows"),
    "cu_q_lens without its end": (replaced("cu_q_lens", lambda n: n[:4]), r"\(5,\)"),
}
WRONG_CONTENTS = {
    "cu_q_lens that falls": (with_item("cu_q_lens", 2, 9), "falls from 10 to 9 at row 1"),
    "cu_q_lens not from 0": (with_item("cu_q_lens", 0, 1), r"cu_q_lens\[0\] is 1"),
    "more tokens than q": (with_item("cu_q_lens", 4, 49), "ends at 49 but q has 48"),
    "kv_lens below q_len": (with_item("kv_lens", 0, 9), "sequence 0 has kv_lens 9 but 10 new tokens"),
    "context beyond the row": (with_item("kv_lens", 0, 97), "97 tokens but its page-table row holds 96"),
    "page out of range": (with_item("page_table", (0, 1), 28), r"page_table\[0, 1\] is 28 .* 1 to 27"),
    "negative page": (with_item("page_table", (0, 1), -1), r"page_table\[0, 1\] is -1"),
    "null page where a token is": (with_item("page_table", (0, 0), 0), r"page_table\[0, 0\] is 0"),
}
WRONG_OPTIONS = {
    "page_size": 0,
    "sliding_window": 0,
    "soft_cap": -1.0,
    "sm_scale": float("nan"),
    "impl": "cuda",
}


@pytest.fixture
def call() -> Call:
    return call_of(make_case(GEOMETRY, [10, 1, 0, 20], [11, 30, 4, 0], seed=31))


def assert_refused(call: Call, error: type[Exception], match: str) -> None:
    before = np.array(call["fused_kv"])
    with pytest.raises(error, match=match):
        ragged_paged_attention(**call)
    assert same_bits(call["fused_kv"], before)


@pytest.mark.parametrize("name", [*WRONG_SHAPES, *WRONG_CONTENTS])
def test_a_wrong_call_is_refused_with_numbers_and_changes_nothing(call: Call, name: str) -> None:
    change, match = (WRONG_SHAPES | WRONG_CONTENTS)[name]
    assert_refused(change(call), ShapeError, match)


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shapes_are_refused_under_jit(call: Call, name: str) -> None:
    call = WRONG_SHAPES[name][0](call)
    arrays = {key: value for key, value in call.items() if hasattr(value, "shape")}
    options = {key: value for key, value in call.items() if not hasattr(value, "shape")}
    if name == "int64 page table":
        pytest.skip("jit itself narrows int64 to int32 where 64-bit types are off")
    with pytest.raises(ShapeError, match=WRONG_SHAPES[name][1]):
        jax.jit(lambda arrays: ragged_paged_attention(**arrays, **options)).lower(arrays)


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_a_wrong_option_is_refused(call: Call, name: str) -> None:
    assert_refused({**call, name: WRONG_OPTIONS[name]}, ConfigError, name)


def test_a_page_that_two_sequences_write_is_refused(call: Call) -> None:
    table = call["page_table"].copy()
    table[3, 0] = table[0, 1]
    assert_refused({**call, "page_table": table}, ShapeError, "used 2 times")


def test_a_page_that_one_sequence_writes_and_another_reads_is_refused(call: Call) -> None:
    table = call["page_table"].copy()
    table[1, 0] = table[0, 1]
    assert_refused({**call, "page_table": table}, ShapeError, "written by sequence 0")


def test_wrong_entries_where_no_token_lies_are_allowed(call: Call) -> None:
    expected = ragged_paged_attention(**call)
    table = call["page_table"].copy()
    table[0, 2:], table[2] = -7, 10_000  # past the sequence's end; a row without new tokens
    for got, same in zip(ragged_paged_attention(**{**call, "page_table": table}), expected, strict=True):
        assert same_bits(got, same)


@pytest.mark.parametrize("impl", ["tpu", "gpu"])
def test_a_backend_that_is_not_there_says_so(call: Call, impl: str) -> None:
    assert_refused({**call, "impl": impl}, BackendUnsupported, impl)


def test_auto_falls_back_on_backend_unsupported_and_on_nothing_else(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ragged_paged_attention(**call, impl="cpu" if library.available() else "xla")
    for got, same in zip(ragged_paged_attention(**call, impl="auto"), expected, strict=True):
        assert same_bits(got, same)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(attention_call.IMPLEMENTATIONS, "tpu", Implementation(broken, fuses_write=True))
    with pytest.raises(ZeroDivisionError):
        ragged_paged_attention(**{**call, "sm_scale": 0.77}, impl="auto")  # another scale: not what jit has cached

    def unable(name: str) -> Callable[..., None]:
        def refuse(*_: object) -> None:
            raise BackendUnsupported(f"{name} cannot")

        return refuse

    for name in attention_call.AUTO_ORDER:
        monkeypatch.setitem(attention_call.IMPLEMENTATIONS, name, Implementation(unable(name)))
    with pytest.raises(BackendUnsupported, match=r"tpu.*gpu.*xla"):
        ragged_paged_attention(**{**call, "sm_scale": 0.78}, impl="auto")


def test_a_refusal_after_the_write_costs_no_second_write(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second write whose result is dropped would cost a copy of the whole cache."""
    writes = []

    def counted(*arguments: Any) -> Any:
        writes.append(arguments)
        return write(*arguments)

    def refuse(*_: object) -> None:
        raise BackendUnsupported("cpu cannot")

    write = attention_call._write
    monkeypatch.setattr(attention_call, "_write", counted)
    monkeypatch.setitem(attention_call.IMPLEMENTATIONS, "cpu", Implementation(refuse))
    ragged_paged_attention(**{**call, "sm_scale": 0.79}, impl="auto")
    assert len(writes) == 1


def test_the_backend_refuses_what_it_was_not_made_for(call: Call) -> None:
    with pytest.raises(ConfigError, match="num_q_heads=8"):
        FlashAttentionBackend(page_size=16, num_q_heads=8, num_kv_heads=3, head_dim=64)
    with pytest.raises(ConfigError, match="page_size=0"):
        FlashAttentionBackend(page_size=0, num_q_heads=8, num_kv_heads=2, head_dim=64)
    backend = FlashAttentionBackend(page_size=16, num_q_heads=4, num_kv_heads=2, head_dim=64)
    metadata = AttentionMetadata.build(
        call["page_table"], call["cu_q_lens"], call["kv_lens"], num_tokens=48, page_size=16
    )
    with pytest.raises(ShapeError, match="4 query heads"):
        backend(call["q"], call["k"], call["v"], call["fused_kv"], metadata)


def test_metadata_refuses_lengths_that_contradict_each_other(call: Call) -> None:
    with pytest.raises(ShapeError, match="ends at 31 but q has 30"):
        AttentionMetadata.build(call["page_table"], call["cu_q_lens"], call["kv_lens"], num_tokens=30, page_size=16)
    with pytest.raises(ShapeError, match="holds 6"):
        AttentionMetadata.build(call["page_table"], call["cu_q_lens"], call["kv_lens"], num_tokens=48, page_size=1)
