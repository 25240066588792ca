"""Doing a thing for each of several, whoever it fails for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any


def for_each(function: Callable[[Any], object], items: Sequence[Any]) -> None:
    """Calls ``function`` with every item in turn, also with those after one that it fails for; raises at the end.

    Of several failures the last is raised, with the others as its context.
    """
    with ExitStack() as stack:
        for item in reversed(items):  # a stack unwinds from its end
            stack.callback(function, item)
