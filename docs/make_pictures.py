"""Draws the pictures of ``docs/img``: the fused layout, the life of a page, admission and retraction.

Each is an SVG with a background and colours of its own, light or dark as the reader's system is, so that it can be read
on any page. ``make docs-pictures`` writes the files; a test compares them with what this module makes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from engine.memory import CacheManager, CacheScope, LayoutKey
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import Request, RequestState
from engine.serving.sampling_params import SamplingParams

FOLDER = Path(__file__).with_name("img")

STYLE = """
  svg { --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #8c959f; --empty: #eef1f4; --edge: #d0d7de;
        --key: #2a6fdb; --value: #d9730d; --c0: #2a6fdb; --c1: #d9730d; --c2: #2c9a64; --c3: #a24bc4; --c4: #c9362b;
        --cached: #8c959f; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #1c2128; --ink: #e6edf3; --soft: #9da7b3; --line: #768390; --empty: #2d333b; --edge: #444c56;
          --key: #6ea8ff; --value: #f2a35e; --c0: #6ea8ff; --c1: #f2a35e; --c2: #5fd39b; --c3: #cf93ea; --c4: #ff8278;
          --cached: #768390; }
  }
  text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 14px; fill: var(--ink); }
  .soft { fill: var(--soft); }
  .small { font-size: 12.5px; }
  .bold { font-weight: 600; }
  .title { font-size: 16px; font-weight: 600; }
  .code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12.5px; }
  .on { fill: var(--paper); font-weight: 600; stroke: none; }
  .middle { text-anchor: middle; }
  .end { text-anchor: end; }
  .paper { fill: var(--paper); stroke: var(--edge); }
  .box { fill: var(--paper); stroke: var(--line); stroke-width: 1.5; }
  .empty { fill: var(--empty); stroke: var(--line); }
  .null { fill: var(--empty); stroke: var(--soft); stroke-dasharray: 4 3; }
  .key { fill: var(--key); }
  .value { fill: var(--value); }
  .cached { fill: url(#hatch); }
  .c0 { fill: var(--c0); }
  .c1 { fill: var(--c1); }
  .c2 { fill: var(--c2); }
  .c3 { fill: var(--c3); }
  .c4 { fill: var(--c4); }
  .wire { fill: none; stroke: var(--soft); stroke-width: 1.6; }
  .arrow { marker-end: url(#head); }
  .grid { stroke: var(--edge); stroke-width: 1; }
  .mark { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 5 3; fill: none; }
  .wait { stroke-width: 2; stroke-dasharray: 2 4; fill: none; stroke: var(--soft); }
"""
DEFINITIONS = (
    '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L10 5L0 10z" style="fill: var(--soft)"/></marker>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" style="fill: var(--empty)"/>'
    '<rect width="2" height="6" style="fill: var(--cached)"/></pattern>'
)


@dataclass
class Picture:
    """An SVG of a title (for readers that cannot see it), a size in pixels, and shapes in the order of drawing."""

    title: str
    width: int
    height: int
    shapes: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """A line of text, its baseline at ``y``; begins, ends (``end``) or has its middle (``middle``) at ``x``."""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", radius: float = 2) -> None:
        """A rectangle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{kind}"/>'
        )

    def path(self, course: str, kind: str = "wire arrow") -> None:
        """A line in SVG's notation."""
        self.shapes.append(f'<path d="{course}" class="{kind}"/>')

    def svg(self) -> str:
        """The file's text."""
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}">\n<title>{escape(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n<defs>{DEFINITIONS}</defs>\n"
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" class="paper"/>\n'
            f"{body}\n</svg>\n"
        )


def fused_layout() -> str:
    """Keys and values of a token, a slot, a page, a layer's buffer, and a row of the page table."""
    picture = Picture(
        "The fused layout: K and V of each head side by side in a slot, slots in pages, pages in a buffer", 880, 560
    )
    heads, cell = 4, 50
    picture.text(28, 36, "1. One token, with H = 4 KV heads", "title")
    for head in range(heads):
        for kind, name, y in (("key", "K", 58), ("value", "V", 104)):
            picture.box(66 + head * (cell + 4), y, cell, 34, kind)
            picture.text(66 + head * (cell + 4) + cell / 2, y + 22, f"{name}{head}", "on middle")
    picture.text(28, 80, "k", "code bold")
    picture.text(28, 126, "v", "code bold")
    picture.text(66, 160, "[H, D] each; a box is D numbers", "small soft")
    picture.path("M290 98H404")
    picture.text(347, 88, "merge_kv", "code middle")
    slot = 416
    for row in range(2 * heads):
        kind, name = (("key", "K"), ("value", "V"))[row % 2]
        picture.box(slot + row * (cell + 4), 80, cell, 36, kind)
        picture.text(slot + row * (cell + 4) + cell / 2, 103, f"{name}{row // 2}", "on middle")
        picture.text(slot + row * (cell + 4) + cell / 2, 134, str(row), "small soft middle")
    picture.text(slot, 68, "the token's slot, [2H, D]", "small")
    picture.text(slot, 154, "row 2h is K of head h, row 2h + 1 is V of head h", "small soft")

    picture.text(28, 212, "2. One page, with page_size = 4", "title")
    for offset in range(4):
        y = 230 + offset * 24
        picture.text(118, y + 15, f"slot {8 + offset}", "code end")
        for row in range(2 * heads):
            picture.box(128 + row * 27, y, 25, 20, ("key", "value")[row % 2])
    picture.text(372, 245, "A page is page_size slots in a row: the unit that is allocated and shared.", "small")
    picture.text(372, 268, "slot = page × page_size + offset; here page 2 has slots 8 to 11.", "small")
    picture.text(372, 291, "Full pages are never written again.", "small")

    picture.text(28, 372, "3. One layer's buffer, [size + page_size, 2H, D]", "title")
    pages, left, width = 9, 28, 84
    owners = {1: "c2", 2: "c3", 4: "c3", 5: "c2", 7: "c3"}
    for page in range(pages):
        x = left + page * (width + 8)
        picture.box(x, 390, width, 40, "null" if page == 0 else owners.get(page, "empty"))
        picture.text(x + width / 2, 415, f"page {page}", "small middle " + ("on" if page in owners else "bold"))
    picture.text(left, 450, "null page: no", "small soft")
    picture.text(left, 466, "request owns it", "small soft")
    picture.text(28, 510, "page table", "code bold")
    for row, (kind, table) in enumerate((("c3", (4, 2, 7, 0)), ("c2", (1, 5, 0, 0)))):
        y = 492 + row * 28
        for column, page in enumerate(table):
            picture.box(216 + column * 40, y, 36, 24, kind if page else "null")
            picture.text(216 + column * 40 + 18, y + 17, str(page), "small middle " + ("on" if page else "bold"))
        picture.text(206, y + 17, f"request {'AB'[row]}", "small end")
    picture.text(392, 509, "A's tokens are in pages 4, 2, 7: any order, anywhere in the pool.", "small")
    picture.text(392, 537, "What a row does not use points at the null page, which nothing reads.", "small")
    return picture.svg()


def page_life() -> str:
    """The states of a page, and the calls that change them."""
    picture = Picture(
        "The life of a page: free, held by a row, cached and locked, cached and evictable, host tier", 880, 380
    )
    width, gap, top = 158, 64, 112
    states = [
        ("free", "nobody holds it", 0, "c2"),
        ("held", "by one request", 2, "c0"),
        ("cached, locked", "by those that share it", 4, "c0"),
        ("cached, evictable", "no request uses it", 4, "c1"),
    ]
    left = [28 + number * (width + gap) for number in range(len(states))]
    free, held, locked, evictable = (x + width / 2 for x in left)
    for x, (name, who, filled, kind) in zip(left, states, strict=True):
        picture.box(x, top, width, 104, "box", 8)
        picture.text(x + width / 2, top + 26, name, "bold middle")
        picture.text(x + width / 2, top + 46, who, "small soft middle")
        for slot in range(4):
            picture.box(x + 21 + slot * 30, top + 62, 26, 26, kind if slot < filled else "empty")
    for x, call in zip(left, ("grow", "publish", "release"), strict=False):
        picture.path(f"M{x + width} {top + 60}H{x + width + gap - 2}")
        picture.text(x + width + gap / 2, top + 50, call, "code middle")
    # On top the ways back: a hit locks a page again, a page that is not full is not cached, eviction frees.
    picture.path(f"M{evictable - 30:g} {top}V80H{locked:g}V{top - 3}")
    picture.text((locked + evictable) / 2 - 15, 72, "admit: a prompt begins alike", "small middle")
    picture.path(f"M{held:g} {top}V80H{free + 30:g}V{top - 3}")
    picture.text((free + held) / 2 + 15, 72, "release: not full", "small middle")
    picture.path(f"M{evictable + 30:g} {top}V42H{free - 30:g}V{top - 3}")
    picture.text((held + locked) / 2, 34, "evict: the pool is short of pages", "small middle")
    picture.box(left[2], 290, 2 * width + gap, 66, "box", 8)
    picture.text((locked + evictable) / 2, 317, "host tier", "bold middle")
    picture.text((locked + evictable) / 2, 339, "the same bytes in host memory, with a checksum", "small soft middle")
    picture.path(f"M{evictable + 30:g} {top + 104}V287")
    picture.text(evictable + 20, 257, "evict: its bytes are saved", "small end")
    picture.path(f"M{left[2]} 323H{held:g}V{top + 107}")
    picture.text(held - 10, 257, "admit: loaded into", "small end")
    picture.text(held - 10, 274, "a fresh page of the pool", "small end")
    picture.text(28, 335, "A page is filled while it is held,", "small soft")
    picture.text(28, 353, "and never written once it is full.", "small soft")
    return picture.svg()


PAGE, POOL_PAGES, PROMPT, ANSWER, REQUESTS = 16, 24, 64, 96, 5


@dataclass(frozen=True)
class Sample:
    """A step of the run: the pages that each request holds, those that are only cached, and each request's state."""

    held: list[int]
    cached: int
    states: list[RequestState]
    known: list[int]


def sample_run() -> list[Sample]:
    """What the scheduler and the books do with five requests and too few pages; the device is only pretended."""
    scope = CacheScope("a model", 0, None, "", LayoutKey.of({"page_size": PAGE}))
    cache = CacheManager(POOL_PAGES * PAGE, PAGE, max_requests=REQUESTS, max_context_tokens=POOL_PAGES * PAGE)
    queue, ticks = RequestQueue(), itertools.count()
    replica = Replica(cache, queue, max_running_requests=REQUESTS, max_step_tokens=PROMPT)
    scheduler = Scheduler([replica], queue, lambda: float(next(ticks)))
    params = SamplingParams(max_new_tokens=ANSWER)
    prompts = [np.arange(1000 * number, 1000 * number + PROMPT, dtype=np.int32) for number in range(REQUESTS)]
    requests = [Request(number, prompt, params, frozenset(), scope) for number, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    samples = []
    while scheduler.has_work:
        step = scheduler.next_step()
        if step is None:
            raise RuntimeError("no step is planned although every step was committed")
        held = [0 if r.req_pool_idx is None else len(cache.page_table.row_pages(r.req_pool_idx)) for r in requests]
        cached = POOL_PAGES - cache.allocator.available_size() // PAGE - sum(held)
        samples.append(Sample(held, cached, [r.state for r in requests], [r.num_tokens for r in requests]))
        scheduler.commit(step, np.full(len(step.parts[0].requests), 7, np.int32), [])
    return samples


def admission() -> str:
    """A run in which requests wait, grow, are retracted and come back."""
    samples = sample_run()
    picture = Picture("Admission and retraction: which request holds how many of 24 pages at each step", 880, 560)
    left, top, width, unit = 108, 88, 736, 9
    step_width = width / len(samples)
    picture.text(
        28,
        34,
        f"{REQUESTS} requests of {PROMPT} prompt and {ANSWER} new tokens; a pool of {POOL_PAGES} pages of {PAGE}",
        "title",
    )
    x = 108.0
    for kind, words in (
        ("c0", "held by a request"),
        ("cached", "only cached: taken when a request needs pages"),
        ("box", "free"),
    ):
        picture.box(x, 52, 14, 14, kind)
        picture.text(x + 20, 64, words, "small soft")
        x += 46 + 6.6 * len(words)
    bottom = top + POOL_PAGES * unit
    for pages in range(0, POOL_PAGES + 1, 6):
        y = bottom - pages * unit
        picture.path(f"M{left} {y:g}H{left + width}", "grid")
        picture.text(left - 8, y + 4, str(pages), "small soft end")
    picture.text(28, top + 4, "pages", "small soft")
    below = np.zeros(len(samples))
    layers = [([s.held[number] for s in samples], f"c{number}") for number in range(REQUESTS)]
    for heights, kind in [*layers, ([s.cached for s in samples], "cached")]:
        above = below + np.array(heights)
        picture.path(_area(left, bottom, step_width, unit, below, above), kind)
        below = above
    lanes = bottom + 64
    picture.text(28, lanes - 26, "what each request does", "small soft")
    for number in range(REQUESTS):
        y = lanes + number * 34
        picture.text(left - 10, y + 5, f"request {number + 1}", "small end")
        for state, start, stop in _runs([s.states[number] for s in samples]):
            x, end = left + start * step_width, left + stop * step_width
            if state is RequestState.WAITING:
                picture.path(f"M{x:g} {y:g}H{end:g}", "wait")
                if stop - start > 20:
                    was_running = start and samples[start - 1].states[number] is RequestState.RUNNING
                    picture.text(
                        (x + end) / 2, y - 6, "retracted, waits" if was_running else "waits", "small soft middle"
                    )
            elif state is RequestState.RUNNING:
                picture.box(x, y - 8, round(end - x, 1), 16, f"c{number}", 3)
                if stop < len(samples) and samples[stop].states[number] is RequestState.WAITING:
                    picture.path(f"M{end:.1f} {top - 4}V{y + 8:g}", "mark")
    axis = lanes + REQUESTS * 34 - 6
    for at in range(0, len(samples), 50):
        picture.text(left + at * step_width, axis + 12, str(at), "small soft middle")
    picture.text(left + width, axis + 12, "step", "small soft end")
    return picture.svg()


def _area(left: float, bottom: float, step: float, unit: float, low: np.ndarray, high: np.ndarray) -> str:
    """The area between two stepped curves, in SVG's notation."""
    forth = "".join(
        f"L{left + at * step:.1f} {bottom - y * unit:.1f}H{left + (at + 1) * step:.1f}" for at, y in enumerate(high)
    )
    back = "".join(
        f"L{left + (at + 1) * step:.1f} {bottom - low[at] * unit:.1f}H{left + at * step:.1f}"
        for at in range(len(low) - 1, -1, -1)
    )
    return f"M{left:.1f} {bottom - low[0] * unit:.1f}{forth}{back}z"


def _runs(states: list[RequestState]) -> list[tuple[RequestState, int, int]]:
    """Stretches of equal states: state, first step, step behind the last."""
    runs, start = [], 0
    for state, group in itertools.groupby(states):
        stop = start + len(list(group))
        runs.append((state, start, stop))
        start = stop
    return runs


def make_all() -> dict[str, str]:
    """The text of each picture by the name of its file."""
    return {"fused-layout.svg": fused_layout(), "page-life.svg": page_life(), "admission.svg": admission()}


if __name__ == "__main__":
    for name, text in make_all().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
