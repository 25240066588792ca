"""That every request ends: from every state that was visited, an engine that nobody disturbs comes to its end."""

from __future__ import annotations

from explorer import Exploration, Move, Violation


def visited_to_the_end(found: Exploration) -> int:
    """The most moves from a state to the end, of an engine whose steps overlap and of one whose steps do not.

    Args:
        found: every reachable state, with the notes of ``ways_on``.

    Raises:
        Violation: see ``require_ends``.
    """
    return max(require_ends(found, [each[overlaps] for each in found.notes]) for overlaps in (False, True))


def require_ends(found: Exploration, ways_on: list[Move | None]) -> int:
    """Follows from each state the moves of an engine that is left alone; they must not come back to a state.

    Args:
        found: every reachable state, with edges.
        ways_on: of each state the move that such an engine makes; None where it has nothing to do.

    Returns:
        The most moves from a state to the end.

    Raises:
        Violation: the engine goes round in a circle; the moves lead to it.
    """
    assert found.is_complete, "where a state is missing the way to the end may lead through it"
    left: dict[int, int] = {}
    for state in range(found.states):
        path: dict[int, None] = {}
        at, count = state, -1
        while at not in left:
            if at in path:
                raise Violation(found.way_to(at), RuntimeError("from here the engine goes round and no request ends"))
            path[at] = None
            move = ways_on[at]
            if move is None:
                break
            at = found.edges[at][move]
        count = left.get(at, -1)
        for each in reversed(path):
            count += 1
            left[each] = count
    return max(left.values())
