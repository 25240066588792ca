"""What a scheduler decides: a step while it is planned, a step as it is to run, and what must be copied before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.memory.decoding_rows import DecodingRows
from engine.memory.integers import Bool, Int32, Int64
from engine.memory.row_growth import RowGrowth
from engine.serving.request import Request


@dataclass(frozen=True)
class ScheduledRow:
    """One request's part of a step: ``count`` tokens from position ``start``.

    Attributes:
        is_decode: whether it feeds back a generated token.
        samples: whether its last token is the last one known, so that the next is to be chosen.
    """

    request: Request
    start: int
    count: int
    is_decode: bool
    samples: bool


@dataclass(frozen=True, eq=False)
class ScheduledStep:
    """A step's requests, and for each, ``[n]``, what it feeds; empty where nothing is to run.

    Attributes:
        requests: one a row of the batch.
        req_pool_idx: int32, their page-table rows.
        starts: int64, position of the first token fed.
        counts: int64, tokens fed.
        is_decode: whether a generated token is fed back.
        on_device: whether that token was sampled since the request was admitted, so that the device has it.
        samples: whether the next token is to be chosen.
        ends: whether that token is the last by the request's length.
        tenancies: int64, see ``RunningRows.tenancy``.
        num_tokens: tokens fed.
        num_decode_tokens: those of them that are generated ones, fed back.
        growth: where this is the step before it a token further: its rows in the page table, else None.
        parts: the steps of the replicas, where this is all of them, one after the other; else empty.
    """

    requests: Sequence[Request]
    req_pool_idx: Int32
    starts: Int64
    counts: Int64
    is_decode: Bool
    on_device: Bool
    samples: Bool
    ends: Bool
    tenancies: Int64
    num_tokens: int
    num_decode_tokens: int
    growth: DecodingRows | None = None
    parts: tuple[ScheduledStep, ...] = ()

    @property
    def rows(self) -> list[ScheduledRow]:
        """The same, an object a row."""
        columns = (self.starts, self.counts, self.is_decode, self.samples)
        parts = zip(self.requests, *(column.tolist() for column in columns), strict=True)
        return [ScheduledRow(*part) for part in parts]


@dataclass(frozen=True)
class PageCopy:
    """Pages of a replica, int32 ``[n]``, that the device must copy before the next step: answers share a prompt."""

    sources: Int32
    targets: Int32
    replica: int


@dataclass
class StepPlan:
    """A step while it is being planned: what running requests do, and whom it admits.

    Attributes:
        rows: int32 ``[n]`` of those who ran before.
        counts: int64 ``[n]`` tokens that they feed.
        growth: what that takes.
        may_admit: whether others may join.
        admitted: rows of those who have joined.
        chunks: tokens that these feed.
    """

    rows: Int32
    counts: Int64
    growth: RowGrowth
    may_admit: bool
    admitted: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
