"""Clients of the server over plain sockets: cheap enough that hundreds of them fit beside the server on two cores."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.serving.sampling_params import SamplingParams

PATH = "/v1/completions"
MODEL = "default"
READ_BYTES = 2**16
STALL_READ_BYTES = 4096  # so that a stalled answer fills the sockets soon
EVENT = b"data: "
MISDEEDS = ("hang-up", "stall", "half-open", "rubbish")
PATIENCE = 1.0, 8.0  # seconds from and to which a client stalls
STALLED = SamplingParams(max_new_tokens=200, n=2, temperature=1.0, logprobs=5)  # an answer that fills the sockets
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Job:
    """A prompt and how long its answer is.

    Attributes:
        index: its place among the expected answers.
        prompt: token ids.
        tokens: of the answer.
    """

    index: int
    prompt: list[int]
    tokens: int

    def body(self, **changes: Any) -> bytes:
        """The request: a greedy answer of just so many tokens."""
        asked = {"model": MODEL, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
        return json.dumps(asked | changes).encode()


@dataclass
class Seen:
    """What clients have seen.

    Attributes:
        answers: the job of each complete answer, and its text.
        first: seconds until the first text, per streamed answer.
        between: seconds between two pieces of text.
        whole: seconds until the end, per answer.
        tokens: of the complete answers.
        refused: responses other than 200, by status.
        faults: what went wrong with well-behaved clients.
        left: clients that left in mid-answer, stalled, half-opened or sent rubbish, by kind.
    """

    answers: list[tuple[int, str]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)


class Clients:
    """Clients of one server.

    Args:
        host, port: the server.
        jobs: what they ask for.
        seen: what they have seen.
    """

    def __init__(self, host: str, port: int, jobs: Sequence[Job], seen: Seen) -> None:
        self._place = host, port
        self._jobs = jobs
        self.seen = seen
        self._misdeeds = dict(zip(MISDEEDS, (self.hang_up, self.stall, self.half_open, self.send_rubbish), strict=True))

    async def ask_any(self, rng: np.random.Generator) -> None:
        """Asks for the streamed answer to some job."""
        await self.ask(self._drawn(rng), streams=True)

    async def misbehave(self, rng: np.random.Generator) -> None:
        """Does one of the things that no client should."""
        kind = str(rng.choice(MISDEEDS))
        with suppress(OSError):  # it was cut off, which is right
            await self._misdeeds[kind](rng, self._drawn(rng))
        self.seen.left[kind] += 1

    async def ask(self, job: Job, *, streams: bool) -> None:
        """Asks for an answer, reads it to its end, and notes what it saw."""
        begun = time.perf_counter()
        try:
            async with self._sent(job.body(stream=streams)) as (reader, _):
                status = await _status(reader)
                if status != 200:
                    self.seen.refused[status] += 1
                    if status == 429:
                        await asyncio.sleep(0.2)
                    return
                text = await (self._read_events(reader, begun) if streams else _whole_text(reader))
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.seen.faults.append(repr(error))
            return
        self.seen.whole.append(time.perf_counter() - begun)
        self.seen.answers.append((job.index, text))
        self.seen.tokens += job.tokens

    async def hang_up(self, rng: np.random.Generator, job: Job) -> None:
        """Leaves after some pieces of the answer."""
        async with self._sent(job.body(stream=True)) as (reader, _):
            for _ in range(int(rng.integers(0, 12))):
                await reader.read(READ_BYTES)

    async def stall(self, rng: np.random.Generator, job: Job) -> None:
        """Asks for an answer that is as large as can be, and reads nothing of it until it is cut off or tired of it."""
        asked = {name: getattr(STALLED, name) for name in ("n", "temperature", "logprobs")}
        body = job.body(stream=True, max_tokens=STALLED.max_new_tokens, **asked)
        async with self._sent(body, limit=STALL_READ_BYTES):
            await asyncio.sleep(rng.uniform(*PATIENCE))

    async def half_open(self, rng: np.random.Generator, job: Job) -> None:
        """Sends half a request and waits."""
        async with self._connected() as (_, writer):
            request = _request(job.body())
            writer.write(request[: int(rng.integers(1, len(request)))])
            await asyncio.sleep(rng.uniform(*PATIENCE))

    async def send_rubbish(self, rng: np.random.Generator, job: Job) -> None:
        """Sends what no request can be; anything but a refusal or a closed connection is a fault."""
        rubbish = [
            _request(b"{" + rng.bytes(40)),
            _request(job.body(temperature="hot")),
            _request(job.body(model="another")),
            _request(job.body(prompt=[10**9])),
            rng.bytes(200) + b"\r\n\r\n",
        ]
        async with self._connected() as (reader, writer):
            writer.write(rubbish[int(rng.integers(len(rubbish)))])
            line = await asyncio.wait_for(reader.readline(), 60)
            if line and not line.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 503")):
                self.seen.faults.append(f"rubbish was answered {line!r}")

    async def _read_events(self, reader: asyncio.StreamReader, begun: float) -> str:
        """The text of a stream; notes when its pieces come."""
        last, text = begun, list[str]()
        async for event in _events(reader):
            now = time.perf_counter()
            piece = json.loads(event)["choices"][0]
            if not text:
                self.seen.first.append(now - begun)
            else:
                self.seen.between.append(now - last)
            last = now
            text.append(piece["text"])
        return "".join(text)

    def _drawn(self, rng: np.random.Generator) -> Job:
        return self._jobs[int(rng.integers(len(self._jobs)))]

    @asynccontextmanager
    async def _connected(self, limit: int = READ_BYTES) -> AsyncIterator[Streams]:
        reader, writer = await asyncio.open_connection(*self._place, limit=limit)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    @asynccontextmanager
    async def _sent(self, body: bytes, limit: int = READ_BYTES) -> AsyncIterator[Streams]:
        async with self._connected(limit) as (reader, writer):
            writer.write(_request(body))
            yield reader, writer


def _request(body: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of a response, behind whose head the reader is then."""
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1])


async def _whole_text(reader: asyncio.StreamReader) -> str:
    text: str = json.loads(await reader.read(-1))["choices"][0]["text"]
    return text


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event of a chunked response, up to the event that says it is done."""
    waiting = b""
    while True:
        size = int(await reader.readline(), 16)
        if not size:
            raise ValueError("the stream has ended before its last event")
        waiting += (await reader.readexactly(size + 2))[:-2]
        *complete, waiting = waiting.split(b"\n\n")
        for event in complete:
            data = event.removeprefix(EVENT)
            if data == b"[DONE]":
                return
            yield data
