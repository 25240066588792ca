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
}
SCHEDULER = {
    "two alike": NamedScope(
        "two requests begin alike, one waits for the other; resets",
        SchedulerScope(4, 1, 2, 2, (((0, 0), 2, 0), ((0, 0), 2, 0))),
    ),
    "short of pages": NamedScope(
        "two requests of three pages in a pool of three", SchedulerScope(3, 1, 2, 2, (((0, 0), 2, 0), ((0, 1), 2, 0)))
    ),
    "chunks": NamedScope(
        "pages of two tokens, prompts in chunks",
        SchedulerScope(3, 2, 2, 3, (((0, 0, 0), 2, 0), ((0, 0, 1), 2, 0)), without=("reset",)),
    ),
}
# Scopes without what is known to be merged though page numbers decide (see manager_form), each with a depth.
MERGING = {
    "rows": (MANAGER["rows"], 4),
    "pages of two": (MANAGER["pages of two"], 4),
    "two alike": (SCHEDULER["two alike"], 5),
}
