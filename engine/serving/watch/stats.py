"""What an engine has done, counted where it happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.serving.plan.step import ScheduledStep


@dataclass
class EngineStats:
    """Running totals.

    A step that prefills and decodes counts its seconds to each by its tokens.

    Attributes:
        steps: steps run.
        prefill_tokens, decode_tokens: tokens fed.
        prefill_seconds, decode_seconds: time from a step's commit, or its dispatch if that was later, to the next's.
        peak_held_tokens: most tokens in held pages after any step.
        finished: answers by why they ended.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_held_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    def note(self, step: ScheduledStep, seconds: float, held_tokens: int) -> None:
        """Counts a step that has run."""
        total, decode = step.num_tokens, step.num_decode_tokens
        self.steps += 1
        self.decode_tokens += decode
        self.prefill_tokens += total - decode
        self.decode_seconds += seconds * decode / total
        self.prefill_seconds += seconds * (total - decode) / total
        self.peak_held_tokens = max(self.peak_held_tokens, held_tokens)
