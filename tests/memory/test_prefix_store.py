from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, random_pages, same_bits, scope
from safetensors.numpy import save_file

from engine.errors import ConfigError, ShapeError
from engine.memory.host_tier import HostTier
from engine.memory.prefix_segment import PrefixSegment
from engine.memory.prefix_store import PrefixStore

FORM = page_format()


@pytest.fixture
def rng():
    return np.random.default_rng()


def make_segment(rng, *, first_page=0, pages=3, form=FORM, of=None):
    tokens = rng.integers(0, 2**31 - 1, (first_page + pages) * PAGE_SIZE).astype(np.int32)
    return PrefixSegment(of or scope(), tokens, first_page, random_pages(rng, form, pages))


def same_segment(left, right):
    return (
        (left.scope, left.first_page) == (right.scope, right.first_page)
        and np.array_equal(left.token_ids, right.token_ids)
        and same_bits(left.data, right.data)
    )


def assert_loads(directory, expected, form=FORM):
    loaded = list(PrefixStore(directory, form).load())
    assert len(loaded) == len(expected)
    assert all(same_segment(*pair) for pair in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e5m2, np.int8])
def test_segments_come_back_bit_for_bit_and_in_order(rng, tmp_path, dtype):
    form = page_format(dtype)
    scopes = [scope(), scope(adapter="é", salt='"s"', epoch=7)]
    segments = [make_segment(rng, form=form, first_page=i, of=scopes[i % 2]) for i in range(12)]
    assert PrefixStore(tmp_path / "made" / "here", form).save(segments) == 12
    assert_loads(tmp_path / "made" / "here", segments, form)


def test_a_host_tier_is_restored_in_a_new_process(rng, tmp_path):
    tier = HostTier(10 * FORM.page_bytes, FORM)
    segments = [make_segment(rng, pages=n, of=scope(salt=str(n))) for n in (2, 3, 4)]
    for each in segments:
        tier.put(each.scope, each.token_ids, each.first_page, each.data)
    PrefixStore(tmp_path, FORM).save(tier.segments())
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from prefix_pages import page_format
from engine.memory.host_tier import HostTier
from engine.memory.prefix_store import PrefixStore
form = page_format()
tier = HostTier(10 * form.page_bytes, form)
for each in PrefixStore(__import__("pathlib").Path({str(tmp_path)!r}), form).load():
    tier.put(each.scope, each.token_ids, each.first_page, each.data)
tier.check_integrity()
assert "jax" not in sys.modules
__import__("numpy").save({str(tmp_path / "count.npy")!r}, tier.held_pages)
PrefixStore(__import__("pathlib").Path({str(tmp_path)!r}), form).save(tier.segments())
"""
    run_python(code)
    assert np.load(tmp_path / "count.npy") == 9
    assert_loads(tmp_path, segments)


def run_python(code, expected=0):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == expected, done.stderr


@pytest.mark.parametrize("moment", ["before the write", "half written", "before the rename", "after the rename"])
def test_a_crash_at_any_moment_leaves_whole_files_only(rng, tmp_path, moment):
    old = [make_segment(rng) for _ in range(3)]
    PrefixStore(tmp_path, FORM).save(old)
    # The new process dies while it writes the second of its two segments.
    crash = {
        "before the write": "patch(pathlib.Path, 'open', 2)",
        "half written": "patch(os, 'fsync', 3)",
        "before the rename": "patch(pathlib.Path, 'replace', 2)",
        "after the rename": "patch(os, 'fsync', 4)",
    }[moment]
    code = f"""
import os, pathlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from prefix_pages import PAGE_SIZE, page_format, random_pages, scope
from engine.memory.prefix_segment import PrefixSegment
from engine.memory.prefix_store import PrefixStore
def patch(owner, name, fatal_call):
    real, calls = getattr(owner, name), []
    def stub(*args, **kwargs):
        calls.append(args)
        if len(calls) == fatal_call:
            if {moment!r} == "half written":
                os.ftruncate(args[0], 100)
            os._exit(9)
        return real(*args, **kwargs)
    setattr(owner, name, stub)
