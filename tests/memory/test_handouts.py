"""Hand-out times go with the arrays, whenever the garbage collector finds them."""

import numpy as np
import pytest

from engine.memory.pages.handouts import Handouts


@pytest.mark.parametrize("look", [Handouts.void_serials, lambda known: known.rewind(1, frozenset([-1]))])
def test_an_array_that_dies_in_the_middle_of_a_look_at_all_does_no_harm(look):
    """As when the collector runs there and finds one that only a traceback's cycle had kept."""
    known = Handouts()
    arrays = [np.zeros(4, np.int32) for _ in range(3)]
    last = arrays[-1]

    class Serial(int):
        def __hash__(self):
            arrays.clear()
            return super().__hash__()

    for array in arrays:
        known.record(array, 1, are_slots=True)
    del array
    known.rewind(0, frozenset())  # all are void
    for handout in known._by_id.values():
        handout.serial = Serial(handout.serial)
    look(known)
    assert not arrays
    assert known.find(last) is not None
    assert len(known._by_id) == 1
