"""An engine that counts in slots runs on ``docs/examples/slot_memory.py``: every slot holds what it should."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import CacheScope, KVPoolExhausted, LayoutKey

PATH = Path(__file__).parents[1] / "docs" / "examples" / "slot_memory.py"
SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))
SIZE = 160


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("slot_memory", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for names
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


class Device:
    """Slots that hold, for each token, a number of all tokens up to it."""

    def __init__(self, page_size):
        self.content = np.full(SIZE + page_size, -1, np.int64)
        self.numbers = {}

    def compute(self, tokens, slots, start):
        for position in range(start, len(slots)):
            self.content[slots[position]] = self.number(tokens[: position + 1])

    def check(self, tokens, slots):
        assert len(set(slots.tolist())) == slots.size
        right = [self.number(tokens[: position + 1]) for position in range(slots.size)]
        assert self.content[slots].tolist() == right

    def number(self, tokens):
        return self.numbers.setdefault(tuple(tokens.tolist()), len(self.numbers))


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_every_slot_holds_the_right_token_whatever_is_shared_and_evicted(example, page_size, seed):
    rng, device = np.random.default_rng(seed), Device(page_size)
    memory = example.SlotMemory(SIZE, page_size, SCOPE)
    running, ended, refused = [], 0, 0
    while ended < 60:
        if len(running) < 6:
            tokens = np.array([*[0] * rng.integers(1, 30), *rng.integers(0, 3, rng.integers(1, 30))], np.int32)
            running.append((memory.begin(tokens), tokens, int(rng.integers(1, 30))))
        chosen = [entry for entry in running if rng.random() < 0.7] or running[:1]
        lengths = [max(held.slots.size + 1, tokens.size) for held, tokens, _ in chosen]
        starts = [held.slots.size for held, _, _ in chosen]
        try:
            memory.extend([held for held, _, _ in chosen], lengths)
        except KVPoolExhausted:
            refused += 1
            held, tokens, _ = running.pop()
            memory.end(held, tokens[: held.slots.size])
            continue
        for (held, tokens, left), start in zip(chosen, starts, strict=True):
            device.check(tokens, held.slots[:start])
            device.compute(tokens, held.slots, start)
            running.remove(next(entry for entry in running if entry[0] is held))
            if left == 0:
                memory.end(held, tokens)
                ended += 1
                continue
            if rng.random() < 0.5:
                memory.publish(held, tokens[: held.slots.size])
                device.check(tokens, held.slots)
            running.append((held, np.append(tokens, np.int32(rng.integers(0, 3))), left - 1))
        held_pages = [page for held, _, _ in running for page in held.own]
        memory.allocator.check_integrity(np.array([*held_pages, *memory.cache.pages()], np.int32))
        memory.cache.check_integrity()
    for held, tokens, _ in running:
        memory.end(held, tokens[: held.slots.size])
    assert memory.cache.protected_pages == 0
    assert memory.allocator.pages.available + memory.cache.cached_pages == SIZE // page_size
    assert memory.cache.hit_tokens
    assert memory.cache.evicted_pages
    assert refused


def test_the_example_prints_what_was_cached(example, capsys):
    example.main()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "request 1: 16 of 18 tokens were cached",
        "request 2: 16 of 18 tokens were cached",
    ]
