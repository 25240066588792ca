"""A trace of requests: made from a seed, saved, and replayed. Time is counted in steps, so it is the same everywhere.

The file is JSON lines: a header, then one request per line.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import ConfigError, EngineError
from engine.serving.sampling_params import SamplingParams

FORMAT, VERSION = "engine-trace", 1


@dataclass(frozen=True)
class TraceRequest:
    """One request.

    Attributes:
        arrival: step at which it arrives.
        prompt: token ids.
        max_new_tokens: how many tokens it generates; an end token does not stop it.
        abort_after: steps from its arrival to its abort; None: it is not aborted.
        n: number of answers.
        priority: as in SamplingParams.
        timeout: in steps; None: no timeout.
        tenant_salt: as in SamplingParams.
    """

    arrival: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    abort_after: int | None = None
    n: int = 1
    priority: int = 0
    timeout: int | None = None
    tenant_salt: str = ""

    def __post_init__(self) -> None:
        """Checks every value; raises ConfigError."""
        counts = (self.arrival, *self.prompt, *(() if self.abort_after is None else (self.abort_after,)))
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in counts):
            raise ConfigError(f"arrival, abort_after and token ids must be whole numbers from 0; got {counts[:8]}")
        try:
            self.params()
        except EngineError as error:
            raise ConfigError(f"a request of the trace is wrong: {error}") from error

    def params(self) -> SamplingParams:
        """Greedy sampling with this request's values; its timeout counts seconds of a clock with one tick per step."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            ignore_eos=True,
            n=self.n,
            priority=self.priority,
            timeout=self.timeout,
            tenant_salt=self.tenant_salt,
        )


@dataclass(frozen=True)
class TraceShape:
    """The distribution that a trace is drawn from.

    Attributes:
        requests: number of requests.
        rate: mean arrivals per step (Poisson).
        prompt_tokens: median of the log-normal length of a prompt's own part.
        new_tokens: median of the log-normal length of an answer.
        spread: sigma of both lengths.
        prefixes: number of shared beginnings; half of the prompts have one.
        prefix_tokens: tokens of each shared beginning.
        aborts: fraction of requests that are aborted.
        longest: most tokens of prompt and answer together.
        vocabulary: token ids are below it.
        variety: also draw priorities, timeouts, several answers and tenants.
    """

    requests: int = 250
    rate: float = 2.0
    prompt_tokens: int = 60
    new_tokens: int = 50
    spread: float = 0.7
    prefixes: int = 4
    prefix_tokens: int = 100
    aborts: float = 0.1
    longest: int = 512
    vocabulary: int = 256
    variety: bool = False


def make_trace(shape: TraceShape, seed: int) -> list[TraceRequest]:
    """Draws a trace; equal arguments give equal traces."""
    rng = np.random.default_rng(seed)
    arrivals = np.floor(rng.exponential(1 / shape.rate, shape.requests).cumsum()).astype(int)
    prefixes = rng.integers(0, shape.vocabulary, (shape.prefixes, shape.prefix_tokens)).tolist()
    requests = []
    for arrival in arrivals.tolist():
        shared = prefixes[rng.integers(shape.prefixes)] if shape.prefixes and rng.random() < 0.5 else []
        new = int(np.clip(rng.lognormal(np.log(shape.new_tokens), shape.spread), 1, shape.longest // 2))
        own = int(rng.lognormal(np.log(shape.prompt_tokens), shape.spread))
        own = int(np.clip(own, 1, shape.longest - new - len(shared)))
        aborted = rng.random() < shape.aborts
        request = TraceRequest(
            arrival=arrival,
            prompt=(*shared, *rng.integers(0, shape.vocabulary, own).tolist()),
            max_new_tokens=new,
            abort_after=int(rng.integers(0, 2 * new)) if aborted else None,
        )
        requests.append(_varied(request, rng) if shape.variety else request)
    return requests


def save_trace(trace: list[TraceRequest], path: Path) -> None:
    """Writes a trace."""
    header = {"format": FORMAT, "version": VERSION, "requests": len(trace)}
    lines = [json.dumps(header), *(json.dumps(dataclasses.asdict(request)) for request in trace)]
    path.write_text("\n".join(lines) + "\n")


def load_trace(path: Path) -> list[TraceRequest]:
    """Reads a trace back, equal to what was saved.

    Raises:
        ConfigError: the file cannot be read, is not a trace of this version, or a line is wrong.
    """
    try:
        header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        if (header["format"], header["version"]) != (FORMAT, VERSION) or header["requests"] != len(lines):
            raise ConfigError(f"{path} is not a whole {FORMAT} of version {VERSION}; save it again with --save")
        return [TraceRequest(**{**line, "prompt": tuple(line["prompt"])}) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read a trace from {path}: {error}; save it again with --save") from error


def _varied(request: TraceRequest, rng: np.random.Generator) -> TraceRequest:
    return dataclasses.replace(
        request,
        n=int(rng.choice([1, 1, 1, 2, 3])),
        priority=int(rng.integers(-2, 3)),
        timeout=int(rng.integers(20, 400)) if rng.random() < 0.2 else None,
        tenant_salt=str(rng.choice(["", "", "a", "b"])),
    )
