"""Microseconds per call of the page allocator, compared with the usual free list.

The rival keeps its free pages in one array, copies the array at each free and loops over the sequences of a batch in
Python, as the paged allocators of known engines do. It checks nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.bench.timing import median_ratio, print_table, time_in_turn
from engine.memory.pages import PagedTokenToKVPoolAllocator, Slots
from engine.terminal import count

Int32 = npt.NDArray[np.int32]

DECODE_SEQUENCES = 256
EXTEND_SEQUENCES, EXTEND_TOKENS = 64, 512
FREED_TOKENS = 2_048
IDLE_PAGES = 65_536
ROUNDS, CALLS, WARMUP = 31, 4, 4


@dataclass
class ConcatenatedFreeList:
    """The rival.

    Args:
        size: usable token slots.
        page_size: tokens per page.
    """

    size: int
    page_size: int
    free_pages: Int32 = field(init=False)

    def __post_init__(self) -> None:
        self.free_pages = np.arange(1, self.size // self.page_size + 1, dtype=np.int32)

    def alloc(self, need_size: int) -> Int32:
        """Whole pages from the head of the list."""
        pages = self._take(need_size // self.page_size)
        slots: Int32 = np.add.outer(pages * np.int32(self.page_size), np.arange(self.page_size, dtype=np.int32))
        return slots.reshape(-1)

    def alloc_extend(self, prefix_lens: Int32, seq_lens: Int32, last_loc: Int32) -> Int32:
        """The rest of the last page, then fresh pages, sequence by sequence."""
        parts = []
        for prefix, end, last in zip(prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True):
            tail = min(-prefix % self.page_size, end - prefix)
            fresh = -(-(end - prefix - tail) // self.page_size)
            parts.append(np.arange(last + 1, last + 1 + tail, dtype=np.int32))
            parts.append(self.alloc(fresh * self.page_size)[: end - prefix - tail])
        return np.concatenate(parts)

    def alloc_decode(self, seq_lens: Int32, last_loc: Int32) -> Int32:
        """The next slot, or a fresh page where one begins, sequence by sequence."""
        slots = np.empty(seq_lens.size, np.int32)
        for index, (length, last) in enumerate(zip(seq_lens.tolist(), last_loc.tolist(), strict=True)):
            begins = (length - 1) % self.page_size == 0
            slots[index] = self._take(1)[0] * self.page_size if begins else last + 1
        return slots

    def free(self, slots: Int32) -> None:
        """Puts the pages of ``slots`` at the end of the list."""
        self.free_pages = np.concatenate([self.free_pages, np.unique(slots // self.page_size)])

    def _take(self, count: int) -> Int32:
        pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return pages


Allocator = PagedTokenToKVPoolAllocator | ConcatenatedFreeList
Workload = Callable[[Callable[[int, int], Allocator], int], Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--page-size", type=count, default=16, help="tokens per page (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Times each workload on both allocators in turn and prints the table."""
    workloads: dict[str, tuple[Workload, str]] = {
        f"alloc_decode, {DECODE_SEQUENCES} sequences": (_decode, "50"),
        f"alloc_extend, {EXTEND_SEQUENCES} x {EXTEND_TOKENS} tokens": (_extend, "300"),
        f"free, {FREED_TOKENS:,} tokens beside {IDLE_PAGES:,} free pages": (_free, "100"),
    }
    rows = []
    for name, (prepare, bar) in workloads.items():
        contenders = {
            "ours": prepare(PagedTokenToKVPoolAllocator, args.page_size),
            "rival": prepare(ConcatenatedFreeList, args.page_size),
        }
        timings = time_in_turn(contenders, rounds=ROUNDS, calls=CALLS, warmup=WARMUP)
        ours, rival = timings["ours"], timings["rival"]
        figures = [f"{ours.median * 1e6:.1f}", f"{rival.median * 1e6:.1f}", f"{median_ratio(rival, ours):.1f}"]
        rows.append([name, *figures, bar if args.page_size == 16 else "-"])
    print(f"page size {args.page_size}; medians of {ROUNDS} rounds of {CALLS} calls, side by side")
    print_table(["", "ours, µs", "free list, µs", "times as fast", "bar, µs"], rows)


def _decode(make: Callable[[int, int], Allocator], page_size: int) -> Callable[[], object]:
    pages = IDLE_PAGES + DECODE_SEQUENCES * (_calls() + 2)
    allocator = make(pages * page_size, page_size)
    # Lengths spread over a page, so that about one sequence in page_size begins a page at each step.
    lens = 1 + np.arange(DECODE_SEQUENCES, dtype=np.int32) % page_size
    none = np.full(DECODE_SEQUENCES, -1, np.int32)
    last = allocator.alloc_extend(none * 0, lens, none)[np.cumsum(lens) - 1]
    ends = iter([lens + step for step in range(1, _calls() + 1)])

    def step() -> None:
        nonlocal last
        last = allocator.alloc_decode(next(ends), last)

    return step


def _extend(make: Callable[[int, int], Allocator], page_size: int) -> Callable[[], object]:
    pages = IDLE_PAGES + _calls() * EXTEND_SEQUENCES * -(-EXTEND_TOKENS // page_size)
    allocator = make(pages * page_size, page_size)
    prefix = np.zeros(EXTEND_SEQUENCES, np.int32)
    return lambda: allocator.alloc_extend(prefix, prefix + EXTEND_TOKENS, prefix - 1)


def _free(make: Callable[[int, int], Allocator], page_size: int) -> Callable[[], object]:
    tokens = -(-FREED_TOKENS // page_size) * page_size
    allocator = make(IDLE_PAGES * page_size + _calls() * tokens, page_size)
    held: Iterator[Slots] = iter([Slots(allocator.alloc(tokens)[:FREED_TOKENS]) for _ in range(_calls())])
    return lambda: allocator.free(next(held))


def _calls() -> int:
    return WARMUP + ROUNDS * CALLS
