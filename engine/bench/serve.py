"""Serves a seeded trace with a third of the pages that it can use: checks answers, utilisation, leaks and compiles.

The trace runs three times: in a pool without limit, to find how many pages it uses; in a third of that; and, one
request after the other, in a pool without limit, which gives the expected answers. Decoding is greedy in float32. XLA
splits matrix products by the number of rows, so logits differ in the last bits between batches. Where an answer differs
from the expected one, the logits of the two tokens must be so close that this explains it, and the case is counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.bench.timing import print_table
from engine.bench.trace import TraceRequest, TraceShape, load_trace, make_trace, save_trace
from engine.models.decoder import Decoder
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput
from engine.terminal import at_least, count, positive

# Twice the bound of the dense check: each of the two logits may differ by it.
NEAR_TIE = 2e-4
MOST_STEPS = 200_000


@dataclass(frozen=True)
class StepSample:
    """The pool after a step.

    Attributes:
        held_pages: pages that are neither free nor evictable.
        tail_waste_tokens: slots of last pages that hold no token yet.
        rows: number of running requests.
        waiting: number of waiting requests.
    """

    held_pages: int
    tail_waste_tokens: int
    rows: int
    waiting: int


@dataclass
class Served:
    """The results of a trace.

    Attributes:
        outputs: by index in the trace; without those of aborted requests.
        samples: one per step.
        seconds: time of all steps.
        compiles: programs compiled during the run.
    """

    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    samples: list[StepSample] = field(default_factory=list)
    seconds: float = 0.0
    compiles: int = 0

    @property
    def peak_pages(self) -> int:
        """Most pages held at once."""
        return max((sample.held_pages for sample in self.samples), default=0)


@dataclass(frozen=True)
class Bar:
    """One line of the result; only a line about correctness can make the command fail."""

    what: str
    value: str
    wanted: str
    holds: bool
    is_correctness: bool = True


def serve(llm: LLM, trace: Sequence[TraceRequest]) -> Served:
    """Runs a trace: adds and aborts requests at their steps.

    Requests that have not ended after ``MOST_STEPS`` steps are left unfinished.
    """
    served, compiles = Served(), llm.compiles_after_warmup
    now, started = 0, time.perf_counter()
    llm.scheduler.clock = lambda: float(now)
    coming = deque(sorted(enumerate(trace), key=lambda item: item[1].arrival))
    place: dict[int, int] = {}
    leaving: dict[int, list[int]] = {}
    while (coming or place) and now < MOST_STEPS:
        while coming and coming[0][1].arrival <= now:
            index, request = coming.popleft()
            request_id = llm.add_request(list(request.prompt), request.params())
            place[request_id] = index
            if request.abort_after is not None:
                leaving.setdefault(now + request.abort_after, []).append(request_id)
        for request_id in leaving.pop(now, []):
            if place.pop(request_id, None) is not None:
                llm.abort(request_id)
        for request_id, output in llm.step().items():
            served.outputs[place.pop(request_id)] = output
        served.samples.append(_sample(llm))
        now += 1
    served.seconds = time.perf_counter() - started
    served.compiles = llm.compiles_after_warmup - compiles
    return served


def expected_answers(llm: LLM, trace: Sequence[TraceRequest], wanted: Sequence[int]) -> dict[int, RequestOutput]:
    """The answers to some requests of a trace, served one after the other, with their logits."""
    answers = {}
    for index in wanted:
        params = TraceRequest(0, trace[index].prompt, trace[index].max_new_tokens).params()
        answers[index] = llm.generate([list(trace[index].prompt)], params, return_logits=True)[0]
    return answers


def compare(trace: Sequence[TraceRequest], served: Served, expected: dict[int, RequestOutput]) -> tuple[int, int, int]:
    """How many answers are exactly as expected, differ from a near tie on, and are wrong; siblings count too."""
    counts = {"exact": 0, "near": 0, "wrong": 0}
    for index, output in served.outputs.items():
        for answer in (output, *output.siblings):
            counts[_judge(answer, expected[index], trace[index])] += 1
    return counts["exact"], counts["near"], counts["wrong"]


def verdict(llm: LLM, trace: Sequence[TraceRequest], served: Served, expected: dict[int, RequestOutput]) -> list[Bar]:
    """Every bar of a run in the small pool."""
    stay = sum(request.abort_after is None for request in trace)
    ended = sum(index in served.outputs for index, request in enumerate(trace) if request.abort_after is None)
    exact, near, wrong = compare(trace, served, expected)
    pages = llm.metrics().pool
    full = utilisation(llm, served)
    waste, predicted = tail_waste(served), (llm.config.page_size - 1) / 2
    return [
        Bar("requests that were not aborted and ended", f"{ended} of {stay}", "all", ended == stay),
        Bar("answers as one by one without limit", f"{exact}, and {near} from a near tie on", "all", not wrong),
        Bar("pages held at the end", f"{pages.private_pages + pages.locked_pages}", "0", not llm.cache.held_tokens),
        Bar("programs compiled after warm-up", f"{served.compiles}", "0", not served.compiles),
        Bar("pool utilisation while requests wait", f"{full:.1%}", ">= 95 %", full >= 0.95, False),
        Bar(
            "tail waste per sequence, tokens",
            f"{waste:.2f}",
            f"{predicted:.2f} +- 15 %",
            abs(waste - predicted) <= 0.15 * predicted + 0.05,
            False,
        ),
    ]


def utilisation(llm: LLM, served: Served) -> float:
    """Mean fraction of the pool held by requests, over the steps after which requests waited and a slot was free."""
    total, slots = llm.cache.size // llm.config.page_size, llm.config.max_running_requests
    loaded = [now.held_pages / total for now in served.samples if now.waiting and now.rows < slots]
    return float(np.mean(loaded)) if loaded else 0.0


def tail_waste(served: Served) -> float:
    """Mean number of slots in a running sequence's last page that hold no token yet."""
    rows = sum(sample.rows for sample in served.samples)
    return sum(sample.tail_waste_tokens for sample in served.samples) / max(rows, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    shape = TraceShape()
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--requests", type=count, default=shape.requests, help=f"default {shape.requests}")
    parser.add_argument("--rate", type=positive, default=shape.rate, help=f"arrivals per step (default {shape.rate})")
    parser.add_argument("--page-size", type=count, default=16, help="tokens per page (default 16)")
    parser.add_argument("--slots", type=count, default=128, help="most running requests (default 128)")
    parser.add_argument("--host-tier-bytes", type=at_least(0), default=0, help="for pages given up (default 0)")
    parser.add_argument("--share", type=positive, default=1 / 3, help="of the pool it would like (default a third)")
    parser.add_argument("--variety", action="store_true", help="priorities, timeouts, several answers, tenants")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trace, JSON lines")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run a trace that was written")