rng = np.random.default_rng(5)
def segments():
    for value in (1, 2):
        yield PrefixSegment(scope(), np.full(PAGE_SIZE, value, np.int32), 0, random_pages(rng, page_format(), 1))
store = PrefixStore(pathlib.Path({str(tmp_path)!r}), page_format())
{crash}
store.save(segments())
"""
    run_python(code, expected=9)
    loaded = list(PrefixStore(tmp_path, FORM).load())
    new = 2 if moment == "after the rename" else 1
    assert [int(each.token_ids[0]) for each in loaded[:new]] == [1, 2][:new]
    assert all(same_segment(*pair) for pair in zip(loaded[new:], old[new:], strict=True))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_refuses_leaves_no_temporary_file(rng, tmp_path, monkeypatch):
    store, segments = PrefixStore(tmp_path, FORM), [make_segment(rng)]
    store.save(segments)

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        store.save([make_segment(rng)])
    assert [path.name for path in tmp_path.iterdir()] == ["prefix-00000000.safetensors"]
    assert_loads(tmp_path, segments)


def test_every_damaged_byte_is_refused_and_the_rest_loads(rng, tmp_path, caplog):
    segments = [make_segment(rng, pages=1) for _ in range(3)]
    PrefixStore(tmp_path, FORM).save(segments)
    victim = sorted(tmp_path.iterdir())[1]
    whole = victim.read_bytes()
    for position in {*range(0, len(whole), 11), *range(32), len(whole) - 1}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        victim.write_bytes(damaged)
        caplog.clear()
        loaded = list(PrefixStore(tmp_path, FORM).load())
        # A changed space in the padding of the header, or of a key's spelling, is no change to what is restored.
        assert len(loaded) == 2 or same_segment(loaded[1], segments[1])
        assert same_segment(loaded[0], segments[0])
        assert same_segment(loaded[-1], segments[2])
        if len(loaded) == 2:
            assert [victim.name in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file_is_refused(rng, tmp_path, caplog, length):
    segments = [make_segment(rng) for _ in range(2)]
    PrefixStore(tmp_path, FORM).save(segments)
    victim = sorted(tmp_path.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:length])
    assert_loads(tmp_path, segments[1:])
    assert "prefix-00000000.safetensors is not restored" in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        page_format(np.float16),
        page_format(layer_num=1),
        page_format(order="halves"),
        page_format(version=2),
        page_format(head_dim=6, head_num=1),
        page_format(page_size=2),
    ],
)
def test_a_foreign_page_format_is_refused_with_the_fields_that_differ(rng, tmp_path, caplog, other):
    PrefixStore(tmp_path, other).save(
        [PrefixSegment(scope(), np.arange(other.page_size), 0, random_pages(rng, other, 1))]
    )
    assert_loads(tmp_path, [])
    assert "the page format of prefix-00000000.safetensors is another: " in caplog.text


def test_another_program_s_safetensors_are_refused_and_left_alone(rng, tmp_path, caplog):
    save_file({"weight": np.ones(3)}, tmp_path / "model.safetensors")
    save_file({"weight": np.ones(3)}, tmp_path / "prefix-00000007.safetensors")
    (tmp_path / "notes.tmp").write_text("mine")
    assert_loads(tmp_path, [])
    assert "prefix-00000007" in caplog.text
    PrefixStore(tmp_path, FORM).save([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.tmp"]


def test_a_save_replaces_the_one_before(rng, tmp_path):
    store = PrefixStore(tmp_path, FORM)
    store.save([make_segment(rng) for _ in range(5)])
    segments = [make_segment(rng) for _ in range(2)]
    assert store.save(segments) == 2
    assert_loads(tmp_path, segments)


def test_a_segment_of_another_format_is_not_saved(rng, tmp_path):
    good, bad = make_segment(rng), make_segment(rng, form=page_format(np.float32))
    with pytest.raises(ShapeError, match="a page here is bfloat16"):
        PrefixStore(tmp_path, FORM).save([good, bad])
    assert_loads(tmp_path, [good])


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep prefixes in"):
        PrefixStore(tmp_path / "file" / "below", FORM)
