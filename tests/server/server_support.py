"""A true server in a thread, over a true engine or over one whose answers a test writes itself."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import openai

from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.text import load_tokenizer
from engine.server.api_keys import read_keys
from engine.server.http_server import HttpServer
from engine.server.logprob_json import TokenNames
from engine.server.server_options import ServerOptions
from engine.server.service import Prepared, Service
from engine.serving.async_llm import AsyncLLM
from engine.serving.request import AnswerDelta, RequestOutput
from engine.serving.sampling_params import SamplingParams

SECONDS = 30  # after which a test that waits has failed


class Running:
    """A server in a thread of its own."""

    def __init__(self, make_engine, options, template=None):
        self.options = ServerOptions(port=0, **options)
        self.code = self.service = None
        self._make_engine, self._template = make_engine, template
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self):
        self.loop = asyncio.get_running_loop()
        engine = self._make_engine()
        keys = read_keys(self.options)
        self.service = Service(
            engine, Prepared(self.options, keys, "default", self._template), TokenNames(engine.tokenizer)
        )
        with self.options.bind(has_keys=bool(keys)) as bound:
            self.port = bound.getsockname()[1]
            self._server = HttpServer(self.service, bound, lambda url: self._ready.set())
            self.code = await self._server.run()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(SECONDS)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.stop()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def stop(self):
        """Begins to stop it, as a signal does."""
        if self._thread.is_alive():
            self.call(self._server.stop)

    def connections(self):
        """The connections that uvicorn has."""
        return self._server._server.server_state.connections

    def call(self, function, *arguments):
        """Calls a function on the server's loop."""
        done = threading.Event()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
            done.wait(SECONDS)


def over(llm, template=None, **options):
    """A server over a true engine."""
    server = Running(lambda: AsyncLLM.over(llm, max_waiting=options.get("max_waiting", 256)), options, template)
    server.engine = llm
    return server


class FakeAnswering:
    """An answer that a test writes."""

    def __init__(self, prompt, params):
        self.prompt, self.params = prompt, params
        self.prompt_tokens, self.cached_tokens = len(prompt), 0
        self.is_aborted = self.is_over = False
        self._gained, self._news = [], asyncio.Event()
        self._tokens, self._text = [], ""

    def give(self, text="", tokens=(), finish=None, logprobs=None):
        self._gained.append(AnswerDelta(tuple(tokens), text, logprobs, 0, finish))
        self._tokens += tokens
        self._text += text
        self.is_over = self.is_over or finish is not None
        self._news.set()

    def fail(self, error):
        self._gained.append(error)
        self._news.set()

    async def __aiter__(self):
        while self._gained or not self.is_over:
            await self._news.wait()
            self._news.clear()
            gained, self._gained = self._gained, []
            for each in gained:
                if isinstance(each, Exception):
                    raise each
            yield tuple(gained)
            if self.is_over and not self._gained:
                return

    async def result(self):
        last = None
        async for deltas in self:
            last = deltas[-1].finish_reason
        return RequestOutput(self.prompt, self._tokens, self._text, last)

    def abort(self):
        self.is_aborted = self.is_aborted or not self.is_over


class FakeEngine:
    """What the server needs of an AsyncLLM; ``answer`` is called with each answer, which it may write, or not."""

    def __init__(self, answer=lambda answering: answering.give("done", (1, 2, 3, 4), "stop")):
        self.answer, self.answerings, self.is_healthy, self.refusal = answer, [], True, None
        self.tokenizer = load_tokenizer(DEFAULT_MODEL_DIR)
        self.config = SimpleNamespace(max_running_requests=8)
        self.plan = SimpleNamespace(
            context_length=64, pages=100, replicas=1, demand=SimpleNamespace(most_tokens=lambda pages, most: most)
        )

    async def submit(self, prompt, params=None, *, streams=True):
        if self.refusal is not None:
            raise self.refusal
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        answering = FakeAnswering(list(tokens), params or SamplingParams())
        self.answerings.append(answering)
        self.answer(answering)
        return answering

    def metrics(self):
        raise AssertionError("not scraped here")

    async def close(self, drain=True, timeout=None):
        for answering in self.answerings:
            if not answering.is_over:
                answering.give(finish="abort")


@contextlib.contextmanager
def faked(answer=None, template=None, **options):
    """A server over an engine that is faked, and that engine."""
    made = []

    def make():
        made.append(FakeEngine(answer) if answer else FakeEngine())
        return made[0]

    with Running(make, options, template) as server:
        yield server, made[0]


def exchange(server, method="POST", path="/v1/completions", body=None, headers=(), raw=None):
    """Sends one request and reads all of the answer: status, headers, body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(request_bytes(method, path, body, headers) if raw is None else raw)
        return parsed(read_all(connection))


def connect(server, content=b""):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    connection.sendall(content)
    return connection


def request_bytes(method="POST", path="/v1/completions", body=None, headers=(), close=True):
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(content)}", *headers]
    if close:
        lines.append("Connection: close")
    if body is not None and not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def read_all(connection):
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def parsed(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return int(first.split()[1]), headers, body


def unchunked(body):
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        whole, body = whole + body[:length], body[length + 2 :]
    return whole


def events(body):
    """The events of a stream: JSON values, and the last as its text."""
    datas = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def until(condition):
    """Waits until something is so."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def client_of(server, **options):
    """The openai package's client, which tries once."""
    with openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0} | options) as client:
        yield client
