"""The benchmark of groups: what it prints holds, its counts are right, and small runs agree with arithmetic by hand."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from engine.bench import __main__ as bench
from engine.bench.groups_designs import half_and_half, with_groups, without_groups
from engine.bench.groups_load import SCOPE, Traffic, run_load
from engine.bench.groups_sessions import LruWindows, RoundRobin, hit_rates, rival_hit_rates

PAGE, WINDOW = 16, 1_024
UNITS = 12_000


def numbers_after(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [float(number) for number in re.findall(r"(\d+\.\d+)", line[len(start) :])]


def test_what_the_command_prints_meets_its_bars(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "groups", "--pages", str(UNITS), "--steps", "300"])
    monkeypatch.setattr(bench, "leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert not end.value.code
    out = capsys.readouterr().out
    times_plain, times_split = numbers_after(out, "8,192 tokens: ")
    assert times_plain >= 3
    assert times_split > 1
    assert all(numbers_after(out, f"{mix}: ")[0] > 1 for mix in ("short", "long", "both"))
    assert all(share <= 4 for share in numbers_after(out, "waste: "))
    for kind in ("go on after the last answer", "put another question to the same context"):
        ours, split, ours_last, split_last = numbers_after(out, f"sessions that {kind}: ")
        assert ours >= 99
        assert ours_last >= 99
        assert max(split, split_last) < ours


def test_the_same_command_prints_the_same(capsys):
    traffic = Traffic("mixed", ((100, 400, 0.25), (2_000, 3_000, 0.1)))
    assert run_load(half_and_half, traffic, 3_000, 60, seed=3) == run_load(half_and_half, traffic, 3_000, 60, seed=3)


def test_requests_of_one_length_run_as_many_at_once_as_their_pages_allow():
    tokens, answer = 8_192, 256
    traffic = Traffic("one length", ((tokens, tokens, answer / tokens),))
    prompt_pages, all_pages, window_pages = (tokens - answer) // PAGE, tokens // PAGE, WINDOW // PAGE
    ours, plain, split = (run_load(make, traffic, UNITS, 400) for make in (with_groups, without_groups, half_and_half))
    # A window lies in 64 or 65 pages, and up to 4,096 tokens of prompts are being computed.
    most, chunk_pages = prompt_pages + 5 * window_pages, 4_096 // PAGE
    least = all_pages + 5 * (window_pages + 2)
    assert (UNITS - 5 * chunk_pages) // least <= ours.most_running <= UNITS // most
    assert UNITS // 6 // all_pages <= plain.most_running <= UNITS // 6 // prompt_pages
    assert split.most_running <= min(UNITS // 2 // prompt_pages, UNITS // 10 // window_pages)
    for result in (ours, plain, split):
        assert 0 <= result.waste <= result.most_waste <= 1 - result.free
        assert result.running <= result.most_running
    # In the mean a request of the plain pool has its whole context but for a window and half of the answer behind it.
    behind = 5 * (prompt_pages - window_pages) * plain.most_running / UNITS
    assert plain.most_waste == pytest.approx(behind, rel=0.1)


@pytest.mark.parametrize("tokens", [5, 1_023, 1_024, 1_040, 1_041, 5_000])
@pytest.mark.parametrize("make", [with_groups, without_groups, half_and_half])
def test_waste_is_what_lies_behind_the_window_and_in_tails(make, tokens):
    design = make(6_000, 3, 8_192)
    cache = design.cache
    if make is half_and_half:
        cache.full.admit(SCOPE, np.zeros(1, np.int32))  # so that a request's rows differ
    row = cache.admit(SCOPE, np.zeros(tokens, np.int32)).row
    for start in range(0, tokens, 999):
        count = min(999, tokens - start)
        cache.grow([row], [count])
        cache.mark_computed([row], [start + count])
        cache.leave_behind([row])
    rows, starts = np.array([row], np.int32), np.array([tokens])
    wasted = sum(part.wasted_units(rows, starts) for part in design.parts)
    seen = {position // PAGE for position in range(max(0, tokens - WINDOW + 1), tokens + 1)}
    unseen = len(set(range(-(-tokens // PAGE))) - seen) if make is without_groups else 0
    assert wasted == pytest.approx(5 * unseen + 6 * (-tokens % PAGE) / PAGE)


def test_the_rival_s_windows_leave_in_order_of_use():
    cache = LruWindows(150)
    sizes = {"a": 100, "b": 80, "c": 3}
    first, other, third = ([(name, place) for place in range(size)] for name, size in sizes.items())
    cache.compute(first)
    assert cache.find(first) == 100
    cache.compute(other)  # 30 pages of the first session go, the first ones: its last 64 are there
    assert cache.find(first) == 100
    assert cache.find(first[:90]) == 0  # here the window begins among those that are gone
    cache.compute(third)  # the first three of the other session go, which was used before
    assert cache.find(other) == 80
    assert cache.find(other[:65]) == 0
    assert cache.find(third) == 3
    cache.compute([("d", place) for place in range(150)])
    assert (cache.find(first), cache.find(other), cache.find(third)) == (0, 0, 0)


@pytest.mark.parametrize("goes_on", [True, False])
def test_sessions_in_a_quarter_of_the_pages_find_what_they_have_said_and_lose_it_in_the_split(goes_on):
    robin = RoundRobin.filling(UNITS, 8_192, 3, goes_on=goes_on)
    assert robin.sessions * (robin.longest // PAGE + 5 * 65) <= UNITS / 4 + robin.sessions
    full = RoundRobin(9, 8_192, 3, goes_on)  # all window pages of these do not fit: many are evicted
    assert full.needed_units < UNITS < 9 * 6 * 8_192 // PAGE
    assert hit_rates(robin, UNITS)[-1] == pytest.approx(1)
    assert hit_rates(full, UNITS)[-1] == pytest.approx(1)
    assert rival_hit_rates(full, UNITS)[-1] == 0


def test_the_benchmark_needs_no_jax():
    code = "import sys, engine.bench.groups; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
