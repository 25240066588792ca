"""Clients of the server over plain sockets: cheap enough that hundreds of them fit beside the server on two cores.

As clients in use do, a client that behaves keeps its connection for its next request.
"""

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
        self._idle: list[Streams] = []
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
            async with self._kept() as (reader, writer):
                writer.write(_request(job.body(stream=streams), keeps=True))
                status, length = await _head(reader)
                if status == 200 and streams:
                    text = await self._read_events(reader, begun)
                else:
                    content = await reader.readexactly(length)
            if status != 200:
                self.seen.refused[status] += 1
                if status == 429:
                    await asyncio.sleep(0.2)
                return
            if not streams:
                text = json.loads(content)["choices"][0]["text"]
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

    async def close(self) -> None:
        """Closes the connections that were kept."""
        while self._idle:
            _, writer = self._idle.pop()
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    @asynccontextmanager
    async def _kept(self) -> AsyncIterator[Streams]:
        """A connection that another request may have had; it is kept where its response was read to the end."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                break
            writer.transport.abort()
        else:
            reader, writer = await asyncio.open_connection(*self._place, limit=READ_BYTES)
        try:
            yield reader, writer
        except BaseException:
            writer.transport.abort()
            raise
        self._idle.append((reader, writer))

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


def _request(body: bytes, *, keeps: bool = False) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return (head if keeps else f"{head}Connection: close\r\n").encode() + b"\r\n" + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, int]:
    """The status of a response and the length of its body, 0 where it is chunked; the reader is at the body then."""
    status, *fields = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    lengths = [int(field.removeprefix(b"content-length:")) for field in fields if field.startswith(b"content-length:")]
    return int(status.split(b" ", 2)[1]), sum(lengths)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event of a chunked response, to its end, which must come behind the event that says so."""
    waiting, is_done = b"", False
    while size := int(await reader.readline(), 16):
        waiting += (await reader.readexactly(size + 2))[:-2]
        *complete, waiting = waiting.split(b"\n\n")
        for event in complete:
            data = event.removeprefix(EVENT)
            if data == b"[DONE]":
                is_done = True
            else:
                yield data
    await reader.readline()
    if not is_done:
        raise ValueError("the stream has ended before its last event")
