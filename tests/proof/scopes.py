"""The scopes that are visited: what is in each, and whether it is small enough for every run of the tests."""

from __future__ import annotations

from dataclasses import dataclass

from explorer import Exploration, Move, World, explore
from manager_world import ManagerScope, ManagerWorld
from scheduler_world import NO_TOKEN, STOP, SchedulerScope, SchedulerWorld


@dataclass(frozen=True)
class NamedScope:
    """A scope to visit.

    Attributes:
        about: what it has that the others have not.
        scope: how small the world is.
        most_depth: how many moves from the start it is visited; None: to the end.
        is_slow: whether it takes minutes.
    """

    about: str
    scope: ManagerScope | SchedulerScope
    most_depth: int | None = None
    is_slow: bool = False

    def start(self) -> World:
        return ManagerWorld(self.scope) if isinstance(self.scope, ManagerScope) else SchedulerWorld(self.scope)

    def explore(self) -> Exploration:
        note = ways_on if isinstance(self.scope, SchedulerScope) else None
        return explore(self.start(), most_depth=self.most_depth, note=note)


def ways_on(world: SchedulerWorld) -> tuple[Move | None, Move | None]:
    """What an engine does that nobody disturbs, and one whose steps overlap."""
    return world.way_on(overlaps=False), world.way_on(overlaps=True)


ONE, TWO, LONGER = ((0, 0),), ((0, 0), (0, 1)), ((0, 0, 0),)

