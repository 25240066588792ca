"""The unfinished requests by the answers that belong together: a leader, and its siblings over the same prompt."""

from __future__ import annotations

from engine.serving.request import Request, RequestState


class AnswerGroups:
    """The requests that callers wait for.

    Attributes:
        unfinished: leaders, the first of the answers to each prompt, by request id; all else is derived from these.
        ended: requests that have ended and whose group may be complete.
    """

    def __init__(self) -> None:
        self.unfinished: dict[int, Request] = {}
        self.ended: list[Request] = []
        self._leader_of: dict[int, Request] = {}
        self._unforked: list[Request] = []  # leaders with siblings that have not started

    def add(self, leader: Request) -> None:
        """Begins to wait for a group."""
        self.unfinished[leader.request_id] = leader
        self._enter(leader)

    def forget(self, leader: Request) -> None:
        """Ends the wait for a group."""
        self.unfinished.pop(leader.request_id, None)
        for member in group_of(leader):
            self._leader_of.pop(member.request_id, None)
        if leader in self._unforked:
            self._unforked.remove(leader)

    def members(self) -> list[Request]:
        """Every request of every group."""
        return [member for leader in self.unfinished.values() for member in group_of(leader)]

    def to_start(self) -> list[tuple[Request, Request]]:
        """Leaders that have computed their prompt or ended, each with a sibling that has not started."""
        self._unforked = [leader for leader in self._unforked if any(map(is_new, leader.siblings))]
        ready = [leader for leader in self._unforked if leader.output or leader.state is RequestState.ENDED]
        return [(leader, sibling) for leader in ready for sibling in leader.siblings if is_new(sibling)]

    def complete(self) -> list[Request]:
        """Leaders of the groups of which every member has ended; the others are forgotten until another member ends."""
        leaders = {id(leader): leader for request in self.ended if (leader := self._leader_of.get(request.request_id))}
        return [leader for leader in leaders.values() if all(map(has_ended, group_of(leader)))]

    def restart(self) -> None:
        """Derives everything else from ``unfinished`` again, after a fault that may have come between two changes."""
        self._leader_of, self._unforked = {}, []
        for leader in self.unfinished.values():
            self._enter(leader)
        self.ended = [member for member in self.members() if has_ended(member)]

    def _enter(self, leader: Request) -> None:
        for member in group_of(leader):
            self._leader_of[member.request_id] = leader
        if leader.siblings:
            self._unforked.append(leader)


def group_of(leader: Request) -> tuple[Request, ...]:
    """A leader and its siblings."""
    return (leader, *leader.siblings)


def is_new(request: Request) -> bool:
    """Whether the scheduler does not have a request yet: a sibling waits for its leader to compute their prompt."""
    return request.state is RequestState.NEW


def has_ended(request: Request) -> bool:
    """Whether a request has ended."""
    return request.state is RequestState.ENDED
