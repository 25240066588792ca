"""What answers gain from step to step, reported when somebody asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from engine.models.text import Tokenizer
from engine.models.text_stream import TextStream
from engine.serving.answer_text import AnswerText
from engine.serving.groups import group_of, has_ended
from engine.serving.request import AnswerDelta, Request, RequestOutput

TextOf = Callable[[Request], str]
Last = Mapping[Request, "Follower | None"]  # of the leaders of groups that have ended

_logger = logging.getLogger(__name__)


class StepOutput(dict[int, RequestOutput]):
    """The answers that a step has finished, by request id.

    Args:
        gained: makes ``new`` of ``last``.

    Attributes:
        last: the leaders of these answers, each with its follower if it had one when the answers were made.
    """

    def __init__(self, gained: Callable[[Last], dict[int, tuple[AnswerDelta, ...]]]) -> None:
        super().__init__()
        self.last: dict[Request, Follower | None] = {}
        self._gained = gained

    @cached_property
    def new(self) -> dict[int, tuple[AnswerDelta, ...]]:
        """What each request's answers have gained since this was last read of a step, by request id.

        Made when it is read, so that steps whose caller does not ask for it pay nothing. A request whose answers have
        gained nothing is left out; so is an aborted one. What an answer gained until its end is reported by the step
        that has finished it, and by no later one.
        """
        return self._gained(self.last)


class Follower:
    """Reports what the answers to one prompt gain.

    Only the thread that is within the engine's gate may call it.

    Args:
        leader: the first of them.
        tokenizer: makes text of tokens; without one the text is empty.
        text_of: returns the whole text of an answer that has ended.
    """

    def __init__(self, leader: Request, tokenizer: Tokenizer | None, text_of: TextOf) -> None:
        self._members = [_Member(request, index, tokenizer, text_of) for index, request in enumerate(group_of(leader))]

    def take(self) -> tuple[AnswerDelta, ...]:
        """What each answer has gained since the last call; answers that have gained nothing are left out."""
        return tuple([delta for member in self._members if (delta := member.take()) is not None])


class _Member:
    """One answer, and how much of it has been reported."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, text_of: TextOf) -> None:
        self._request = request
        self._index = index
        self._tokenizer = tokenizer
        self._text_of = text_of
        self._text = request.text  # of a request with stop texts; the engine keeps it up to date
        self._comes_at_the_end = False  # what there is of the text besides
        self._reported = 0
        self._characters = 0  # that were reported
        self._has_ended = False

    def take(self) -> AnswerDelta | None:
        request, start = self._request, self._reported
        ends, stop = has_ended(request), len(request.output)
        if self._has_ended or (stop == start and not ends):
            return None
        text = self._take_text(ends)
        self._reported, self._has_ended = stop, ends
        self._characters += len(text)
        return AnswerDelta(
            token_ids=tuple(request.output[start:stop]),
            text=text,
            logprobs=None if request.params.logprobs is None else tuple(request.logprobs[start:stop]),
            index=self._index,
            finish_reason=request.finish_reason.value if ends and request.finish_reason else None,
        )

    def _take_text(self, ends: bool) -> str:
        """The text that is certain now; once it could not be had as it comes, the rest of it at the end."""
        if self._tokenizer is None:
            return ""
        try:
            if self._comes_at_the_end:
                return self._text_of(self._request)[self._characters :] if ends else ""
            if self._text is None:
                self._text = AnswerText(TextStream(self._tokenizer, self._request.prompt))
            self._text.read(self._request.output)
            if ends:
                self._text.finish()
            return self._text.take()
        except Exception:
            _logger.exception("the text of request %d cannot be had as it comes", self._request.request_id)
            is_first, self._comes_at_the_end = not self._comes_at_the_end, True
            return self._take_text(ends) if is_first else ""


class Deltas:
    """Follows the requests of those who read ``StepOutput.new``.

    Args:
        tokenizer: makes text of tokens; None where there is none.
        text_of: returns the whole text of an answer that has ended.
    """

    def __init__(self, tokenizer: Tokenizer | None, text_of: TextOf) -> None:
        self._tokenizer = tokenizer
        self._text_of = text_of
        self._followers: dict[Request, Follower] = {}  # of the groups that were unfinished when last asked

    def follow(self, leader: Request) -> Follower:
        """A new follower of a group, from its beginning."""
        return Follower(leader, self._tokenizer, self._text_of)

    def note_end(self, leader: Request, output: StepOutput) -> None:
        """Notes that the answers of a group come with ``output``."""
        output.last[leader] = self._followers.get(leader)

    def take(self, last: Last, unfinished: Iterable[Request]) -> dict[int, tuple[AnswerDelta, ...]]:
        """What the answers of these groups have gained since it was last taken, by request id of the leader."""
        followed = self._followers
        self._followers = {leader: followed.get(leader) or self.follow(leader) for leader in unfinished}
        ended = [(leader, follower or self.follow(leader)) for leader, follower in last.items()]
        each = [*ended, *self._followers.items()]
        return {leader.request_id: deltas for leader, follower in each if (deltas := follower.take())}
