"""An array of pages is not taken for one of slots, nor the other way round, as far as the array is known."""

import numpy as np
import pytest
from allocator_model import fingerprint

from engine.errors import DoubleFreeError, ShapeError
from engine.memory.pages import PagedTokenToKVPoolAllocator
from engine.memory.prefix import RadixCache
from engine.memory.scope import CacheScope, LayoutKey

NONE = [-1]
VIEWS = [lambda array: array, lambda array: array[1:], lambda array: array[::-1][:2][:1]]


@pytest.fixture(params=[1, 4])
def allocator(request):
    """With pages of one token slots equal pages, and nothing but the array tells them apart."""
    allocator = PagedTokenToKVPoolAllocator(40, request.param)
    allocator.pages.take([3])
    return allocator


def refused(allocator, call, what):
    before = fingerprint(allocator.backup_state())
    with pytest.raises(ShapeError, match=what):
        call()
    assert fingerprint(allocator.backup_state()) == before


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("take", [lambda pool: pool.take([1, 2]), lambda pool: pool.take_singles(3)])
def test_pages_are_not_freed_as_slots(allocator, view, take):
    pages = take(allocator.pages)
    refused(allocator, lambda: allocator.free(view(pages)), "give page ids back by pages.release")
    allocator.pages.release(pages)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "alloc",
    [
        lambda allocator: allocator.alloc(4),
        lambda allocator: allocator.alloc_extend([0], [3], NONE),
        lambda allocator: allocator.alloc_decode([1, 1], NONE * 2),
    ],
)
def test_slots_are_not_released_as_pages(allocator, view, alloc):
    slots = alloc(allocator)
    refused(
        allocator, lambda: allocator.pages.release(view(slots)), "cannot release these pages: the array holds slots"
    )
    refused(allocator, lambda: allocator.pages.retain(view(slots)), "cannot retain these pages: the array holds slots")
    allocator.free(slots)


def test_slots_are_not_cached_as_pages(allocator):
    cache = RadixCache(allocator, allocator.page_size)
    scope = CacheScope("model", 0, None, "", LayoutKey.of({"page_size": allocator.page_size}))
    slots, tokens = allocator.alloc(8), np.arange(2 * allocator.page_size)
    refused(allocator, lambda: cache.insert(scope, tokens, slots[:2]), "the array holds slots")
    assert cache.cached_pages == 0
    cache.check_integrity()


def test_of_a_copy_only_the_counts_speak():
    allocator = PagedTokenToKVPoolAllocator(40, 4)
    pages = allocator.pages.take([2])
    allocator.free(pages * 4)
    with pytest.raises(DoubleFreeError):
        allocator.pages.release(pages.copy())


@pytest.mark.parametrize("state", [None, "restored"])
def test_an_array_is_known_after_its_pages_have_gone(allocator, state):
    before = allocator.backup_state()
    pages, slots = allocator.pages.take([2]), allocator.alloc(4)
    allocator.pages.release(pages)
    allocator.free(slots)
    if state:
        allocator.restore_state(before)
    refused(allocator, lambda: allocator.free(pages), "page ids")
    refused(allocator, lambda: allocator.pages.release(slots), "holds slots")


def test_one_page_is_released_as_several_are():
    pool = PagedTokenToKVPoolAllocator(40, 4).pages
    first, second = pool.take([2]).tolist()
    pool.retain([first])
    pool.release_one(first)
    pool.release_one(second)
    assert pool.ref_count([first, second]).tolist() == [1, 0]
    pool.check_integrity([first])
    for wrong in (second, 0, -1, 11, 2**40):
        with pytest.raises(DoubleFreeError):
            pool.release_one(wrong)
    for wrong in (1.0, True, None, "1"):
        with pytest.raises(ShapeError):
            pool.release_one(wrong)
    pool.check_integrity([first])
