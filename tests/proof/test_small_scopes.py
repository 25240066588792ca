"""Every reachable state of the shipped manager and scheduler in small scopes is right, and every request ends."""

import pytest
from explorer import explore, forms_by_depth
from liveness import visited_to_the_end
from scopes import MANAGER, MERGING, SCHEDULER


def marked(scopes):
    return [pytest.param(name, marks=[pytest.mark.slow] if scope.is_slow else []) for name, scope in scopes.items()]


@pytest.mark.parametrize("name", marked(MANAGER))
def test_every_state_of_the_manager_is_right(name):
    found = MANAGER[name].explore()
    print(f"\n{name}: {found}")
    assert found.is_complete == (MANAGER[name].most_depth is None)


@pytest.mark.parametrize("name", marked(SCHEDULER))
def test_every_state_of_the_scheduler_is_right_and_every_request_ends(name):
    found = SCHEDULER[name].explore()
    print(f"\n{name}: {found}")
    assert found.is_complete
    assert visited_to_the_end(found) > 0


@pytest.mark.parametrize("name", list(MERGING))
def test_worlds_of_one_form_lead_to_the_same_forms(name):
    """With all worlds of a form kept and with one of them, the same forms are reached by each number of moves."""
    scope, depth = MERGING[name]
    alone, every = (forms_by_depth(scope.start(), depth, merges=merges) for merges in (True, False))
    assert [len(forms) for forms in alone] == [len(forms) for forms in every]
    assert alone == every


def test_a_visit_of_few_states_says_that_it_is_not_complete():
    scope = next(iter(MANAGER.values()))
    found = explore(scope.start(), most_states=10)
    assert not found.is_complete
    assert found.states >= 10
    way = found.way_to(found.states - 1)
    world = scope.start()
    for move in way:
        world.play(move)
    assert len(way) == found.depth or len(way) == found.depth + 1
