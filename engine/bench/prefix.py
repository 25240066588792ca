"""The prefix cache: its calls compared with a plain tree of single pages, and its effect in a serving engine.

The rival is a small form of the usual design: one node per page, keyed by a tuple of tokens, and an eviction that
collects the leaves of the whole tree into a heap.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Callable

import numpy as np

from engine.bench.prefix_serving import Pair as EnginePair
from engine.bench.prefix_serving import overhead_rows, shared_rows
from engine.bench.timing import median_ratio, print_table, time_in_turn
from engine.memory.integers import Int32
from engine.memory.pages import PagedTokenToKVPoolAllocator, PageIds
from engine.memory.prefix.cache import RadixCache
from engine.memory.scope import CacheScope, LayoutKey
from engine.terminal import count

VOCABULARY = 32_000
HEADER = ("call", "µs", "rival µs", "times as fast", "bar µs")


class WalkedNode:
    """One page of the rival's tree."""

    def __init__(self, parent: WalkedNode | None, key: tuple[int, ...], page: int, used: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.used = used
        self.children: dict[tuple[int, ...], WalkedNode] = {}


class WalkedTree:
    """The rival."""

    def __init__(self, allocator: PagedTokenToKVPoolAllocator) -> None:
        self.allocator = allocator
        self.page_size = allocator.page_size
        self.root = WalkedNode(None, (), 0, 0)
        self.clock = 0

    def match(self, tokens: Int32) -> tuple[WalkedNode, list[int]]:
        """The last cached node of a sequence and the pages up to it."""
        node, pages = self.root, []
        for key in self._keys(tokens):
            child = node.children.get(key)
            if child is None:
                break
            node = child
            pages.append(node.page)
        return node, pages

    def insert(self, tokens: Int32, pages: Int32) -> None:
        """Adds a node for each page that is not cached."""
        self.clock += 1
        node, known = self.match(tokens)
        self.allocator.pages.retain(PageIds(pages[len(known) :]))
        for key, page in list(zip(self._keys(tokens), pages.tolist(), strict=True))[len(known) :]:
            node.children[key] = WalkedNode(node, key, page, self.clock)
            node = node.children[key]

    def evict(self, count: int) -> None:
        """Releases the least recently used leaves."""
        released: list[int] = []
        order = itertools.count()
        heap = [(leaf.used, next(order), leaf) for leaf in self._leaves()]
        heapq.heapify(heap)
        while heap and len(released) < count:
            leaf = heapq.heappop(heap)[2]
            released.append(leaf.page)
            parent = leaf.parent
            if parent is not None:
                del parent.children[leaf.key]
                if not parent.children and parent is not self.root:
                    heapq.heappush(heap, (parent.used, next(order), parent))
        self.allocator.pages.release(released)

    def _keys(self, tokens: Int32) -> list[tuple[int, ...]]:
        ids, size = tokens.tolist(), self.page_size
        return [tuple(ids[at : at + size]) for at in range(0, len(ids) // size * size, size)]

    def _leaves(self) -> list[WalkedNode]:
        pending, leaves = [self.root], []
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            if not node.children:
                leaves.append(node)
        return leaves


class Pair:
    """Our cache and the rival, each with a pool of its own, with the same contents."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.scope = CacheScope("bench", 0, None, "", LayoutKey.of({"page_size": page_size}))
        self.cache = RadixCache(PagedTokenToKVPoolAllocator(pages * page_size, page_size), page_size)
        self.rival = WalkedTree(PagedTokenToKVPoolAllocator(pages * page_size, page_size))

    def pages_for(self, allocator: PagedTokenToKVPoolAllocator, tokens: Int32) -> PageIds:
        """Fresh pages for the full pages of a sequence; the request that holds them never ends."""
        size = self.page_size
        return PageIds(allocator.alloc(tokens.size // size * size)[::size] // np.int32(size))

    def fill(self, sequences: Int32) -> None:
        """Caches the sequences in both and drops every other reference."""
        for tokens in sequences:
            ours, theirs = (self.pages_for(each.allocator, tokens) for each in (self.cache, self.rival))
            self.cache.insert(self.scope, tokens, ours)
            self.rival.insert(tokens, theirs)
            self.cache.allocator.pages.release(ours)
            self.rival.allocator.pages.release(theirs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--page-size", type=count, default=16, help="tokens per page (default 16)")
    parser.add_argument("--sequences", type=count, default=10_000, help="cached sequences (default 10,000)")
    parser.add_argument("--tokens", type=count, default=1_000, help="tokens per prompt (default 1,000)")
    parser.add_argument("--leaves", type=count, default=20_000, help="leaves during eviction (default 20,000)")
    parser.add_argument("--long", type=count, default=32_768, help="tokens of the long prompt (default 32,768)")
    parser.add_argument("--rounds", type=count, default=200, help="measured calls of each (default 200)")
    parser.add_argument("--serving-rounds", type=count, default=40, help="measured runs of the engines (default 40)")
    parser.add_argument("--only", choices=("calls", "serving"), help="half of it")


def run(args: argparse.Namespace) -> None:
    """Prints median microseconds per call of both, and what the cache gains in serving."""
    if args.only != "serving":
        rng = np.random.default_rng(0)
        rows = [*_match_and_insert(args, rng), _evict(args, rng), *_long_match(args, rng)]
        print_table(HEADER, rows)
    if args.only != "calls":
        pair = EnginePair(args.page_size)
        rows = [*shared_rows(pair, max(args.serving_rounds // 10, 1)), *overhead_rows(pair, args.serving_rounds)]
        # A step of the small model is short, which is not realistic: the larger model shows the cost beside more work.
        rows += overhead_rows(EnginePair(args.page_size, hidden_size=512), args.serving_rounds)
        print_table(("serving", "measured", "bar"), rows)


def _match_and_insert(args: argparse.Namespace, rng: np.random.Generator) -> list[list[str]]:
    cached = _prompts(rng, args.sequences, args.tokens)
    spare = args.rounds + 8
    pair = Pair((args.sequences + 2 * spare) * -(-args.tokens // args.page_size), args.page_size)
    pair.fill(cached)
    asked = itertools.cycle(cached[rng.permutation(len(cached))[: args.rounds]])
    asked_of_rival = itertools.cycle(cached[rng.permutation(len(cached))[: args.rounds]])
    match = _row(
        f"match {args.tokens:,} tokens, {args.sequences:,} sequences",
        lambda: pair.cache.match(pair.scope, next(asked)),
        lambda: pair.rival.match(next(asked_of_rival)),
        args.rounds,
        bar=30,
    )
    fresh = _prompts(rng, spare, args.tokens)
    full = args.tokens // args.page_size * args.page_size
    ours = iter([(tokens, pair.pages_for(pair.cache.allocator, tokens)) for tokens in fresh])
    theirs = iter([(tokens[:full], pair.pages_for(pair.rival.allocator, tokens)) for tokens in fresh])
    insert = _row(
        f"insert {args.tokens:,} tokens, {args.sequences:,} sequences",
        lambda: pair.cache.insert(pair.scope, *next(ours)),
        lambda: pair.rival.insert(*next(theirs)),
        args.rounds,
        bar=60,
    )
    return [match, insert]


def _evict(args: argparse.Namespace, rng: np.random.Generator) -> list[str]:
    pair = Pair(2 * args.leaves + 1, args.page_size)
    pair.fill(_prompts(rng, args.leaves, 2 * args.page_size))
    return _row(
        f"evict 1 page, {args.leaves:,} leaves",
        lambda: pair.cache.evict(1),
        lambda: pair.rival.evict(1),
        5,  # because the rival takes milliseconds
        bar=10,
        calls=60,
    )


def _long_match(args: argparse.Namespace, rng: np.random.Generator) -> list[list[str]]:
    whole, stepwise = _prompts(rng, 2, args.long)
    pair = Pair(2 * (args.long // args.page_size + 1), args.page_size)
    pair.fill(whole[None])
    # The worst shape for our tree: a sequence that grew by one page at a time, so that every page is a node.
    for end in range(args.page_size, args.long + 1, args.page_size):
        known = pair.cache.match(pair.scope, np.append(stepwise[: end - args.page_size], 0)).pages
        page = pair.cache.allocator.alloc(args.page_size)[:1] // args.page_size
        pair.cache.insert(pair.scope, stepwise[:end], np.append(known, page))
    return [
        _row(
            f"match {args.long:,} tokens, {shape}",
            lambda tokens=tokens: pair.cache.match(pair.scope, tokens),  # type: ignore[misc]
            lambda: pair.rival.match(whole),
            min(args.rounds, 50),
            bar=1000,
        )
        for shape, tokens in (("one node", whole), ("one node per page", stepwise))
    ]


def _prompts(rng: np.random.Generator, count: int, tokens: int) -> Int32:
    """Random prompts; int32 ``[count, tokens]``."""
    return rng.integers(0, VOCABULARY, (count, tokens)).astype(np.int32)


def _row(
    call: str, ours: Callable[[], object], rival: Callable[[], object], rounds: int, *, bar: int, calls: int = 1
) -> list[str]:
    timings = time_in_turn({"ours": ours, "rival": rival}, rounds=rounds, calls=calls)
    fast, slow = timings["ours"], timings["rival"]
    ratio = f"{median_ratio(slow, fast):.1f}"
    return [call, f"{fast.median * 1e6:.1f}", f"{slow.median * 1e6:.1f}", ratio, f"{bar}"]
