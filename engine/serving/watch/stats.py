"""What an engine has done, counted where it is done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.serving.plan.step import ScheduledStep


@dataclass
class EngineStats:
    """Running totals.

    The seconds of a step that prefills and decodes are divided between both in proportion to their tokens.

    Attributes:
        steps: steps run.
        prefill_tokens: tokens fed by prefill.
        decode_tokens: tokens fed by decode.
        prefill_seconds: time of the steps' prefill; a step takes from its dispatch, or from the commit of the step
            before it if that was later, to its own commit.
        decode_seconds: time of the steps' decode.
        peak_held_tokens: most token slots in held pages after any step.
        finished: number of answers by finish reason.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_held_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    def note(self, step: ScheduledStep, seconds: float, held_tokens: int) -> None:
        """Counts a step that took ``seconds``; ``held_tokens`` are the slots in held pages after it."""
        total, decode = step.num_tokens, step.num_decode_tokens
        self.steps += 1
        self.decode_tokens += decode
        self.prefill_tokens += total - decode
        self.decode_seconds += seconds * decode / total
        self.prefill_seconds += seconds * (total - decode) / total
        self.peak_held_tokens = max(self.peak_held_tokens, held_tokens)