MANAGER = {
    "rows": NamedScope(
        "two requests, pages of one token", ManagerScope(3, 1, 2, 2, TWO, tokens=(0,), without=("fork", "reset"))
    ),
    "pages of two": NamedScope(
        "pages of two tokens, forks, copies of partial pages",
        ManagerScope(3, 2, 2, 3, LONGER, tokens=(0,), without=("reset",)),
        most_depth=7,
    ),
    "planned steps": NamedScope(
        "anything may come between the slots of a step and its dispatch",
        ManagerScope(3, 1, 2, 2, ONE, tokens=(0,), split=True, without=("fork", "reset")),
    ),
    "late steps": NamedScope(
        "steps are committed later than they are dispatched",
        ManagerScope(3, 1, 2, 2, ONE, tokens=(0,), late=True, without=("fork", "reset")),
    ),
    "windows": NamedScope(
        "a window of two tokens beside full attention",
        ManagerScope(6, 1, 1, 3, LONGER, windows=(None, 2), tokens=(0,), without=("reset",)),
        most_depth=8,
    ),
    "host tier": NamedScope(
        "evicted pages go to the host and come back",
        ManagerScope(3, 1, 1, 3, LONGER, host_pages=2, tokens=(0,), without=("reset", "fork")),
        most_depth=10,
    ),
    "resets and new weights": NamedScope(
        "the cache is reset at any time, the weights are replaced once",
        ManagerScope(3, 1, 2, 2, ONE, epochs=1, tokens=(0,), without=("fork", "truncate")),
    ),
    "rows and forks": NamedScope(
        "two requests, pages of one token, forks, resets",
        ManagerScope(3, 1, 2, 2, TWO, tokens=(0,)),
        is_slow=True,
    ),
    "resets, new weights and cuts": NamedScope(
        "as resets and new weights, and rows are cut",
        ManagerScope(3, 1, 2, 2, ONE, epochs=1, tokens=(0,), without=("fork",)),
        is_slow=True,
    ),
    "pages of two, deeper": NamedScope(
        "as pages of two, and resets",
        ManagerScope(3, 2, 2, 3, LONGER, tokens=(0,)),
        most_depth=9,
        is_slow=True,
    ),
    "two requests with windows": NamedScope(
        "two requests, a window of two tokens beside full attention, rows are not cut or forked",
        ManagerScope(6, 1, 2, 3, LONGER, windows=(None, 2), tokens=(0,), without=("reset", "fork", "truncate")),
        most_depth=20,
        is_slow=True,
    ),
    "windows, pages of two": NamedScope(
        "a window of two tokens beside full attention, pages of two tokens",
        ManagerScope(6, 2, 1, 5, ((0, 0, 0, 0, 0),), windows=(None, 2), tokens=(0,), without=("reset",)),
        most_depth=9,
        is_slow=True,
    ),
    "host tier, two requests": NamedScope(
        "as host tier, rows are not cut",
        ManagerScope(3, 1, 2, 2, ONE, host_pages=2, tokens=(0,), without=("reset", "fork", "truncate")),
        most_depth=18,
        is_slow=True,
    ),
    "three rows": NamedScope(
        "three requests, rows are not cut or forked",
        ManagerScope(4, 1, 3, 2, ONE, tokens=(0,), without=("reset", "fork", "truncate")),
        is_slow=True,
    ),
    "two tokens": NamedScope(
        "every prompt of one or two tokens of two, rows of up to three",
        ManagerScope(4, 1, 2, 3, ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)), without=("reset", "fork", "truncate")),
        most_depth=7,
        is_slow=True,
    ),
}
SHORT = ((0,), 3, 0), ((1,), 3, 0)
SCHEDULER = {
    "two alike": NamedScope(
        "two requests begin alike, one waits for the other",
        SchedulerScope(6, 1, 2, 4, (((0, 0), 2, 0), ((0, 0), 2, 0)), without=("reset",)),
    ),
    "short of pages": NamedScope(
        "two of three requests are admitted and one is retracted",
        SchedulerScope(4, 1, 2, 2, (*SHORT, ((0,), 1, 0)), tokens=(0,), without=("reset", "fault")),
    ),
    "short of pages, with faults": NamedScope(
        "retractions, stops and faults, with and without the pages",
        SchedulerScope(4, 1, 2, 2, SHORT, without=("reset",)),
    ),
    "chunks": NamedScope(
        "pages of two tokens, prompts in chunks, one fills the pool",
        SchedulerScope(3, 2, 2, 3, (((0, 0, 0), 2, 0), ((0, 0, 1, 0, 1, 1), 1, 0)), without=("reset",)),
    ),
    "windows": NamedScope(
        "a window of two tokens beside full attention",
        SchedulerScope(8, 1, 2, 2, (((0, 0), 2, 0), ((0, 0), 2, 0)), windows=(None, 2), without=("reset",)),
    ),
    "two alike, with resets": NamedScope(
        "the cache is reset at any time",
        SchedulerScope(6, 1, 2, 4, (((0, 0), 2, 0), ((0, 0), 2, 0))),
        is_slow=True,
    ),
    "three requests": NamedScope(
        "two begin alike, the third otherwise; faults",
        SchedulerScope(5, 1, 3, 4, (((0, 0), 2, 0), ((0, 0), 2, 0), ((0, 1), 1, 0)), tokens=(0,), without=("reset",)),
        is_slow=True,
    ),
    "three requests, short of pages": NamedScope(
        "retractions, stops and faults",
        SchedulerScope(4, 1, 2, 2, (*SHORT, ((0,), 1, 0)), without=("reset",)),
        is_slow=True,
    ),
    "priorities": NamedScope(
        "the later request goes first",
        SchedulerScope(4, 1, 2, 2, (((0,), 3, 0), ((1,), 3, 1)), tokens=(0, STOP, NO_TOKEN), without=("reset",)),
        is_slow=True,
    ),
}
# Scopes that are visited with all worlds of a form as well as with one, each with the moves from the start.
MERGING = {
    "rows": (MANAGER["rows"], 5),
    "pages of two": (MANAGER["pages of two"], 5),
    "planned steps": (MANAGER["planned steps"], 6),
    "windows": (MANAGER["windows"], 6),
    "host tier": (MANAGER["host tier"], 7),
    "resets and new weights": (MANAGER["resets and new weights"], 6),
    "two alike": (SCHEDULER["two alike"], 5),
}
