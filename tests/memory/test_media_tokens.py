"""Prompts with equal placeholders and different media share what is before the media, and nothing behind."""

import numpy as np
import pytest

from engine import CacheManager, CacheScope, LayoutKey, media_tokens
from engine.errors import ShapeError

SCOPE = CacheScope("model", 0, None, "", LayoutKey.of({"version": 1}))
PLACEHOLDER = 99


def prompt(rng, before, count, after):
    return np.concatenate(
        [rng.integers(0, 90, before), np.full(count, PLACEHOLDER), rng.integers(0, 90, after)]
    ).astype(np.int32)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_prompts_with_other_media_share_only_what_is_before_them(page_size):
    rng = np.random.default_rng()
    before, count, after = 35, 24, 30
    ids = prompt(rng, before, count, after)
    cache = CacheManager(1024, page_size, 4, 256)
    first = media_tokens(ids, [(before, count, b"an image")])
    row = cache.admit(SCOPE, first, most_tokens=len(ids)).row
    cache.grow([row], [len(ids)])
    cache.mark_computed([row], [len(ids)])
    cache.release(row, SCOPE, first)
    again = media_tokens(ids, [(before, count, b"an image")])
    other = media_tokens(ids, [(before, count, b"another image")])
    whole = (len(ids) - 1) // page_size * page_size  # the last token is always computed
    assert cache.cached_tokens(SCOPE, again) == whole
    assert cache.cached_tokens(SCOPE, other) == before // page_size * page_size
    assert cache.cached_tokens(SCOPE, ids) == before // page_size * page_size


def test_only_placeholders_change_and_each_differs_from_all_others():
    rng = np.random.default_rng()
    ids = prompt(rng, 5, 100, 7)
    given = ids.copy()
    keyed = media_tokens(ids, [(5, 40, b"a"), (45, 60, b"b")])
    assert (ids == given).all()
    assert keyed.dtype == np.int32
    assert (keyed[:5] == ids[:5]).all()
    assert (keyed[105:] == ids[105:]).all()
    assert (keyed[5:105] < 0).all()
    assert len(set(keyed[5:105].tolist())) == 100


def test_the_same_medium_elsewhere_has_the_same_ids():
    ids = np.full(64, PLACEHOLDER, np.int32)
    keyed = media_tokens(ids, [(2, 20, b"a"), (30, 20, b"a")])
    assert (keyed[2:22] == keyed[30:50]).all()


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ([(0, 3, b"a")], "cannot be told"),
        ([(0, 8, b"")], "cannot be told"),
        ([(60, 8, b"a")], "does not lie in"),
        ([(-8, 8, b"a")], "does not lie in"),
        ([(8, 8, b"a"), (12, 8, b"b")], "without overlap"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(media, message):
    with pytest.raises(ShapeError, match=message):
        media_tokens(np.zeros(64, np.int32), media)
