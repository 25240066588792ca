"""Requests that decode together, step after step, while none comes or goes: what their steps share is made once.

Most steps of a server are of this kind. Planned like any other, such a step would be checked and gathered request by
request to come out as the one before it, a token further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.memory.decoding_rows import DecodingRows
from engine.serving.plan.running_rows import RunningRows
from engine.serving.plan.step import ScheduledStep


@dataclass(eq=False)
class DecodeRun:
    """Steps like ``step``, each a token further.

    Attributes:
        step: one whose rows are all running requests, in order of admission, each feeding back its last token.
        growth: its rows in the page table.
        steps_left: how many follow until a request ends by its length or its row is full.
    """

    step: ScheduledStep
    growth: DecodingRows
    steps_left: int

    @classmethod
    def after(cls, step: ScheduledStep, plan: RunningRows, growth: DecodingRows) -> DecodeRun:
        """The steps that may follow ``step``, which has been planned and filled."""
        rows = step.req_pool_idx
        return cls(step, growth, int((plan.limit[rows] - plan.known[rows]).min(initial=growth.steps_left)))

    def next_step(self, plan: RunningRows) -> ScheduledStep:
        """Notes that each request computes a token more, whose page-table rows have grown."""
        step, rows = self.step, self.step.req_pool_idx
        self.steps_left -= 1
        plan.scheduled[rows] += 1
        plan.known[rows] += 1
        return ScheduledStep(
            requests=step.requests,
            req_pool_idx=rows,
            starts=self.growth.lens.astype(np.int64) - 1,
            counts=step.counts,
            is_decode=step.is_decode,
            on_device=step.on_device,
            samples=step.samples,
            ends=step.ends if self.steps_left else plan.known[rows] == plan.limit[rows],
            tenancies=step.tenancies,
            num_tokens=step.num_tokens,
            num_decode_tokens=step.num_decode_tokens,
            growth=self.growth,
        )
