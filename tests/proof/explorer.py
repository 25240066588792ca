"""Visits every state that a world can reach, breadth first; the first wrong one comes with the moves that lead to it.

A world is the shipped code with what an oracle knows beside it. It has

    moves()     the moves that are possible now, as tuples
    play(move)  makes one; returns whether it was refused; raises where the code or an answer of it is wrong
    form()      nested tuples of numbers and strings: all of its state that what follows can depend on; the last of
                them is what a refused call may change, as what the code remembers to save itself work
    check()     raises where the state is wrong; a function of what the form holds

Worlds of equal form are visited once. A form is kept as a BLAKE2b digest of 128 bits: two of a million forms have the
same one with a probability below 1e-26.
"""

from __future__ import annotations

import hashlib
import marshal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from snapshots import restored, saved

Move = tuple[Any, ...]


class World(Protocol):
    def moves(self) -> list[Move]: ...
    def play(self, move: Move) -> bool: ...
    def form(self) -> tuple[Any, ...]: ...
    def check(self) -> None: ...


class Violation(AssertionError):
    """A reachable state is wrong, or a move was answered wrongly; ``moves`` lead there from the start."""

    def __init__(self, moves: list[Move], cause: BaseException) -> None:
        super().__init__(f"after {len(moves)} moves {moves}: {type(cause).__name__}: {cause}")
        self.moves = moves


@dataclass
class Exploration:
    """What was visited.

    Attributes:
        states: states of different form.
        transitions: moves made.
        depth: most moves from the start to a state.
        is_complete: whether every reachable state was visited.
        seconds: processor time it took.
        edges: of each state, the states that its moves lead to, by move; only where notes were asked for.
        notes: of each state what was asked for.
        ways: of each state but the first, the state and the move that led to it first.
    """

    states: int
    transitions: int
    depth: int
    is_complete: bool
    seconds: float
    edges: list[dict[Move, int]]
    notes: list[Any]
    ways: list[tuple[int, Move]]

    def way_to(self, state: int) -> list[Move]:
        """The moves that lead from the start to a state."""
        moves: list[Move] = []
        while state:
            state, move = self.ways[state]
            moves.append(move)
        return moves[::-1]

    def __str__(self) -> str:
        scope = "every reachable state" if self.is_complete else "every state up to that depth"
        return (
            f"{self.states:,} states, {self.transitions:,} transitions, depth {self.depth}, {scope}, "
            f"{self.seconds:.1f} s"
        )


def digest(form: tuple[Any, ...]) -> bytes:
    # Version 2 of the format writes equal values as equal bytes: later ones also write which objects are the same.
    return hashlib.blake2b(marshal.dumps(form, 2), digest_size=16).digest()


def explore(
    start: World,
    *,
    most_depth: int | None = None,
    most_states: int | None = None,
    note: Callable[[Any], Any] | None = None,
) -> Exploration:
    """Visits what ``start`` can reach.

    Args:
        start: where to begin.
        most_depth: moves from there that it goes at most.
        most_states: states after which it ends.
        note: is asked once of each state, and its answers are kept with the edges between states.

    Raises:
        Violation: the first wrong state or answer.
    """
    began = time.process_time()
    found = Exploration(1, 0, 0, True, 0.0, [{}], [note(start)] if note else [], [(0, ())])
    known = {digest(start.form()): 0}
    level = [(0, saved(start))]
    _checked(start, found, 0)
    while level:
        if most_depth is not None and found.depth >= most_depth:
            found.is_complete = False
            break
        following: list[tuple[int, bytes]] = []
        for state, snapshot in level:
            if most_states is not None and found.states >= most_states:
                found.is_complete = False
                found.seconds = time.process_time() - began
                return found
            for move, key, world in _successors(snapshot, found, state):
                found.transitions += 1
                target = known.get(key)
                if target is None:
                    target = known[key] = found.states
                    found.states += 1
                    found.ways.append((state, move))
                    _checked(world, found, target)
                    if note:
                        found.edges.append({})
                        found.notes.append(note(world))
                    following.append((target, saved(world)))
                if note:
                    found.edges[state][move] = target
        level = following
        found.depth += bool(level)
    found.seconds = time.process_time() - began
    return found


def forms_by_depth(start: World, depth: int, *, merges: bool) -> list[set[bytes]]:
    """The forms that each number of moves leads to, up to ``depth``; with all worlds of a form kept, or one of them."""
    level, forms = [saved(start)], [{digest(start.form())}]
    nothing = Exploration(0, 0, 0, True, 0.0, [], [], [(0, ())])
    for _ in range(depth):
        reached: dict[bytes, list[bytes]] = {}
        for snapshot in level:
            for _, key, world in _successors(snapshot, nothing, 0):
                worlds = reached.setdefault(key, [])
                if not (merges and worlds):
                    worlds.append(saved(world))
        level = [world for worlds in reached.values() for world in worlds]
        forms.append(set(reached))
    return forms


def _successors(snapshot: bytes, found: Exploration, state: int) -> Iterator[tuple[Move, bytes, Any]]:
    world = restored(snapshot)
    before = None
    for move in world.moves():
        world = restored(snapshot)
        try:
            is_refused = world.play(move)
            form = world.form()
            key = digest(form)
            if is_refused:
                before = before or restored(snapshot).form()[:-1]
                assert form[:-1] == before, "a refused call has changed something"
        except Exception as error:
            raise Violation([*found.way_to(state), move], error) from error
        yield move, key, world


def _checked(world: World, found: Exploration, state: int) -> None:
    try:
        world.check()
    except Exception as error:
        raise Violation(found.way_to(state), error) from error
