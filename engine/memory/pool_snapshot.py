"""The state of every page of the pool at one moment, counted from the books and not by subtraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import IntegrityError
from engine.memory.manager import CacheManager


@dataclass(frozen=True)
class RowSnapshot:
    """The row and pages of one running request.

    Attributes:
        row: its page-table row.
        tokens: tokens with a slot.
        pages: pages that it holds over all groups, shared ones included.
        locked_pages: cached pages that it keeps from eviction.
    """

    row: int
    tokens: int
    pages: int
    locked_pages: int


@dataclass(frozen=True)
class PoolSnapshot:
    """The pool at one moment, in pages unless a name says otherwise.

    ``free_pages + private_pages + locked_pages + evictable_pages == total_pages`` always.

    Attributes:
        page_size: tokens per page.
        total_pages: all pages except the null page.
        free_pages: pages without a holder.
        private_pages: pages held by rows and not cached.
        locked_pages: cached pages under the lock of a row, or held by one.
        evictable_pages: cached pages that can be evicted.
        free_runs: runs of consecutive free pages; 1 where nothing is fragmented.
        largest_free_run_pages: pages of the longest free run.
        tail_waste_tokens: slots in the last pages of rows, one in each group, that hold no token yet.
        rows: one entry per running request.
        replicas: the snapshot of each replica, where this one is of the whole engine; else empty.
    """

    page_size: int
    total_pages: int
    free_pages: int
    private_pages: int
    locked_pages: int
    evictable_pages: int
    free_runs: int
    largest_free_run_pages: int
    tail_waste_tokens: int
    rows: tuple[RowSnapshot, ...]
    replicas: tuple[PoolSnapshot, ...] = ()

    @property
    def usage(self) -> float:
        """Fraction of the pool that cannot be allocated now, 0 to 1."""
        return (self.private_pages + self.locked_pages) / self.total_pages


def snapshot_pool(cache: CacheManager) -> PoolSnapshot:
    """Counts every page; the cost is proportional to the pages in use, so it is for monitoring and not for each step.

    Raises:
        IntegrityError: the parts do not make up the pool.
    """
    table, prefix, size = cache.page_table, cache.prefix, cache.page_size
    free = np.sort(cache.allocator.pages.free_pages())
    held = np.unique(table.held_pages())
    runs = np.diff(np.flatnonzero(np.diff(free, prepend=-1, append=-1) != 1)) if free.size else np.zeros(0, np.int64)
    rows = tuple(
        RowSnapshot(row, tokens, int(np.count_nonzero(table.pages_by_group(row))), cache.locked_pages(row))
        for row, tokens in ((row, int(table.kv_lens([row])[0])) for row in table.rows_in_use().tolist())
    )
    snapshot = PoolSnapshot(
        page_size=size,
        total_pages=cache.size // size,
        free_pages=int(free.size),
        private_pages=int(held.size - np.count_nonzero(prefix.is_cached(held))),
        locked_pages=prefix.protected_pages,
        evictable_pages=prefix.evictable_pages,
        free_runs=int(runs.size),
        largest_free_run_pages=int(runs.max(initial=0)),
        tail_waste_tokens=sum(-row.tokens % size for row in rows) * table.num_groups,
        rows=rows,
    )
    found = snapshot.free_pages + snapshot.private_pages + snapshot.locked_pages + snapshot.evictable_pages
    if found != snapshot.total_pages:
        raise IntegrityError(
            f"{snapshot.free_pages} free, {snapshot.private_pages} private, {snapshot.locked_pages} locked and "
            f"{snapshot.evictable_pages} evictable pages are {found}, the pool has {snapshot.total_pages}; this is a "
            "bug, report it"
        )
    return snapshot


def add_snapshots(replicas: Sequence[PoolSnapshot]) -> PoolSnapshot:
    """The pools of several replicas as one; no run of pages goes from one to the next."""

    def total(name: str) -> int:
        return sum(getattr(replica, name) for replica in replicas)

    return PoolSnapshot(
        page_size=replicas[0].page_size,
        total_pages=total("total_pages"),
        free_pages=total("free_pages"),
        private_pages=total("private_pages"),
        locked_pages=total("locked_pages"),
        evictable_pages=total("evictable_pages"),
        free_runs=total("free_runs"),
        largest_free_run_pages=max(replica.largest_free_run_pages for replica in replicas),
        tail_waste_tokens=total("tail_waste_tokens"),
        rows=tuple(row for replica in replicas for row in replica.rows),
        replicas=tuple(replicas),
    )
