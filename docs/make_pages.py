"""Makes the pictures of docs/pages.md: a run of the scheduler without a model, its page, and what Chromium shows of it.

python docs/make_pages.py               the pictures, in docs/img/
python docs/make_pages.py FOLDER        all of them, small and large, wide and narrow, light and dark, there
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import ConfigError
from engine.memory.scope import CacheScope, LayoutKey
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.request import Request
from engine.serving.sampling_params import SamplingParams
from engine.trace.page_history import PageHistory
from engine.trace.page_html import trace_page
from engine.trace.recorded_books import RecordedCacheManager
from engine.trace.recorder import Recorder
from engine.trace.trace_file import Trace, parse_events

IMAGES = Path(__file__).parent / "img"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=8000"),
)
SEED = 11


@dataclass(frozen=True)
class Run:
    """A pretended engine and its load.

    Attributes:
        pages: of the pool.
        rows: requests that run at once.
        page_size: tokens per page.
        budget: new tokens in a step.
        requests: how many come.
        rate: how many come in a step, on the average.
        systems: prompts that many share, each of so many tokens.
        own, answer: medians of what a prompt has of its own, and of an answer, in tokens.
        steps: when it ends.
        windows: of the groups of layers.
    """

    pages: int
    rows: int
    page_size: int
    budget: int
    requests: int
    rate: float
    systems: tuple[int, ...]
    own: int
    answer: int
    steps: int
    windows: tuple[int | None, ...] = (None,)


SMALL = Run(64, 6, 16, 64, 40, 0.08, (48, 64, 96), 40, 60, 420)
LARGE = Run(64_000, 256, 16, 4096, 1500, 0.42, (600, 900, 2000, 3200, 1400), 2600, 420, 1500)
GROUPS = Run(256, 8, 16, 128, 60, 0.1, (96, 160), 60, 100, 500, (None, 64))


def record(run: Run) -> Trace:
    """The trace of a run; equal for equal arguments but for its times."""
    rng, recorder = np.random.default_rng(SEED), Recorder()
    context = 8 * (max(run.systems) + run.own + run.answer)
    cache = RecordedCacheManager(
        recorder, run.pages * run.page_size, run.page_size, run.rows, context, windows=run.windows
    )
    queue = RequestQueue()
    sizes = {"max_running_requests": run.rows, "max_step_tokens": run.budget}
    replica = Replica(cache, queue, recorder=recorder, **sizes)
    scheduler = Scheduler([replica], queue, recorder=recorder)
    arrivals = np.floor(rng.exponential(1 / run.rate, run.requests).cumsum())
    systems = [rng.integers(0, 2**30, tokens) for tokens in run.systems]
    scopes = [CacheScope("model", 0, None, salt, LayoutKey.of({"version": 1})) for salt in ("", "a", "b")]
    come = 0
    for step in range(run.steps):
        while come < run.requests and arrivals[come] <= step:
            scheduler.add(_request(come, run, rng, systems, scopes))
            come += 1
        planned = scheduler.next_step()
        if planned is not None:
            scheduler.commit(planned, rng.integers(0, 2**30, run.rows).astype(np.int32), [])
    lines = recorder.take_lines()
    return Trace({"started": "2026-11-28T00:00:00Z"}, parse_events(lines[1:], first_line=2))


def _request(number: int, run: Run, rng: np.random.Generator, systems: Sequence, scopes: Sequence) -> Request:
    which = int(rng.integers(len(systems)))
    own = rng.integers(0, 2**30, max(1, int(rng.lognormal(np.log(run.own), 0.6))))
    answer = max(2, int(rng.lognormal(np.log(run.answer), 0.6)))
    most = run.pages * run.page_size // (2 * len(run.windows)) - systems[which].size
    own = own[: max(1, most - answer)]
    prompt = np.concatenate([systems[which], own]).astype(np.int32)
    params = SamplingParams(max_new_tokens=min(answer, most // 2 + 1))
    return Request(number, prompt, params, frozenset(), scopes[which % len(scopes)])


def find_browser() -> str:
    """A Chromium; raises ConfigError where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise ConfigError(f"there is no browser: none of {', '.join(BROWSERS)}; on Debian: apt install chromium")


def take_picture(page: Path, image: Path, width: int, height: int, *, dark: bool = False, at: str = "") -> None:
    """What a browser shows of a page, as a PNG.

    Args:
        page: the file.
        image: the picture.
        width: of the window.
        height: of the window.
        dark: whether the browser prefers dark pages.
        at: what is behind the page's ``#``.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(find_browser(), *BROWSER_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"),
            *(("--blink-settings=preferredColorScheme=0",) if dark else ("--blink-settings=preferredColorScheme=1",)),
            *(f"--screenshot={image}", f"{page.resolve().as_uri()}#{at}"),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(arguments: Sequence[str]) -> None:
    """Makes the pictures."""
    folder = Path(arguments[0]) if arguments else IMAGES
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pages = {}
        for name, run in (("small", SMALL), ("large", LARGE), ("groups", GROUPS)):
            trace = record(run)
            pages[name] = Path(scratch) / f"{name}.html"
            pages[name].write_text(trace_page(PageHistory.of(trace), trace.header["started"]))
            if arguments:
                shutil.copy(pages[name], folder)
        if not arguments:
            take_picture(pages["small"], folder / "pages-64.png", 1360, 860, at="step=300&mode=state&page=20")
            take_picture(pages["large"], folder / "pages-64000.png", 1360, 1000, dark=True, at="step=1100&mode=request")
            return
        for name, steps in (("small", 300), ("large", 1100), ("groups", 300)):
            for size, (width, height) in (("wide", (1360, 1000)), ("narrow", (500, 1700))):
                for dark in (False, True):
                    mode = "state" if dark or name == "small" else "request" if name == "large" else "group"
                    image = folder / f"{name}-{size}-{'dark' if dark else 'light'}.png"
                    take_picture(pages[name], image, width, height, dark=dark, at=f"step={steps}&mode={mode}&page=20")


if __name__ == "__main__":
    main(sys.argv[1:])
