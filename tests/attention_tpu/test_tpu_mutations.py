"""Each test plants one mistake in the kernel from outside and proves that the checks notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from tpu_cases import check, make_step

from engine.attention.impl.tpu.kernel import flash, loops, new_rows, packed_rows, transfer

STEP = [(1, 5), (1, 300), (20, 170)]


def expect_caught(**options: Any) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(make_step(0, STEP), races=True, **options)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"eager": True}], ids=str)
def test_without_a_mistake_the_same_steps_pass(options: dict[str, Any]) -> None:
    check(make_step(0, STEP), races=True, **options)


def test_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "wait_block", lambda *args: None)
    expect_caught()


@pytest.mark.slow
def test_results_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_wait_results", lambda *args: None)
    expect_caught()


@pytest.mark.slow
def test_cache_write_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_rows, "wait_rows", lambda *args: None)
    expect_caught()


@pytest.mark.slow
def test_mask_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = flash.key_positions
    monkeypatch.setattr(flash, "key_positions", lambda start, shape, axis: plain(start, shape, axis) + 1)
    expect_caught()


@pytest.mark.slow
def test_window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = flash.visible

    def wider(geo: Any, *args: Any) -> Any:
        return plain(dataclasses.replace(geo, window=geo.window + 1), *args)

    monkeypatch.setattr(flash, "visible", wider)
    expect_caught(sliding_window=4)


@pytest.mark.slow
def test_row_sum_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = flash.reset

    def forgetful(geo: Any, tile: Any, state: Any, *args: Any) -> None:
        total = state.total[...]
        plain(geo, tile, state, *args)
        state.total[...] = total

    monkeypatch.setattr(flash, "reset", forgetful)
    expect_caught()


def test_value_tail_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "_zeroed", lambda rows, keep: rows)
    expect_caught()


@pytest.mark.slow
def test_page_order_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transfer, "page_id", lambda geo, schedule, seq, index: schedule.table[seq * geo.table_pages] + index * 0
    )
    expect_caught()


@pytest.mark.slow
def test_last_page_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = transfer.page_range

    def short(*args: Any) -> Any:
        first, last = plain(*args)
        return first, jnp.maximum(first + 1, last - 1)

    monkeypatch.setattr(transfer, "page_range", short)
    expect_caught()


@pytest.mark.slow
def test_surplus_start(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = transfer.start_copy

    def twice(source: Any, target: Any, sem: Any) -> None:
        plain(source, target, sem)
        plain(source, target, sem)

    monkeypatch.setattr(transfer, "start_copy", twice)
    expect_caught(eager=True)
