"""Layers are shared out over groups of equal sizes, each layer at one place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.layer_groups import MAX_GROUPS, LayerGroups, first_kept_page, most_pages_held


@given(st.lists(st.sampled_from([None, 4, 128, 1024]), min_size=1, max_size=80))
def test_every_layer_has_a_place_of_its_own_in_a_group_of_its_window(windows):
    groups = LayerGroups.of(windows)
    assert len(set(groups.places)) == len(windows)
    assert [groups.windows[place.group] for place in groups.places] == windows
    assert {place.buffer for place in groups.places} == set(range(groups.num_buffers))
    assert groups.num_groups <= MAX_GROUPS
    assert groups.empty_places == groups.num_groups * groups.num_buffers - len(windows)


@pytest.mark.parametrize(
    ("layers", "every", "window", "groups", "buffers", "empty"),
    [
        (62, 6, 1024, 7, 10, 8),  # Gemma 3 27B: 52 windowed and 10 full layers
        (26, 6, 512, 7, 4, 2),  # Gemma 3 1B
        (46, 2, 4096, 2, 23, 0),  # Gemma 2 27B
        (24, 2, 128, 2, 12, 0),  # gpt-oss-20b
    ],
)
def test_groups_of_models_that_are_known(layers, every, window, groups, buffers, empty):
    found = LayerGroups.of([None if (layer + 1) % every == 0 else window for layer in range(layers)])
    assert (found.num_groups, found.num_buffers, found.empty_places) == (groups, buffers, empty)
    assert found.windows == (None,) + (window,) * (groups - 1)


def test_layers_of_one_kind_are_one_group_in_their_order():
    assert LayerGroups.of([None] * 32).places == tuple((0, layer) for layer in range(32))
    assert LayerGroups.of([64] * 5).windows == (64,)


def test_few_layers_of_another_kind_do_not_cut_the_rest_into_many_groups():
    assert LayerGroups.of([None] * 27 + [4096]).num_groups <= MAX_GROUPS


@pytest.mark.parametrize("window", [0, -1, True, 1.5, "8"])
def test_a_window_below_one_token_is_refused(window):
    with pytest.raises(ConfigError, match=r"the window of layer 1 is .*; it must be 1 token or more, or None"):
        LayerGroups.of([None, window])


def test_layers_of_unequal_bytes_are_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"a window of 512: 2,048 bytes per token; full attention: 4,096 bytes"):
        LayerGroups.of([None, 512], [4096, 2048])


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="without layers"):
        LayerGroups.of([])


@given(
    window=st.integers(1, 40), page=st.integers(1, 9), ahead=st.integers(1, 20), end=st.integers(1, 120), data=st.data()
)
def test_no_way_to_a_length_holds_more_pages_than_said(window, page, ahead, end, data):
    computed = data.draw(st.integers(0, end))
    granted = min(end, computed + data.draw(st.integers(0, ahead)))
    held = -(-granted // page) - first_kept_page(window, computed, page)
    assert held <= most_pages_held(window, end, page, ahead) <= most_pages_held(None, end, page, ahead)


@given(window=st.integers(1, 40), page=st.integers(1, 9), computed=st.integers(0, 120))
def test_just_the_pages_behind_the_window_are_not_kept(window, page, computed):
    first = first_kept_page(window, computed, page)
    seen = range(max(0, computed - window + 1), computed + 1)  # by the next token, at position ``computed``
    assert first == seen[0] // page
