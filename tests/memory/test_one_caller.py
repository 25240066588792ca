"""Books are used by one thread at a time and by the process that made them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, random_pages
from prefix_pages import scope as make_scope

from engine.errors import ConcurrentUse
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.rows import ReqToTokenPool

FORM = page_format(np.float32)


def in_a_thread(call):
    """What a call in another thread returns or raises."""
    results = []

    def run():
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_a_call_while_another_thread_is_in_one_is_refused_and_changes_nothing():
    cache = CacheManager(8 * PAGE_SIZE, PAGE_SIZE, 4, 8 * PAGE_SIZE)
    token_ids = np.arange(4 * PAGE_SIZE, dtype=np.int32)
    row = cache.admit(make_scope(), token_ids).row
    cache.grow([row], [token_ids.size])
    cache.mark_computed([row], [token_ids.size])
    cache.release(row, make_scope(), token_ids)
    refused = []
    others = [
        lambda: cache.admit(make_scope(), token_ids),
        lambda: cache.allocator.alloc(PAGE_SIZE),
        lambda: cache.allocator.free([PAGE_SIZE]),
        lambda: cache.prefix.evict(1),
        lambda: cache.page_table.alloc_row(),
        lambda: cache.clear(),
    ]
    in_mid_eviction = lambda _: refused.extend(in_a_thread(other) for other in others)  # noqa: E731
    cache.prefix._on_evict = in_mid_eviction
    assert cache.prefix.evict(2) == 2
    assert [type(each) for each in refused] == [ConcurrentUse] * len(others)
    cache.check_integrity()
    assert cache.allocator.available_size() == 6 * PAGE_SIZE


def test_books_go_from_thread_to_thread_between_calls():
    allocator = PagedTokenToKVPoolAllocator(64, PAGE_SIZE)
    table, tier = ReqToTokenPool(2, 32, PAGE_SIZE), HostTier(4 * FORM.page_bytes, FORM)
    slots = in_a_thread(lambda: allocator.alloc(16))
    allocator.free(slots)
    row = in_a_thread(table.alloc_row)
    table.release(row)
    data = random_pages(np.random.default_rng(), FORM, 1)
    put = lambda: tier.put(make_scope(), np.arange(PAGE_SIZE), 0, data)  # noqa: E731
    assert (in_a_thread(put), put()) == (1, 0)
    assert in_a_thread(lambda: RadixCache(allocator, PAGE_SIZE).evict(1)) == 0


def test_two_threads_at_once_are_refused_or_right():
    allocator = PagedTokenToKVPoolAllocator(4096 * PAGE_SIZE, PAGE_SIZE)
    interval = sys.getswitchinterval()
    held = [[], []]

    def work(mine):
        rng = np.random.default_rng()
        for _ in range(400):
            try:
                if mine and rng.random() < 0.4:
                    allocator.pages.release(mine[-1])
                    mine.pop()
                else:
                    mine.append(allocator.pages.take([rng.integers(1, 4)]))
            except ConcurrentUse:
                pass

    threads = [threading.Thread(target=work, args=(mine,)) for mine in held]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    allocator.check_integrity(np.concatenate([np.empty(0, np.int32), *held[0], *held[1]]))


def fork_and_call():
    """Run in a process of its own: one that has loaded jax has threads, and must not fork."""
    allocator, tier = PagedTokenToKVPoolAllocator(64, PAGE_SIZE), HostTier(4 * FORM.page_bytes, FORM)
    cache = CacheManager(64, PAGE_SIZE, 2, 32)
    calls = [
        lambda: allocator.alloc(16),
        lambda: cache.admit(make_scope(), [1, 2, 3]),
        lambda: tier.held(make_scope(), [1, 2, 3, 4]),
        lambda: PagedTokenToKVPoolAllocator(64, PAGE_SIZE).alloc(64),  # made here: it is its own
    ]
    child = os.fork()
    if not child:
        for call in calls:
            try:
                print(type(call()).__name__, flush=True)
            except Exception as error:
                print(type(error).__name__, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    allocator.alloc(16)
    print("and here", flush=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_of_the_process_is_refused():
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    run = subprocess.run(
        [sys.executable, "-c", f"import {here.stem}; {here.stem}.fork_and_call()"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.split("\n") == ["ConcurrentUse"] * 3 + ["ndarray", "and here", ""], run.stderr
