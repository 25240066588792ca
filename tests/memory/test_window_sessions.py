"""Sessions that take turns find what they have said, as long as that and their last windows fit."""

from __future__ import annotations

import numpy as np
import pytest
from prefix_pages import scope

from engine.memory.manager import CacheManager

PAGE, WINDOW = 4, 16
WINDOWS = (None, WINDOW, WINDOW)
SCOPE = scope()
CONTEXT_PAGES, SESSIONS, ROUNDS = 40, 5, 4
# Of a session: every page of full attention, and in each window the pages that a page border sees and the one after.
FITTING = SESSIONS * (CONTEXT_PAGES + 20 + 2 * (WINDOW // PAGE + 1))


def serve(cache, tokens, chunk):
    """Computes a request in chunks, as a scheduler does; returns how many of its tokens were cached."""
    admission = cache.admit(SCOPE, tokens)
    row, done = admission.row, admission.cached_tokens
    while done < tokens.size:
        count = min(chunk, tokens.size - done)
        cache.grow([row], [count])
        done += count
        cache.take_moves()
        cache.mark_computed([row], [done])
        cache.publish(row, SCOPE, tokens)
        cache.leave_behind([row])
        cache.check_integrity()
    cache.release(row, SCOPE, tokens)
    return admission.cached_tokens


def make(chunk, windows_before_the_last=0):
    before = SESSIONS * 2 * windows_before_the_last * WINDOW // PAGE
    pages = FITTING + before + 2 * (chunk // PAGE + 1) + 40
    assert pages < SESSIONS * CONTEXT_PAGES * len(WINDOWS)  # or nothing would be evicted
    return CacheManager(pages * PAGE, PAGE, 2, 100 * PAGE, windows=WINDOWS, ahead_tokens=chunk)


@pytest.mark.parametrize("chunk", [PAGE - 1, 2 * PAGE, 17, 60])
@pytest.mark.parametrize("tail", [1, 2, PAGE, PAGE + 3])
def test_sessions_that_go_on_find_all_that_they_have_said(chunk, tail):
    rng, cache = np.random.default_rng(), make(chunk)
    said = [rng.integers(0, 2**31, CONTEXT_PAGES * PAGE - tail).astype(np.int32) for _ in range(SESSIONS)]
    for turn in range(ROUNDS):
        for index, tokens in enumerate(said):
            cached = serve(cache, tokens, chunk)
            assert cached == (0 if turn == 0 else (tokens.size - PAGE) // PAGE * PAGE)
            said[index] = np.append(tokens, rng.integers(0, 2**31, PAGE).astype(np.int32))
    assert cache.prefix.evicted_pages > 0


@pytest.mark.parametrize("chunk", [PAGE - 1, 2 * PAGE, 17, 60])
@pytest.mark.parametrize("question", [1, PAGE, 5 * PAGE + 1, 20 * PAGE])
@pytest.mark.parametrize("has_room", [True, False])
def test_other_questions_to_the_same_context_find_it_once_it_is_known_where_they_part(chunk, question, has_room):
    """That is from the third time on; the second, where a few windows before the end of each sequence fit."""
    rng, cache = np.random.default_rng(), make(chunk, 3 * has_room)
    contexts = [rng.integers(0, 2**31, CONTEXT_PAGES * PAGE).astype(np.int32) for _ in range(SESSIONS)]
    for turn in range(ROUNDS):
        for context in contexts:
            cached = serve(cache, np.append(context, rng.integers(0, 2**31, question).astype(np.int32)), chunk)
            is_near = has_room and question <= 2 * WINDOW
            assert turn < (1 if is_near else 2) or cached == context.size
    assert cache.prefix.evicted_pages > 0
