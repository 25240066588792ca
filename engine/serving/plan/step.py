"""A step as it is decided: what each replica runs, what the device must copy before it; and a plan of one under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.memory.integers import Bool, Int32, Int64
from engine.memory.page_moves import PageMove
from engine.serving.request import Request


@dataclass(frozen=True)
class ScheduledRow:
    """One request's part of a step: ``count`` tokens from position ``start``.

    Attributes:
        is_decode: whether it feeds back a token that the device has sampled.
        samples: whether its last token is the last one known, so that the next is to be chosen.
    """

    request: Request
    start: int
    count: int
    is_decode: bool
    samples: bool


@dataclass(frozen=True, eq=False)
class SamplingColumns:
    """How the requests of some rows choose tokens, as in SamplingParams; ``[n]`` each.

    Attributes:
        top_k, seed, adjusts_until: int32; for the last see ``Request``.
        temperature, top_p: float32.
        wants_logprobs: bool.
    """

    top_k: Int32
    seed: Int32
    adjusts_until: Int32
    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    wants_logprobs: Bool

    @classmethod
    def of_rows(cls, rows: int) -> SamplingColumns:
        """Columns for ``rows`` rows, to be entered as requests come."""
        dtypes: list[npt.DTypeLike] = [*[np.int32] * 3, *[np.float32] * 2, np.bool_]
        return cls(*(np.zeros(rows, dtype) for dtype in dtypes))

    def enter(self, row: int, request: Request) -> None:
        """Enters the request that has got ``row``."""
        params = request.params
        self.top_k[row], self.seed[row], self.adjusts_until[row] = params.top_k, request.seed, request.adjusts_until
        self.temperature[row], self.top_p[row] = params.temperature, params.top_p
        self.wants_logprobs[row] = params.logprobs is not None

    def at(self, rows: Int32) -> SamplingColumns:
        """The columns of ``rows``, fresh."""
        return SamplingColumns(
            self.top_k[rows],
            self.seed[rows],
            self.adjusts_until[rows],
            self.temperature[rows],
            self.top_p[rows],
            self.wants_logprobs[rows],
        )


@dataclass(eq=False, slots=True)
class ReplicaStep:
    """The requests of one replica in a step, and for each, ``[n]``, what it feeds; empty where nothing is to run.

    Attributes:
        requests: one per row of the batch.
        req_pool_idx: int32, their page-table rows.
        starts: int64, position of the first token fed.
        counts: int64, tokens fed.
        on_device: whether the token fed was sampled since the request was admitted, so that the device has it.
        samples: whether the next token is to be chosen.
        ends: whether that token is the last by the request's length.
        generations: int64, see ``ReqToTokenPool.generations``: tell whether a row is still the request's.
        sampling: how the next tokens are chosen.
        new_pages: int32 places in the page table, and page ids there, that have not been sent to the device.
        membership: the row table's number, where these are all running requests in order of admission; else None.
        adjusts: whether the logits are adjusted from which the next token is chosen; None where no row's are.
        entered: requests that adjust their logits and got their row since the last step; they need not be in this one.
        repeats: whether this is the step before it, a token further.
    """

    requests: Sequence[Request]
    req_pool_idx: Int32
    starts: Int64
    counts: Int64
    on_device: Bool
    samples: Bool
    ends: Bool
    generations: Int64
    sampling: SamplingColumns
    new_pages: tuple[Int32, Int32]
    num_tokens: int
    num_decode_tokens: int
    membership: int | None
    adjusts: Bool | None = None
    entered: Sequence[Request] = ()
    repeats: bool = False

    def further(self, ends: Bool, new_pages: tuple[Int32, Int32]) -> ReplicaStep:
        """The same step a token further."""
        return ReplicaStep(
            self.requests,
            self.req_pool_idx,
            self.starts + 1,
            self.counts,
            self.on_device,
            self.samples,
            ends,
            self.generations,
            self.sampling,
            new_pages,
            self.num_tokens,
            self.num_decode_tokens,
            self.membership,
            self.adjusts,
            repeats=True,
        )

    @property
    def rows(self) -> list[ScheduledRow]:
        """The same, one object per row."""
        columns = (self.starts, self.counts, self.on_device, self.samples)
        rows = zip(self.requests, *(column.tolist() for column in columns), strict=True)
        return [ScheduledRow(*row) for row in rows]


@dataclass(eq=False, slots=True)
class ScheduledStep:
    """A step of every replica.

    Attributes:
        parts: the replicas' steps.
        moves: page moves that the device makes before it, in this order, each with the replica whose pages they are.
        num_tokens: tokens fed.
        num_decode_tokens: tokens fed that the device has sampled itself.
        admitted: the requests that were admitted when it was planned, also those that only wait with a row.
    """

    parts: Sequence[ReplicaStep]
    moves: Sequence[tuple[int, PageMove]]
    num_tokens: int
    num_decode_tokens: int
    admitted: Sequence[Request] = ()

    @property
    def adjusts(self) -> bool:
        """Whether any row chooses its next token by adjusted logits."""
        return any(part.adjusts is not None for part in self.parts)

    @property
    def has_entered(self) -> bool:
        """Whether the device is to be told of requests that adjust their logits."""
        return any(part.entered for part in self.parts)

    @property
    def requests(self) -> list[Request]:
        """The requests of all parts."""
        return [request for part in self.parts for request in part.requests]

    @property
    def rows(self) -> list[ScheduledRow]:
        """What every request of all parts does."""
        return [row for part in self.parts for row in part.rows]


@dataclass
class StepPlan:
    """A replica's step while it is being planned.

    Attributes:
        rows: int32 ``[n]`` of the requests that ran before.
        counts: int64 ``[n]`` tokens that they feed.
        is_all: whether these are all running requests, in order of admission.
        repeats: whether this is the step before it, a token further, unless others join.
        may_admit: whether other requests may join.
        admitted: rows of the requests that have joined.
        chunks: tokens that these feed.
    """

    rows: Int32
    counts: Int64
    is_all: bool = False
    repeats: bool = False
    may_admit: bool = True
    admitted: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
