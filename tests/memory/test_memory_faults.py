"""An exception at any line of a call leaves the books sound: it happened or it did not, and it works when tried again.

A tracer raises MemoryError at the first line that runs in ``engine/memory`` during a call, then, on state built anew,
at the second, and so on to the last.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, random_pages
from prefix_pages import scope as make_scope
from pretend_pool import PretendPool

import engine.memory.manager
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.pages.slot_allocator import PagedTokenToKVPoolAllocator
from engine.memory.prefix.cache import RadixCache
from engine.memory.prefix.match import EvictedPages
from engine.memory.rows import ReqToTokenPool

ROOM = str(Path(engine.memory.manager.__file__).parent)
FORM = page_format(np.float32)
SCOPE = make_scope()
CONTENT = random_pages(np.random.default_rng(), FORM, 33)


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


class Books:
    """A cache manager in the middle of its work, with what a call needs."""

    def __init__(self, *, host=True, policy="lru", pages=24):
        self.cache = CacheManager(pages * PAGE_SIZE, PAGE_SIZE, 9, 24 * PAGE_SIZE, policy=policy)
        if host:
            self.cache.attach_host_tier(HostTier(20 * FORM.page_bytes, FORM))
        self.pool = PretendPool(self.cache, FORM.page_shape, np.float32)
        self.pool.content[:] = CONTENT[: pages + 1]
        self.row, self.other = self.compute(1, 18), self.compute(2, 11)
        self.end(self.compute(3, 21), 3, 21)
        self.end(self.compute(4, 13), 4, 13)
        both = np.concatenate([tokens(3, 12), tokens(5, 9)])  # parts ways with the third
        row = self.cache.admit(SCOPE, both).row
        self.cache.grow([row], [9])
        self.pool.run_step(row, self.cache.page_table.kv_len(row))
        self.cache.release(row, SCOPE, both)
        self.fresh = self.cache.admit(SCOPE, tokens(6, 14)).row
        self.cache.grow([self.fresh], [14])
        self.pool.run_step(self.fresh, 14)  # computed and not published

    def compute(self, seed, count, scope=SCOPE):
        admission = self.cache.admit(scope, tokens(seed, count))
        have = admission.cached_tokens + admission.loaded_tokens
        self.cache.grow([admission.row], [count - have])
        self.pool.run_step(admission.row, count)
        self.cache.publish(admission.row, scope, tokens(seed, count))
        return admission.row

    def end(self, row, seed, count):
        self.cache.release(row, SCOPE, tokens(seed, count))

    def check(self):
        self.cache.check_integrity()
        cache, table = self.cache, self.cache.page_table
        held = np.unique(table.held_pages())
        if cache.shares_prefixes:  # a row that holds cached pages keeps them locked
            kept = cache.prefix.protected_pages + np.count_nonzero(~cache.prefix.is_cached(held))
            assert kept + cache.reclaimable_pages == cache.size // PAGE_SIZE

    def holdings(self):
        """How much each row has, which row it is aside, and how much is free and could be."""
        table = self.cache.page_table
        rows = table.rows_in_use()
        each = sorted((table.kv_len(row), self.cache.locked_pages(row)) for row in rows)
        return each, self.cache.allocator.pages.available, self.cache.reclaimable_pages

    def contents(self, name):
        """Which prefixes are cached and saved, in the order of eviction, and what was counted.

        What is evicted as a fault comes is not saved; what a fault finds loaded is a hit when it is tried again.
        """
        prefix, tier, table = self.cache.prefix, self.cache.host_tier, self.cache.page_table
        columns = [sorted(column.tolist()) for column in (table._known, table._computed)]
        picture = [
            self.holdings(),
            columns,
            [type(move) for move in self.cache._moves if not isinstance(move, EvictedPages)],
        ]
        if self.cache.shares_prefixes:
            order = [node for order in prefix._forest._orders.values() for node in order]
            ends = [node.tree.prefix_tokens(node).tobytes() for node in order]
            everything = sorted(
                (node.tree.prefix_tokens(node).tobytes(), node.locks)
                for tree in prefix._forest.trees()
                for node in tree.nodes()
            )
            picture += [ends, everything, prefix.evicted_pages, prefix.query_tokens]
            picture += [prefix.hit_tokens] * ("load" not in name)
        if tier and "evict" not in name:
            picture += [(node.key, node.checksum) for node in tier._used]
        return picture


def evict_all(books):
    books.cache.prefix.evict(books.cache.prefix.evictable_pages)
    books.pool.make_moves()
    return books


def filled(books):
    """No page is free, and both rows that decode are about to begin one."""
    books.cache.grow([books.row, books.other], [2, 1])
    books.cache.grow([books.fresh], [2 + PAGE_SIZE * books.cache.allocator.pages.available])
    return books


def forked(books):
    books.child = books.cache.fork(books.fresh, 10)
    return books


def published(books):
    """What a row has computed is cached, for one that has the same and one that waits for it."""
    books.same, books.late = (books.cache.admit(SCOPE, tokens(6, 14)).row for _ in range(2))
    books.cache.grow([books.same], [14])
    books.pool.run_step(books.same, 14)
    books.cache.publish(books.fresh, SCOPE, tokens(6, 14))
    return books


CALLS = {
    "admit cold": (Books, lambda b: b.cache.admit(SCOPE, tokens(9, 20))),
    "admit warm": (Books, lambda b: b.cache.admit(SCOPE, tokens(3, 30))),
    "admit without room": (Books, lambda b: b.cache.admit(SCOPE, tokens(3, 95))),
    "admit with a load": (lambda: evict_all(Books()), lambda b: b.cache.admit(SCOPE, tokens(3, 30))),
    "grow": (Books, lambda b: b.cache.grow([b.row, b.other], [5, 1])),
    "grow with eviction": (Books, lambda b: b.cache.grow([b.row], [40])),
    "grow with eviction, no host": (lambda: Books(host=False), lambda b: b.cache.grow([b.row], [40])),
    "decode": (Books, lambda b: b.cache.grow(np.array([b.row, b.other]), 1)),
    "decode with eviction": (
        lambda: filled(Books()),
        lambda b: b.cache.grow(np.array([b.row, b.other]), 1),
    ),
    "fork": (Books, lambda b: b.cache.fork(b.row, 17)),
    "fork of what is not published": (Books, lambda b: b.cache.fork(b.fresh, 13)),
    "share": (lambda: published(Books(pages=32)), lambda b: b.cache.share(b.late, SCOPE, tokens(6, 14))),
    "truncate": (Books, lambda b: b.cache.truncate(b.fresh, 5)),
    "truncate what is shared": (Books, lambda b: b.cache.truncate(b.row, 6)),
    "publish what is cached": (
        lambda: published(Books(pages=32)),
        lambda b: b.cache.publish(b.same, SCOPE, tokens(6, 14)),
    ),
    "moves": (lambda: forked(Books()), lambda b: b.cache.take_moves()),
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
    before, clean, counted = make(), make(), make()
    call(clean)
    happened = [seen(name, before), seen(name, clean)]
    lines = with_fault(lambda: call(counted), -1)
    assert lines > 5
    for at in range(1 + int(np.random.default_rng().integers(stride)), lines + 1, stride):
        books = make()
        where = with_fault(lambda books=books: call(books), at)
        assert isinstance(where, str), (name, at)
        books.check()
        assert seen(name, books) in happened, where
        if seen(name, books) == happened[0]:
            call(books)
            books.check()
            assert books.contents(name) == clean.contents(name), where


def seen(name, books):
    """What a call does in one piece: room may have been made for it, and a release that fails caches nothing."""
    rows, free, reclaimable = books.holdings()
    if "release" in name:
        rows = [length for length, _ in rows]
    return rows, free if name.startswith("evict") else reclaimable


PAGE = PAGE_SIZE


class Slots:
    """An allocator with a little of everything."""

    def __init__(self):
        self.allocator = PagedTokenToKVPoolAllocator(20 * PAGE, PAGE)
        self.first, self.second = self.allocator.alloc(3 * PAGE), self.allocator.alloc(4 * PAGE)
        self.slots = self.allocator.alloc_extend([0, 0], [6, 7], [-1, -1])
        self.state = self.allocator.backup_state()
        self.shared = self.allocator.pages.take([2])
        self.allocator.pages.retain(self.shared)
        self.allocator.free(self.second)

    def check(self):
        self.allocator.check_integrity()

    def picture(self):
        counts = self.allocator.pages.ref_count(np.arange(21))
        return counts.tolist(), sorted(self.allocator.pages.free_pages().tolist())


class Table:
    """A page table with two rows."""

    def __init__(self):
        self.table = ReqToTokenPool(4, 8 * PAGE, PAGE)
        self.table.release(self.table.alloc_row())
        self.row, self.other = self.table.alloc_rows(2).tolist()
        self.table.append_pages(self.row, [3, 5])
        self.table.take_new_pages([self.row])
        self.table.write_slots([self.other], [0], [3], [4, 5, 6])
        self.table.grow(self.table.plan_growth([self.row, self.other], 1), np.array([7], np.int32))

    def check(self):
        self.table.check_integrity()

    def picture(self):
        table = self.table
        arrays = (table._table, table._granted, table._computed, table._in_use, table._generation, table._told)
        return [array.tolist() for array in arrays], list(table._free_rows)


class Tree:
    """A prefix cache in use."""

    def __init__(self, policy="lru"):
        self.saved = []
        self.allocator = PagedTokenToKVPoolAllocator(40 * PAGE, PAGE)
        self.cache = RadixCache(self.allocator, PAGE, policy=policy, on_evict=self.saved.append)
        self.insert(np.concatenate([tokens(1, 4 * PAGE), tokens(2, 2 * PAGE)]))
        self.insert(np.concatenate([tokens(1, 4 * PAGE), tokens(3, 2 * PAGE)]))
        self.insert(tokens(4, 3 * PAGE), make_scope("another"))
        self.pages = self.allocator.pages.take([5])
        self.found = self.cache.match(SCOPE, tokens(1, 3 * PAGE))  # ends inside of a node
        self.locked = self.cache.match(SCOPE, np.concatenate([tokens(1, 4 * PAGE), tokens(2, 2 * PAGE + 1)]))
        self.cache.lock(self.locked)

    def insert(self, token_ids, scope=SCOPE):
        pages = self.allocator.pages.take([token_ids.size // PAGE])
        self.cache.insert(scope, token_ids, pages)
        self.allocator.pages.release(pages)

    def longer(self):
        return np.concatenate([tokens(1, 4 * PAGE), tokens(2, 2 * PAGE), tokens(5, 2 * PAGE)])

    def pages_of_longer(self):
        return np.concatenate([self.locked.pages, self.pages[:2]])

    def check(self):
        held = np.concatenate([self.cache.pages(), self.pages])
        self.allocator.check_integrity(held)
        self.cache.check_integrity()

    def picture(self):
        forest, cache = self.cache._forest, self.cache
        ends = [node.tree.prefix_tokens(node).tobytes() for order in forest._orders.values() for node in order]
        locks = cache.protected_pages, cache.evictable_pages, self.found.locks, self.locked.locks
        counters = cache.evicted_pages, cache.query_tokens, cache.hit_tokens
        pages = [node.tree.prefix_tokens(node).tobytes() for tree in forest.trees() for node in tree.nodes()]
        return locks, counters, ends, max(pages, default=b""), self.allocator.pages.available


class Saved:
    """A host tier that is full, with pages of full attention and of a window."""

    def __init__(self):
        self.tier = HostTier(9 * FORM.page_bytes, replace(FORM, windows=(None, 2 * PAGE)))
        self.put(1, 3)
        self.put(1, 3, 1, group=1)
        self.put(2, 3)
        self.put(1, 1, group=1)

    def put(self, seed, pages, first=0, group=0):
        content = CONTENT[seed : seed + pages - first]
        return self.tier.put(SCOPE, tokens(seed, pages * PAGE), first, content, group)

    def check(self):
        self.tier.check_integrity()

    def picture(self):
        return [(node.group, node.key, node.checksum) for node in self.tier._used]


PARTS = {
    "alloc": (Slots, lambda s: s.allocator.alloc(5 * PAGE)),
    "alloc_extend": (Slots, lambda s: s.allocator.alloc_extend([6, 0], [15, 9], [s.slots[5], -1])),
    "alloc_decode": (Slots, lambda s: s.allocator.alloc_decode([7, 1], [s.slots[5], -1])),
    "take": (Slots, lambda s: s.allocator.pages.take([2, 0, 4, 1])),
    "take_singles": (Slots, lambda s: s.allocator.pages.take_singles(3)),
    "free": (Slots, lambda s: s.allocator.free(s.slots)),
    "retain": (Slots, lambda s: s.allocator.pages.retain([1, 1, 2])),
    "release": (Slots, lambda s: s.allocator.pages.release([*s.shared, *s.shared, 1])),
    "release one": (Slots, lambda s: s.allocator.pages.release_one(1)),
    "restore": (Slots, lambda s: s.allocator.restore_state(s.state)),
    "clear": (Slots, lambda s: s.allocator.clear()),
    "rows": (Table, lambda t: t.table.alloc_rows(2)),
    "row back": (Table, lambda t: t.table.release(t.row)),
    "row pages": (Table, lambda t: t.table.append_pages(t.table.alloc_row(), [])),
    "slots": (Table, lambda t: t.table.write_slots([t.row], [9], [4], [29, 30, 31, 32])),
    "row growth": (Table, lambda t: t.table.grow(t.table.plan_growth([t.row], [9]), np.array([8, 9], np.int32))),
    "new pages": (Table, lambda t: t.table.take_new_pages([t.row])),
    "row growth by one": (
        Table,
        lambda t: t.table.grow(t.table.plan_growth([t.other], 1), np.array([9], np.int32)),
    ),
    "computed": (Table, lambda t: t.table.mark_computed([t.other], [2])),
    "shorter row": (Table, lambda t: t.table.truncate(t.row, PAGE, np.array([9], np.int32))),
    "other pages": (
        Table,
        lambda t: t.table.replace_pages(t.row, *np.array([[0], [1], [9]], np.int32)),
    ),
    "lock": (Tree, lambda t: t.cache.lock(t.found)),
    "unlock": (Tree, lambda t: t.cache.unlock(t.locked)),
    "record": (Tree, lambda t: t.cache.record(t.found)),
    "insert": (Tree, lambda t: t.cache.insert(SCOPE, tokens(6, 5 * PAGE), t.pages)),
    "insert by priority": (
        lambda: Tree("priority"),
        lambda t: t.cache.insert(SCOPE, t.longer(), t.pages_of_longer(), priority=3),
    ),
    "insert in a node": (
        Tree,
        lambda t: t.cache.insert(SCOPE, np.concatenate([tokens(1, PAGE), tokens(8, 4 * PAGE)]), t.pages),
    ),
    "advance": (Tree, lambda t: t.cache.advance(t.locked, SCOPE, t.longer(), t.pages_of_longer())),
    "finish": (Tree, lambda t: t.cache.finish(t.locked, SCOPE, t.longer(), t.pages_of_longer())),
    "shorten": (Tree, lambda t: t.cache.shorten(t.locked, 3 * PAGE)),
    "evict": (Tree, lambda t: t.cache.evict(4)),
    "reset": (Tree, lambda t: t.cache.reset()),
    "reset of a scope": (Tree, lambda t: t.cache.reset(SCOPE)),
    "raise_weights_epoch": (Tree, lambda t: t.cache.raise_weights_epoch(SCOPE.model, 2)),
    "put": (Saved, lambda s: s.put(3, 4)),
    "put behind": (Saved, lambda s: s.put(3, 4, 2)),
    "put of a window": (Saved, lambda s: s.put(3, 4, 2, group=1)),
    "held": (Saved, lambda s: s.tier.held(SCOPE, tokens(1, 13), group=1)),
    "get": (Saved, lambda s: s.tier.get(SCOPE, tokens(1, 13), 1)),
    "get of a window": (Saved, lambda s: s.tier.get(SCOPE, tokens(1, 13), 1, group=1)),
    "reset of a tier": (Saved, lambda s: s.tier.reset(SCOPE)),
    "segments": (Saved, lambda s: list(s.tier.segments())),
}
# What made room stays: pages that have given way are not brought back.
IN_PARTS = {"put", "put behind", "put of a window"}


@pytest.mark.parametrize("name", PARTS)
def test_a_fault_at_any_line_of_a_part_leaves_sound_books(name):
    make, call = PARTS[name]
    before, clean, counted = make(), make(), make()
    call(clean)
    happened = [before.picture(), clean.picture()]
    lines = with_fault(lambda: call(counted), -1)
    for at in range(1, lines + 1):
        part = make()
        where = with_fault(lambda part=part: call(part), at)
        assert isinstance(where, str), (name, at)
        part.check()
        assert part.picture() in happened or name in IN_PARTS, where
        if part.picture() != happened[1] or happened[0] == happened[1]:
            call(part)
            part.check()
        assert part.picture() == happened[1], where
