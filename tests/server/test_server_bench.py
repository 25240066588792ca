"""The benchmark of the server: its clients against a true server, and what it concludes from samples."""

import asyncio
import os
from types import SimpleNamespace

import numpy as np
import pytest
from server_support import over

from engine.bench import server as bench
from engine.bench.server_clients import MISDEEDS, Clients, Seen
from engine.bench.server_process import ServerProcess


def test_an_answer_is_exact_near_or_wrong(llm):
    expected = bench.Expected(llm, bench.make_jobs(llm, 5)[:2])
    right = expected._outputs[0]
    assert expected.judge([(0, right.text), (1, expected._outputs[1].text)]) == (2, 0, 0)
    assert expected.judge([(0, right.text[:-1] + "\x00"), (0, "")]) == (0, 0, 2)
    tied = right.logits.copy()
    tied[:, np.argmin(tied[-1])] = tied.max(axis=1)
    expected._outputs[0] = SimpleNamespace(**{**right.__dict__, "logits": tied})
    assert expected.judge([(0, right.text[:-1] + "\x00")]) == (0, 1, 0)


def test_growth_compares_the_last_third_with_the_first():
    assert bench._growth([100] * 90) == 1
    assert bench._growth([5] * 9 + [100] * 51 + [130] * 30) == 1.3


def test_a_quantile_is_read_from_what_came_between_two_looks():
    name = "engine_step_time_seconds"
    keys = [f'{name}_bucket{{le="{bound}"}}' for bound in ("0.01", "0.1", "+Inf")]
    before = dict(zip([*keys, f"{name}_count"], (50, 50, 50, 50), strict=True))
    after = dict(zip([*keys, f"{name}_count"], (50, 149, 150, 150), strict=True))
    assert bench._quantile_bound(before, after, name, 0.99) == 0.1
    assert bench._quantile_bound(before, after, name, 1.0) == float("inf")


@pytest.mark.parametrize("rate", [None, 40.0])
def test_a_crowd_is_answered_and_leaves_nothing(llm, rate):
    jobs = bench.make_jobs(llm, 5)[:12]
    expected, args = bench.Expected(llm, jobs), SimpleNamespace(seed=1, clients=6, seconds=1.0, rate=rate)

    async def play(clients, running):
        await bench.load(clients.ask_any, args, args.seconds)
        for kind in MISDEEDS[:1] + MISDEEDS[3:]:
            for _ in range(6):
                await clients._misdeeds[kind](np.random.default_rng(), jobs[0])
        await clients.close()
        async with asyncio.timeout(10):
            while running.held_pages():
                await asyncio.sleep(0.01)

    with over(llm) as server:
        running = ServerProcess("127.0.0.1", server.port, os.getpid())
        clients = Clients(running.host, running.port, jobs, Seen())
        asyncio.run(play(clients, running))
        assert running.descriptors() > 0
        assert running.resident_bytes() > 2**20
    assert not clients.seen.faults
    assert not clients.seen.refused
    assert len(clients.seen.answers) >= 6
    assert len(clients.seen.first) == len(clients.seen.whole) == len(clients.seen.answers)
    assert expected.judge(clients.seen.answers)[2] == 0
