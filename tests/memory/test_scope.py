"""Scopes: typed, complete, and never equal by accident."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.memory.scope import Adapter, CacheScope, LayoutKey

LAYOUT = LayoutKey.of({"order": "interleaved", "page_size": 16})
names = st.text(max_size=4)
layouts = st.dictionaries(names, st.integers() | names, min_size=1, max_size=3).map(LayoutKey.of)
scopes = st.builds(CacheScope, names, st.integers(0, 9), st.none() | st.builds(Adapter, names), names, layouts)


@given(scopes, scopes)
def test_key_bytes_are_equal_just_for_equal_scopes(a, b):
    assert (a.key_bytes() == b.key_bytes()) == (a == b)


@given(scopes)
def test_a_scope_survives_the_way_through_its_key_bytes(scope):
    again = CacheScope.from_key_bytes(scope.key_bytes())
    assert again == scope
    assert hash(again) == hash(scope)


def test_the_same_name_in_different_fields_makes_different_scopes():
    made = [
        CacheScope("x", 0, None, "", LAYOUT),
        CacheScope("", 0, Adapter("x"), "", LAYOUT),
        CacheScope("", 0, Adapter(""), "x", LAYOUT),
        CacheScope("", 0, None, "x", LAYOUT),
        CacheScope("", 0, Adapter("None"), "x", LAYOUT),
        CacheScope("", 0, Adapter("null"), "x", LAYOUT),
    ]
    for a, b in itertools.combinations(made, 2):
        assert a != b
        assert a.key_bytes() != b.key_bytes()


def test_every_field_of_a_scope_is_required():
    with pytest.raises(TypeError):
        CacheScope("model", 0, None, "salt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("weights_epoch", -1),
        ("weights_epoch", True),
        ("weights_epoch", "0"),
        ("adapter", "name"),
        ("tenant_salt", None),
        ("tenant_salt", Adapter("salt")),
        ("layout", {"page_size": 16}),
        # Two halves of a surrogate pair: another string than the character, and the same bytes in JSON.
        ("tenant_salt", "\ud83d\ude00"),
        ("model", "m\ud800"),
        ("weights_epoch", 10**4000),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(field, value):
    fields = {"model": "m", "weights_epoch": 0, "adapter": None, "tenant_salt": "", "layout": LAYOUT, field: value}
    with pytest.raises(ConfigError, match=field):
        CacheScope(**fields)


@pytest.mark.parametrize("descriptor", [{}, {"page_size": 1.5}, {1: "a"}, {"page_size": True}, {"layout\udfff": 1}])
def test_a_layout_descriptor_of_other_than_names_and_numbers_is_refused(descriptor):
    with pytest.raises(ConfigError, match="layout"):
        LayoutKey.of(descriptor)


@pytest.mark.parametrize(
    "items",
    [
        None,
        (1, 2),
        ((1,),),
        (("a", 10**4000),),
        (),
        (("a", True),),
        (("b", 1), ("a", 1)),
        (("a", 1), ("a", 2)),
        (("a", 1), ("a", 1)),
        ((1, "a"),),
    ],
)
def test_a_layout_key_made_by_hand_is_checked_as_well(items):
    """True == 1 would make two keys of one layout, a field named twice one key of two."""
    with pytest.raises(ConfigError, match="layout"):
        LayoutKey(items)


@pytest.mark.parametrize("layout", [None, 5, [1], "ab", [("a", 1)]])
def test_a_layout_descriptor_that_is_no_mapping_is_refused(layout):
    with pytest.raises(ConfigError, match="a layout is a"):
        LayoutKey.of(layout)


def test_the_order_of_a_layouts_fields_does_not_matter():
    assert LayoutKey.of({"b": 1, "a": "x"}) == LayoutKey.of({"a": "x", "b": 1})


# A layout field twice, a space, a number in another form, an integer for a name, more than Python's stack, UTF-16.
SPELLINGS = [
    b'["m",0,null,"",[["a",1],["a",1]]]',
    b'["m", 0,null,"",[["a",1]]]',
    b'["m",0e0,null,"",[["a",1]]]',
    b'["m",-0,null,"",[["a",1]]]',
    b'["m",0,5,"",[["a",1]]]',
    b'["m",false,null,"",[["a",1]]]',
    b'["m",0,null,"",[["a",true]]]',
    b'["m",0,null,"\\ud83d",[["a",1]]]',
    b'["m",0,null,"",' + b"[" * 100_000 + b"]" * 100_000 + b"]",
    '["m",0,null,"",[["a",1]]]'.encode("utf-16"),
]


@pytest.mark.parametrize(
    "key", [None, 5, "", b"", b"[]", b"null", b'["m",0,null,""]', b'["m",0,null,"",{}]', b"\xff", *SPELLINGS]
)
def test_bytes_that_are_no_key_are_refused(key):
    with pytest.raises(ConfigError):
        CacheScope.from_key_bytes(key)