def run(args: argparse.Namespace) -> None:
    """Runs the trace and prints each bar; returns 1 where an answer is wrong, missing, or a page was lost."""
    if args.replay:
        trace = load_trace(args.replay)
    else:
        trace = make_trace(TraceShape(requests=args.requests, rate=args.rate, variety=args.variety), args.seed)
    if args.save:
        save_trace(trace, args.save)
    options = {"page_size": args.page_size, "max_running_requests": args.slots, "chunked_prefill_size": 256}
    tight, served, bars = run_trace(
        trace, None, share=args.share, options=options, tight_options={"host_tier_bytes": args.host_tier_bytes}
    )
    metrics = tight.metrics()
    print(f"{len(trace)} requests, {tight.plan.describe()}")
    print(f"{len(served.samples)} steps in {served.seconds:.1f} s; {metrics.describe()}")
    rows = [[bar.what, bar.value, bar.wanted, _word(bar)] for bar in bars]
    print_table(("bar", "measured", "wanted", "verdict"), rows)
    if not all(bar.holds for bar in bars if bar.is_correctness):
        sys.exit(1)


def run_trace(
    trace: Sequence[TraceRequest],
    model: Decoder | None,
    *,
    share: float,
    options: dict[str, Any],
    tight_options: dict[str, Any],
) -> tuple[LLM, Served, list[Bar]]:
    """Runs a trace without limit, with a part of the pages that this run used, and one request after the other.

    Args:
        trace: the requests.
        model: the weights; None is the Llama that ships with the package.
        share: size of the small pool as a fraction of the most pages held without limit; it is made large enough for
            the largest request.
        options: options of every engine.
        tight_options: options of only the engine with the small pool.

    Returns:
        The engine with the small pool, its results, and the bars.
    """
    page_size = options["page_size"]
    ample = LLM(model, **options)
    wanted = serve(ample, trace).peak_pages
    largest = max(-(-(len(request.prompt) + request.max_new_tokens) // page_size) for request in trace)
    size = max(int(wanted * share), largest) * page_size
    tight = LLM(model, max_total_tokens=size, **options, **tight_options)
    served = serve(tight, trace)
    ample.reset_prefix_cache()
    expected = expected_answers(ample, trace, list(served.outputs))
    return tight, served, verdict(tight, trace, served, expected)


def _sample(llm: LLM) -> StepSample:
    metrics = llm.metrics()
    pool = metrics.pool
    held = pool.private_pages + pool.locked_pages
    return StepSample(held, pool.tail_waste_tokens, len(pool.rows), metrics.waiting)


def _judge(answer: RequestOutput, expected: RequestOutput, request: TraceRequest) -> str:
    got, right = answer.token_ids, expected.token_ids
    complete = len(got) == request.max_new_tokens or answer.finish_reason in ("timeout", "abort")
    if got == right[: len(got)]:
        return "exact" if complete else "wrong"
    at = next(index for index, (mine, theirs) in enumerate(zip(got, right, strict=False)) if mine != theirs)
    logits: npt.NDArray[np.float32] | None = expected.logits
    gap = np.inf if logits is None else float(logits[at, right[at]] - logits[at, got[at]])
    return "near" if complete and gap <= NEAR_TIE else "wrong"


def _word(bar: Bar) -> str:
    if bar.holds:
        return "ok"
    return "FAILED" if bar.is_correctness else "missed"
