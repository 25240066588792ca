"""The HTTP server under load: what it costs beside ``generate``, and a crowd of which a fifth misbehaves.

Two parts, each against a server in a process of its own with the model that ships:

cost    32 clients in a closed loop, streaming and not, in turn with ``LLM.generate`` of as many such requests in this
        process: tokens per second, median of ratios. The clients run on the same cores as the server.
crowd   hundreds of streaming clients for minutes; a fifth hang up, stall, open half a request or send rubbish. In turn
        with the same crowd without that fifth, and before it the same requests through ``AsyncLLM`` in this process,
        which is the engine's queue without HTTP. Every answer that ended equals the one of ``generate``, but for near
        ties of two logits, which are counted; no page is held at the end; memory and descriptors are flat.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from engine.bench.server_clients import MISDEEDS, MODEL, PATIENCE, STALLED, Clients, Job, Seen
from engine.bench.server_process import ServerProcess, running_server
from engine.bench.timing import print_table
from engine.serving.async_llm import AsyncLLM
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput
from engine.serving.sampling_params import SamplingParams
from engine.terminal import at_least, count, positive

JOBS = 96
PROMPT_TOKENS, ANSWER_TOKENS = (8, 200), (16, 65)
RUNNING, CONTEXT = 32, 512
COST_CLIENTS, COST_REQUESTS = 32, 128
BAD_SHARE = 5  # one client in so many misbehaves
CLIENT_TIMEOUT = 3.0  # seconds, so that the server cuts off what stalls while the bench looks
SAMPLE_SECONDS = 1.0
SETTLE_SECONDS = 30.0
NEAR_TIE = 2e-4  # twice what a logit differs by between batches
Ask = Callable[[np.random.Generator], Coroutine[Any, Any, None]]
ENGINE = ["--max-running-requests", str(RUNNING), "--context-length", str(CONTEXT)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--model", help="the model's folder (default: the small Llama that ships)")
    parser.add_argument("--clients", type=at_least(5), default=256, help="clients of the crowd")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=300.0,
        help="how long the crowd that misbehaves stays; the others stay a third of it",
    )
    parser.add_argument("--rounds", type=count, default=5, help="rounds of the cost")
    parser.add_argument("--rate", type=positive, help="requests per second of an open loop, in place of the closed one")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Runs both parts; returns 1 where an answer is wrong, a page stays held, or memory or descriptors grow."""
    llm = LLM(args.model, max_running_requests=RUNNING, context_length=CONTEXT)
    jobs = make_jobs(llm, args.seed)
    expected = Expected(llm, jobs)
    waiting = ["--max-waiting", str(4 * args.clients), "--max-connections", str(4 * args.clients)]
    name = ["--served-model-name", MODEL, *(["--model", args.model] if args.model else [])]
    with running_server([*ENGINE, *name, *waiting, "--client-timeout", str(CLIENT_TIMEOUT)]) as server:
        print_cost(llm, server, jobs, args.rounds)
        offline = asyncio.run(crowd_without_http(llm, jobs, args))
        behaved = asyncio.run(crowd(server, jobs, args, bad=False))
        mixed = asyncio.run(crowd(server, jobs, args, bad=True))
    return report(offline, behaved, mixed, expected)


def make_jobs(llm: LLM, seed: int) -> list[Job]:
    """Random prompts of random lengths."""
    rng = np.random.default_rng(seed)
    vocab = llm.model.config.vocab_size - 8  # without special tokens at the end
    return [
        Job(index, rng.integers(0, vocab, rng.integers(*PROMPT_TOKENS)).tolist(), int(rng.integers(*ANSWER_TOKENS)))
        for index in range(JOBS)
    ]


class Expected:
    """The right answers, and where another one may be right as well.

    Args:
        llm: answers the jobs one by one.
        jobs: what is asked for.
    """

    def __init__(self, llm: LLM, jobs: Sequence[Job]) -> None:
        self._llm = llm
        self._outputs: list[RequestOutput] = []
        for job in jobs:
            self._outputs += llm.generate([job.prompt], params_of(job), return_logits=True)

    def judge(self, answers: Sequence[tuple[int, str]]) -> tuple[int, int, int]:
        """How many answers are exact, differ from a near tie on, and are wrong."""
        exact = near = 0
        for index, text in answers:
            output = self._outputs[index]
            if text == output.text:
                exact += 1
            else:
                near += self._is_near(output, text)
        return exact, near, len(answers) - exact - near

    def _is_near(self, output: RequestOutput, text: str) -> bool:
        """Whether the two best tokens were all but equally likely where a text leaves the expected one."""
        tokenizer = self._llm.tokenizer
        if tokenizer is None or output.logits is None:
            return False
        places = range(len(output.token_ids) + 1)
        texts = [tokenizer.decode(output.token_ids[:place], prompt=output.prompt_token_ids) for place in places]
        agreed = max(place for place in places if text.startswith(texts[place].rstrip("\ufffd")))
        best = np.sort(output.logits[max(agreed - 3, 0) : agreed + 1], axis=-1)  # a character may have four tokens
        return bool((best[:, -1] - best[:, -2] < NEAR_TIE).any())


