"""The radix tree alone: what it finds, and what splitting leaves as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import IntegrityError
from engine.memory.prefix.tree import PrefixForest
from engine.memory.scope import CacheScope, LayoutKey

SCOPE = CacheScope("m", 0, None, "", LayoutKey.of({"page_size": 4}))


def int32(values):
    return np.array(values, np.int32)


def tree_of(page_size, sequences):
    """A forest of one tree with the whole pages of each sequence, numbered as they come; and every prefix's pages."""
    forest, pages_of, next_page = PrefixForest(page_size), {(): ()}, 1
    tree = forest.plant(SCOPE)
    for sequence in sequences:
        whole = int32(sequence[: len(sequence) // page_size * page_size])
        walk = tree.walk(whole)
        fresh = whole.size // page_size - walk.num_pages
        if fresh:
            node = walk.node
            if node.end > walk.num_pages:
                node = forest.split(node, walk.num_pages - node.start)
            pages = np.arange(next_page, next_page + fresh)
            next_page += fresh
            forest.attach(node, whole[walk.num_pages * page_size :], int32(pages), 0)
            for page in pages.tolist():
                prefix = tuple(whole[: page_size * (walk.num_pages + 1 + page - pages[0])].tolist())
                pages_of[prefix] = (*pages_of[prefix[:-page_size]], page)
    return forest, tree, pages_of


sequences = st.lists(st.lists(st.integers(-1, 1), max_size=20), max_size=8)


@given(page_size=st.sampled_from([1, 2, 5]), cached=sequences, query=st.lists(st.integers(-1, 1), max_size=20))
def test_a_walk_finds_the_longest_cached_prefix_in_whole_pages(page_size, cached, query):
    _, tree, pages_of = tree_of(page_size, cached)
    tree.check_integrity()
    for sequence in [*cached, query]:
        whole = sequence[: len(sequence) // page_size * page_size]
        longest = next(
            tuple(whole[:end]) for end in range(len(whole), -1, -page_size) if tuple(whole[:end]) in pages_of
        )
        walk = tree.walk(int32(whole))
        assert walk.num_pages * page_size == len(longest)
        assert [page for run in walk.runs for page in run.tolist()] == list(pages_of[longest])
        assert walk.node.end >= walk.num_pages >= walk.node.start


def test_a_split_keeps_the_lower_half_and_covers_both_with_the_locks():
    forest, tree, _ = tree_of(4, [range(16)])
    (node,) = tree.nodes()
    node.locks, node.level, node.stamp = 2, 3, 4
    upper = forest.split(node, 1)
    assert (upper.start, upper.end, node.start, node.end) == (0, 1, 1, 4)
    assert (upper.locks, upper.level, upper.stamp) == (2, 3, 4)
    assert list(node.path()) == [node, upper]
    assert tree.prefix_tokens(node).tolist() == list(range(16))
    tree.check_integrity()


def test_tokens_with_a_stride_match_alike():
    _, tree, _ = tree_of(4, [range(16)])
    assert tree.walk(int32(range(16)).repeat(2)[::2]).num_pages == 4
    assert tree.walk(int32([*range(9), *[0] * 7]).repeat(2)[::2]).num_pages == 2


def test_what_is_not_a_leaf_does_not_leave_the_tree():
    forest, tree, _ = tree_of(4, [range(16)])
    (node,) = tree.nodes()
    upper = forest.split(node, 2)
    for wrong in (upper, tree.root):
        with pytest.raises(IntegrityError):
            forest.cut(wrong, wrong.num_pages)
    with pytest.raises(IntegrityError):
        forest.split(tree.root, 0)
    tree.check_integrity()


def test_trimming_takes_pages_from_the_end():
    forest, tree, _ = tree_of(4, [range(16)])
    (leaf,) = tree.nodes()
    assert forest.cut(leaf, 1).tolist() == [4]
    assert tree.walk(int32(range(16))).num_pages == 3
    assert forest.cut(leaf, 2).tolist() == [2, 3]
    assert (leaf.pages.tolist(), leaf.only_page, leaf.attached) == ([1], 1, True)
    assert tree.walk(int32(range(16))).num_pages == 1


def test_a_walk_joins_nodes_of_one_page_and_of_several():
    sequences = [range(4), range(8), range(20), range(24), range(28)]  # nodes of 1, 1, 3, 1 and 1 pages
    _, tree, _ = tree_of(4, sequences)
    assert [node.num_pages for node in tree.nodes()] == [1, 1, 3, 1, 1]
    for length in range(33):
        walk = tree.walk(int32(range(length // 4 * 4)))
        assert np.concatenate([int32([]), *walk.runs]).tolist() == list(range(1, min(length // 4, 7) + 1))
        assert walk.num_pages == min(length // 4, 7)
        assert walk.node.start <= walk.num_pages <= walk.node.end


@pytest.mark.parametrize(
    "damage",
    [
        lambda node: setattr(node, "start", node.start + 1),
        lambda node: setattr(node, "tokens", node.tokens[:-1]),
        lambda node: setattr(node, "parent", node),
        lambda node: setattr(node, "attached", False),
        lambda node: setattr(node, "locks", 1),
        lambda node: setattr(node, "tokens", node.tokens + 1),
    ],
)
def test_damage_to_a_tree_is_found(damage):
    forest, tree, _ = tree_of(4, [range(16), range(8)])
    (node,) = tree.nodes()
    forest.split(node, 2)
    damage(node)
    with pytest.raises(IntegrityError, match="is wrong"):
        tree.check_integrity()
