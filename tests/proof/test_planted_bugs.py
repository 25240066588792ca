"""The small scopes find bugs: each of these is planted into the shipped code, and a visit must come upon it."""

import pytest
from explorer import Violation
from liveness import visited_to_the_end
from planted import IN_THE_MANAGER, IN_THE_SCHEDULER
from scopes import MANAGER, SCHEDULER


def pairs(planted):
    return [pytest.param(name, plant, id=plant.__name__) for name, plants in planted.items() for plant in plants]


@pytest.mark.parametrize(("name", "plant"), pairs(IN_THE_MANAGER))
def test_a_bug_of_the_manager_is_found(name, plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(Violation) as caught:
        MANAGER[name].explore()
    print(f"\n{plant.__name__}: {caught.value}")


@pytest.mark.parametrize(("name", "plant"), pairs(IN_THE_SCHEDULER))
def test_a_bug_of_the_scheduler_is_found(name, plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(Violation) as caught:
        visited_to_the_end(SCHEDULER[name].explore())
    print(f"\n{plant.__name__}: {caught.value}")


def test_at_least_ten_bugs_are_planted_and_no_scope_that_finds_them_is_slow():
    assert sum(len(plants) for planted in (IN_THE_MANAGER, IN_THE_SCHEDULER) for plants in planted.values()) >= 10
    assert not any(MANAGER[name].is_slow for name in IN_THE_MANAGER)
    assert not any(SCHEDULER[name].is_slow for name in IN_THE_SCHEDULER)
