"""What is planned for each running request: arrays by page-table row, so that planning a step loops over no request.

What is *planned* runs ahead of what is *committed*: a step is planned while the one before it runs, when the tokens
that it samples are not known yet. Committed tokens are in ``Request``; here is how many there will be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from engine.memory.integers import Bool, Int32, Int64
from engine.serving.plan.step import ScheduledStep
from engine.serving.request import Request


class RunningRows:
    """Plans by ``req_pool_idx``, int64 ``[rows]`` each, but float64 ``rank``.

    Attributes:
        known: tokens, those included that steps under way will sample.
        scheduled: tokens whose keys and values the pool holds once the steps under way have run.
        limit: tokens when the request ends by its length.
        prompt: tokens of the prompt.
        admitted: tokens known when it was admitted; the device chose the later ones itself and has the last of them.
        rank, request_id: who is served first, see ``Request.rank``.
        tenancy: how many requests have given the row back: tells a request's steps from those of the next.
    """

    def __init__(self, rows: int) -> None:
        self.known = np.zeros(rows, np.int64)
        self.scheduled = np.zeros(rows, np.int64)
        self.limit = np.zeros(rows, np.int64)
        self.prompt = np.zeros(rows, np.int64)
        self.admitted = np.zeros(rows, np.int64)
        self.rank = np.zeros(rows, np.float64)
        self.request_id = np.zeros(rows, np.int64)
        self.tenancy = np.zeros(rows, np.int64)
        self.requests: list[Request] = []  # in order of admission
        self._by_row: list[Request | None] = [None] * rows
        self._in_order: Int32 | None = None
        self._sharing: tuple[Request, ...] = ()  # the requests as they were when _in_order was made
        self._outputs: list[list[int]] = []  # theirs
        self._stop_ids: frozenset[int] | None = None

    def admit(self, request: Request, row: int) -> None:
        """Begins to plan for a request that has got ``row``."""
        request.req_pool_idx = row
        self.requests.append(request)
        self._by_row[row] = request
        self._in_order = self._stop_ids = None
        self.known[row] = self.admitted[row] = request.num_tokens
        self.scheduled[row] = request.num_computed
        self.rank[row], self.request_id[row] = request.rank
        self.prompt[row] = len(request.prompt)
        self.limit[row] = len(request.prompt) + request.params.max_new_tokens

    def release(self, request: Request) -> int:
        """Ends planning for a request; returns the row that it had."""
        row = request.req_pool_idx
        if row is None:
            raise ValueError(f"request {request.request_id} has no row")
        request.req_pool_idx = None
        self.requests.remove(request)
        self._by_row[row] = None
        self._in_order = self._stop_ids = None
        self._sharing, self._outputs = (), []  # a request that has ended may hold much
        self.tenancy[row] += 1
        return row

    def clear(self) -> None:
        """Forgets every request; what was planned for any row is stale from now on."""
        self.requests.clear()
        self._by_row = [None] * len(self._by_row)
        self._in_order = self._stop_ids = None
        self._sharing, self._outputs = (), []
        self.tenancy += 1

    def in_order(self) -> Int32:
        """The rows in order of admission: the same array until a request comes or goes; not to be changed."""
        if self._in_order is None:
            self._in_order = np.array([request.req_pool_idx for request in self.requests], np.int32)
            self._sharing = tuple(self.requests)
            self._outputs = [request.output for request in self.requests]
        return self._in_order

    def is_current(self, rows: Int32) -> bool:
        """Whether this is the array that ``in_order`` returns, so that nobody has come or gone since it was made."""
        return rows is self._in_order

    def append(self, tokens: list[int]) -> None:
        """Gives each request its next token, in order of admission."""
        if len(tokens) != len(self._outputs):
            raise ValueError(f"{len(tokens)} tokens for {len(self._outputs)} requests")
        deque(map(list.append, self._outputs, tokens), maxlen=0)  # a loop in C: this is done at every step

    def stop_ids(self) -> frozenset[int]:
        """The tokens that end any of the requests."""
        if self._stop_ids is None:
            self._stop_ids = frozenset().union(*{request.stop_ids for request in self.requests})
        return self._stop_ids

    def of(self, rows: Int32) -> Sequence[Request]:
        """The requests that have these rows."""
        if rows is self._in_order:
            return self._sharing
        by_row = self._by_row
        return [request for row in rows.tolist() if (request := by_row[row]) is not None]

    def pending(self, rows: Int32) -> Int64:
        """Tokens to feed: 1 while decoding, more while prefilling, 0 where only the end is awaited.

        The last token of an answer is never fed.
        """
        return np.minimum(self.known[rows], self.limit[rows] - 1) - self.scheduled[rows]

    def schedule(self, rows: Int32, counts: Int64) -> ScheduledStep:
        """Notes that ``counts`` tokens of ``rows`` will be computed."""
        starts = self.scheduled[rows]
        samples = starts + counts == self.known[rows]
        self.scheduled[rows] += counts
        self.known[rows] += samples
        is_decode = starts >= self.prompt[rows]
        return ScheduledStep(
            requests=self.of(rows),
            req_pool_idx=rows,
            starts=starts,
            counts=counts,
            is_decode=is_decode,
            on_device=starts >= self.admitted[rows],
            samples=samples,
            ends=samples & (self.known[rows] == self.limit[rows]),
            tenancies=self.tenancy[rows],
            num_tokens=int(counts.sum()),
            num_decode_tokens=int(counts[is_decode].sum()),
        )

    def are_live(self, rows: Int32, tenancies: Int64) -> Bool:
        """Whether the requests that a step was planned for have their rows still."""
        live: Bool = self.tenancy[rows] == tenancies
        return live
