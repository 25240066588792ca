"""What processes agree on: two ends of a plan in one process, where the first speaks before the other listens."""

import pytest

from engine.distributed.agreement import Agreement
from engine.errors import ConfigError, EngineError


class Plan:
    """One process's end of a plan: process 0 writes what it has agreed, the other reads it."""

    is_shared = True

    def __init__(self, leads, sent):
        self.leads, self.sent = leads, sent

    def agree(self, value):
        if self.leads:
            self.sent.append(value)
            return value
        return self.sent.pop(0)


@pytest.fixture
def both():
    sent = []
    return [Agreement(Plan(leads, sent)) for leads in (True, False)]


def fail():
    raise OSError("no space left")


def test_what_the_first_does_it_does_once_for_all(both):
    done = []
    results = [agreement.done_by_first(lambda: done.append(1) or 7) for agreement in both]
    assert (results, done) == ([7, 7], [1])


def test_what_fails_in_the_first_fails_in_all(both):
    first, other = both
    with pytest.raises(OSError, match="no space left"):
        first.done_by_first(fail)
    with pytest.raises(EngineError, match="process 0 could not do its part: OSError: no space left"):
        other.done_by_first(fail)


def test_a_process_with_another_value_than_the_first_is_refused(both):
    first, other = both
    first.require_same("a", "weights")
    first.require_same("a", "weights")
    other.require_same("a", "weights")
    with pytest.raises(ConfigError, match="does not have what process 0 has: weights"):
        other.require_same("b", "weights")