def params_of(job: Job) -> SamplingParams:
    """What ``Job.body`` asks for."""
    return SamplingParams(max_new_tokens=job.tokens, ignore_eos=True)


def print_cost(llm: LLM, server: ServerProcess, jobs: Sequence[Job], rounds: int) -> None:
    """Prints tokens per second through HTTP beside those of ``generate``, in turn."""
    asked = [jobs[index % len(jobs)] for index in range(COST_REQUESTS)]
    tokens = sum(job.tokens for job in asked)
    ways = {
        "generate": lambda: llm.generate([job.prompt for job in asked], [params_of(job) for job in asked]),
        "HTTP, whole answers": lambda: asyncio.run(_ask_all(server, asked, streams=False)),
        "HTTP, streams": lambda: asyncio.run(_ask_all(server, asked, streams=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    rows = []
    for name, each in seconds.items():
        ratio = median(own / other for own, other in zip(seconds["generate"], each, strict=True))
        rows.append((name, f"{tokens / median(each):,.0f}", f"{ratio:.2f}"))
    print_table((f"{COST_REQUESTS} requests, {COST_CLIENTS} clients", "tokens/s", "of generate"), rows)
    print()


async def _ask_all(server: ServerProcess, jobs: Sequence[Job], *, streams: bool) -> None:
    clients, left = Clients(server.host, server.port, jobs, Seen()), list(jobs)

    async def client() -> None:
        while left:
            await clients.ask(left.pop(), streams=streams)

    await asyncio.gather(*(client() for _ in range(COST_CLIENTS)))
    await clients.close()
    if clients.seen.faults or clients.seen.refused:
        raise RuntimeError(f"not every request was answered: {clients.seen.faults} {clients.seen.refused}")


@dataclass
class Crowd:
    """What came of a crowd.

    Attributes:
        name: of the crowd.
        seen: what its clients saw.
        seconds: how long it was there.
        held_pages: pages held when all had gone.
        memory, descriptors: of the server, a sample each second.
        step_p99: seconds within which 99 of 100 steps ended, as finely as the server's histogram tells.
    """

    name: str
    seen: Seen
    seconds: float
    held_pages: int
    memory: Sequence[int] = ()
    descriptors: Sequence[int] = ()
    step_p99: float = float("nan")


async def crowd_without_http(llm: LLM, jobs: Sequence[Job], args: argparse.Namespace) -> Crowd:
    """The crowd of which a fifth misbehaves as coroutines over ``AsyncLLM``, for a third of the time."""
    seen, seconds = Seen(), args.seconds / 3
    async with AsyncLLM.over(llm) as engine:

        async def ask(rng: np.random.Generator) -> None:
            job = jobs[int(rng.integers(len(jobs)))]
            begun, first = time.perf_counter(), 0.0
            async for _ in engine.stream(job.prompt, params_of(job)):
                first = first or time.perf_counter()
            seen.first.append(first - begun)
            seen.whole.append(time.perf_counter() - begun)
            seen.tokens += job.tokens

        async def misbehave(rng: np.random.Generator) -> None:
            """What the engine has of a client that does: the same requests, and as little reading."""
            job, kind = jobs[int(rng.integers(len(jobs)))], rng.choice(list(MISDEEDS))
            if kind == "hang-up":
                answering = await engine.submit(job.prompt, params_of(job))
                async for _ in answering:
                    if rng.random() < 1 / 6:
                        break
            elif kind == "stall":
                answering = await engine.submit(job.prompt, STALLED)
                await asyncio.sleep(rng.uniform(*PATIENCE))
                answering.abort()
            elif kind == "half-open":
                await asyncio.sleep(rng.uniform(*PATIENCE))

        behaving = args.clients - args.clients // BAD_SHARE
        async with asyncio.TaskGroup() as group:
            group.create_task(load(ask, args, seconds, behaving))
            group.create_task(closed_loop(misbehave, args.seed + 1, seconds, args.clients - behaving))
    return Crowd("AsyncLLM, no HTTP", seen, seconds, llm.cache.held_tokens // llm.config.page_size)


async def crowd(server: ServerProcess, jobs: Sequence[Job], args: argparse.Namespace, *, bad: bool) -> Crowd:
    """A crowd of clients of the server; waits until what it has left behind is gone."""
    seconds = args.seconds if bad else args.seconds / 3
    clients, before = Clients(server.host, server.port, jobs, Seen()), server.figures()
    watching = asyncio.create_task(_watch(server))
    behaving = args.clients - args.clients // BAD_SHARE
    async with asyncio.TaskGroup() as group:
        group.create_task(load(clients.ask_any, args, seconds, behaving))
        if bad:
            group.create_task(closed_loop(clients.misbehave, args.seed + 1, seconds, args.clients - behaving))
    await clients.close()
    watching.cancel()
    memory, descriptors = await watching
    held = await _settled(server)
    steps = _quantile_bound(before, server.figures(), "engine_step_time_seconds", 0.99)
    name = "a fifth misbehaves" if bad else "all behave"
    return Crowd(name, clients.seen, seconds, held, memory, descriptors, steps)


async def load(ask: Ask, args: argparse.Namespace, seconds: float, clients: int | None = None) -> None:
    """Asks in the loop that was chosen, for some seconds; returns when all is answered."""
    if args.rate is None:
        await closed_loop(ask, args.seed, seconds, clients or args.clients)
        return
    rng, until = np.random.default_rng(args.seed), time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        while time.perf_counter() < until:
            await asyncio.sleep(rng.exponential(1 / args.rate))
            group.create_task(ask(rng))


async def closed_loop(ask: Ask, seed: int, seconds: float, clients: int) -> None:
    """So many clients, each of which asks again as soon as it is answered, for some seconds."""
    until = time.perf_counter() + seconds

    async def client(rng: np.random.Generator) -> None:
        while time.perf_counter() < until:
            await ask(rng)

    await asyncio.gather(*map(client, np.random.default_rng(seed).spawn(clients)))


async def _watch(server: ServerProcess) -> tuple[list[int], list[int]]:
    """The server's memory and descriptors, a sample each second, until it is cancelled."""
    memory, descriptors = [], []
    try:
        while True:
            memory.append(server.resident_bytes())
            descriptors.append(server.descriptors())
            await asyncio.sleep(SAMPLE_SECONDS)
    except asyncio.CancelledError:
        return memory, descriptors


async def _settled(server: ServerProcess) -> int:
    """Pages that are still held when the server has had time to notice who has gone."""
    until = time.perf_counter() + SETTLE_SECONDS
    while (held := await asyncio.to_thread(server.held_pages)) and time.perf_counter() < until:
        await asyncio.sleep(0.2)
    return held


def _quantile_bound(before: dict[str, float], after: dict[str, float], name: str, share: float) -> float:
    """The least bound of a histogram's buckets below which such a share of what came in between lies."""
    total = after[f"{name}_count"] - before[f"{name}_count"]
    bounds = [key for key in after if key.startswith(f"{name}_bucket")]
    counts = {float(key.split('"')[1]): after[key] - before[key] for key in bounds}
    return min(bound for bound, below in counts.items() if below >= share * total)


def report(offline: Crowd, behaved: Crowd, mixed: Crowd, expected: Expected) -> int:
    """Prints what came of the crowds; returns 1 where something is wrong."""
    shown = [(what, percent) for what in ("first", "between", "whole") for percent in (50, 90, 99)]
    columns = ("crowd; times in ms", "answers", "tokens/s", *(f"{what} p{percent}" for what, percent in shown))
    rows = []
    for each in (offline, behaved, mixed):
        times = [_percentile(getattr(each.seen, what), percent) for what, percent in shown]
        rows.append((each.name, f"{len(each.seen.whole):,}", f"{each.seen.tokens / each.seconds:,.0f}", *times))
    print_table(columns, rows)
    print()
    bars = [bar for each in (behaved, mixed) for bar in _bars(each, expected)]
    ratio, steps = _p99(mixed.seen.first) / _p99(offline.seen.first), (mixed.step_p99, behaved.step_p99)
    goals = [
        ("p99 of the first token, of the queue alone", f"{ratio:.2f}", "at most 1.5", ratio <= 1.5),
        ("p99 of steps, misbehaving or not", "{:g} s and {:g} s".format(*steps), "not above", steps[0] <= steps[1]),
    ]
    table = [(what, measured, wanted, "" if holds else "NO") for what, measured, wanted, holds in (*bars, *goals)]
    print_table(("what", "measured", "wanted", "holds"), table)
    return 0 if all(bar[3] for bar in bars) else 1  # machines are noisy: no time makes the command fail


def _bars(each: Crowd, expected: Expected) -> list[tuple[str, str, str, bool]]:
    exact, near, wrong = expected.judge(each.seen.answers)
    faults, refused = each.seen.faults, sum(each.seen.refused.values())
    left = ", ".join(f"{count} {kind}" for kind, count in sorted(each.seen.left.items()))
    memory, descriptors = _growth(each.memory), _growth(each.descriptors)
    return [
        (f"{each.name}: answers", f"{exact:,} exact, {near} near ties, {wrong} wrong; {left}", "0 wrong", not wrong),
        ("faults, refusals", f"{len(faults)} {faults[:3]}, {refused}", "0, 0", not faults and not refused),
        ("pages held at the end", str(each.held_pages), "0", not each.held_pages),
        ("memory, last third of first", f"{memory:.3f}", "at most 1.05", memory <= 1.05),
        ("descriptors, last third of first", f"{descriptors:.3f}", "at most 1.1", descriptors <= 1.1),
    ]


def _growth(samples: Sequence[int]) -> float:
    """The median of the last third of some samples over that of the first, whose first tenth is warm-up."""
    tenth, third = len(samples) // 10, max(1, len(samples) // 3)
    return median(samples[-third:]) / median(samples[tenth : tenth + third])


def _percentile(values: Sequence[float], percent: float) -> str:
    return f"{np.percentile(values, percent) * 1e3:,.1f}" if values else ""


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else float("nan")
