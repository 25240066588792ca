"""An exception at any line of a call leaves the books sound: it happened or it did not, and it works when tried again.

A tracer raises MemoryError at the first line that runs in ``engine/memory`` during a call, then, on state built anew, at
the second, and so on to the last.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, random_pages
from prefix_pages import scope as make_scope

import engine.memory.cache_manager
from engine.memory.cache_manager import CacheManager
from engine.memory.host_tier import HostTier
from engine.memory.page_allocator import PagedTokenToKVPoolAllocator
from engine.memory.page_table import ReqToTokenPool
from engine.memory.prefix_cache import RadixCache

ROOM = str(Path(engine.memory.cache_manager.__file__).parent)
FORM = page_format(np.float32)
SCOPE, OTHER = make_scope(), make_scope("another")


def with_fault(call, at):
    """Runs a call that raises at its ``at``-th line; the number of lines if it has fewer, else None."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        # What a weak reference calls cannot raise.
        if not frame.f_code.co_filename.startswith(ROOM) or frame.f_code.co_name == "forget":
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise MemoryError(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except MemoryError as error:
        return str(error)
    finally:
        sys.settrace(before)
    return lines


def tokens(seed, count):
    return np.random.default_rng(seed).integers(-(2**31), 2**31, count).astype(np.int32)


class Mover:
    """A pool of pages of random numbers."""

    def __init__(self, pages):
        self.content = random_pages(np.random.default_rng(), FORM, pages + 1)

    def read(self, pages):
        return self.content[pages]

    def write(self, pages, data):
        self.content[pages] = data

    def copy(self, sources, targets):
        self.content[targets] = self.content[sources]


class Books:
    """A cache manager in the middle of its work, with what a call needs."""

    def __init__(self, *, host=True, policy="lru", pages=24):
        self.cache = CacheManager(pages * PAGE_SIZE, PAGE_SIZE, 6, 24 * PAGE_SIZE, policy=policy)
        if host:
            self.cache.attach_host_tier(HostTier(20 * FORM.page_bytes, FORM), Mover(pages))
        self.row, self.other = self.compute(1, 18), self.compute(2, 11)
        self.end(self.compute(3, 21), 3, 21)
        self.end(self.compute(4, 13), 4, 13)
        both = np.concatenate([tokens(3, 12), tokens(5, 9)])  # parts ways with the third
        row = self.cache.admit(SCOPE, both).row
        self.cache.grow([row], [9])
        self.cache.release(row, SCOPE, both)
        self.decoding = self.cache.page_table.decoding_rows([self.row, self.other])
        self.fresh = self.cache.admit(SCOPE, tokens(6, 14)).row
        self.cache.grow([self.fresh], [14])  # computed and not published

    def compute(self, seed, count, scope=SCOPE):
        admission = self.cache.admit(scope, tokens(seed, count))
        have = admission.cached_tokens + admission.loaded_tokens
        self.cache.grow([admission.row], [count - have])
        self.cache.publish(admission.row, scope, tokens(seed, count))
        return admission.row

    def end(self, row, seed, count):
        self.cache.release(row, SCOPE, tokens(seed, count))

    def check(self):
        self.cache.check_integrity()
        cache, table = self.cache, self.cache.page_table
        held = np.unique(table.held_pages())
        if cache.prefix:  # who holds cached pages keeps them locked
            kept = cache.prefix.protected_pages + np.count_nonzero(~cache.prefix.is_cached(held))
            assert kept + cache.reclaimable_pages == cache.size // PAGE_SIZE

    def holdings(self):
        """Which rows have how much, and how much could be handed out."""
        table = self.cache.page_table
        rows = table.rows_in_use()
        locked = [self.cache.locked_pages(row) for row in rows]
        return rows.tolist(), table.kv_lens(rows).tolist(), locked, self.cache.reclaimable_pages

    def contents(self):
        """Which prefixes are cached and saved, in the order of eviction, and what was counted."""
        prefix, host = self.cache.prefix, self.cache.host
        picture = [self.holdings(), sorted(self.cache._rule.known.tolist())]
        if prefix:
            order = [node for order in prefix._forest._orders.values() for node in order]
            ends = [node.tree.prefix_tokens(node).tobytes() for node in order]
            everything = sorted(
                (node.tree.prefix_tokens(node).tobytes(), node.locks)
                for tree in prefix._forest.trees()
                for node in tree.nodes()
            )
            picture += [ends, everything, prefix.evicted_pages, prefix.query_tokens, prefix.hit_tokens]
        if host:
            picture += [[(node.key, node.checksum) for node in host.tier._used], vars(host.tier.counters).copy()]
        return picture


def evict_all(books):
    books.cache.prefix.evict(books.cache.prefix.evictable_pages)
    return books


def forked(books):
    books.child, *_ = books.cache.fork(books.fresh, 10)
    return books


CALLS = {
    "admit cold": (Books, lambda b: b.cache.admit(SCOPE, tokens(9, 20))),
    "admit warm": (Books, lambda b: b.cache.admit(SCOPE, tokens(3, 30))),
    "admit without room": (Books, lambda b: b.cache.admit(SCOPE, tokens(3, 95))),
    "admit with a load": (lambda: evict_all(Books()), lambda b: b.cache.admit(SCOPE, tokens(3, 30))),
    "grow": (Books, lambda b: b.cache.grow([b.row, b.other], [5, 1])),
    "grow with eviction": (Books, lambda b: b.cache.grow([b.row], [56])),
    "grow with eviction, no host": (lambda: Books(host=False), lambda b: b.cache.grow([b.row], [56])),
    "decode": (Books, lambda b: [b.cache.grow_decoding(b.decoding), b.cache.grow_decoding(b.decoding)][:0]),
    "fork": (Books, lambda b: b.cache.fork(b.row, 17)),
    "fork of what is not published": (Books, lambda b: b.cache.fork(b.fresh, 13)),
    "publish": (Books, lambda b: b.cache.publish(b.fresh, SCOPE, tokens(6, 14))),
    "publish what was forked": (lambda: forked(Books()), lambda b: b.cache.publish(b.fresh, SCOPE, tokens(6, 14))),
    "release": (Books, lambda b: b.cache.release(b.fresh, SCOPE, tokens(6, 14))),
    "release what was forked": (lambda: forked(Books()), lambda b: b.cache.release(b.fresh, SCOPE, tokens(6, 14))),
    "release of a fork": (lambda: forked(Books()), lambda b: b.cache.release(b.child, SCOPE, tokens(6, 10))),
    "release, nothing kept": (
        lambda: Books(policy=None, host=False),
        lambda b: b.cache.release(b.fresh, SCOPE, tokens(6, 14)),
    ),
    "reset": (Books, lambda b: b.cache.reset_prefix_cache()),
    "evict": (Books, lambda b: b.cache.prefix.evict(5)),
    "evict by priority": (lambda: Books(policy="priority"), lambda b: b.cache.prefix.evict(5)),
    "new weights": (Books, lambda b: b.cache.prefix.raise_weights_epoch(SCOPE.model, 1)),
}


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_a_fault_at_any_line_of_the_manager_leaves_sound_books(name, stride):
    make, call = CALLS[name]
    before, clean = make(), make()
    call(clean)
    after, end = clean.holdings(), clean.contents()
    lines = with_fault(lambda books=make(): call(books), -1)
    assert lines > 10
    for at in range(1 + np.random.default_rng().integers(stride), lines + 1, stride):
        books = make()
        where = with_fault(lambda books=books: call(books), at)
        assert isinstance(where, str), (name, at)
        books.check()
        assert books.holdings() in (before.holdings(), after), where
        if books.holdings() == before.holdings() or after == before.holdings():
            call(books)
            books.check()
            assert books.contents() == end, where
