from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from prefix_pages import PAGE_SIZE, page_format, random_pages, same_bits, scope
from safetensors import safe_open
from safetensors.numpy import save_file

from engine.errors import ConfigError, ShapeError
from engine.memory.offload import store as prefix_store
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat, PrefixSegment
from engine.memory.offload.store import PrefixStore

FORM = page_format()
WINDOWED = replace(FORM, windows=(None, 1024))


@pytest.fixture
def rng():
    return np.random.default_rng()


def make_segment(rng, *, first_page=0, pages=3, form=FORM, of=None, group=0):
    tokens = rng.integers(0, 2**31 - 1, (first_page + pages) * PAGE_SIZE).astype(np.int32)
    return PrefixSegment(of or scope(), tokens, first_page, random_pages(rng, form, pages), group)


def same_segment(left, right):
    return (
        (left.scope, left.first_page, left.group) == (right.scope, right.first_page, right.group)
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
    tier = HostTier(10 * WINDOWED.page_bytes, WINDOWED)
    segments = [make_segment(rng, pages=n, of=scope(salt=str(n)), group=n % 2) for n in (2, 3, 4)]
    for each in segments:
        tier.put(each.scope, each.token_ids, each.first_page, each.data, each.group)
    PrefixStore(tmp_path, WINDOWED).save(tier.segments())
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
from prefix_pages import page_format
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.store import PrefixStore
form = replace(page_format(), windows={WINDOWED.windows})
tier = HostTier(10 * form.page_bytes, form)
for each in PrefixStore(__import__("pathlib").Path({str(tmp_path)!r}), form).load():
    tier.put(each.scope, each.token_ids, each.first_page, each.data, each.group)
tier.check_integrity()
assert "jax" not in sys.modules
__import__("numpy").save({str(tmp_path / "count.npy")!r}, tier.held_pages)
PrefixStore(__import__("pathlib").Path({str(tmp_path)!r}), form).save(tier.segments())
"""
    run_python(code)
    assert np.load(tmp_path / "count.npy") == 9
    assert_loads(tmp_path, segments, WINDOWED)


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
from engine.memory.offload.page_format import PrefixSegment
from engine.memory.offload.store import PrefixStore
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
        WINDOWED,
        replace(FORM, windows=(1024,)),
    ],
)
def test_a_foreign_page_format_is_refused_with_the_fields_that_differ(rng, tmp_path, caplog, other):
    PrefixStore(tmp_path, other).save(
        [PrefixSegment(scope(), np.arange(other.page_size), 0, random_pages(rng, other, 1))]
    )
    assert_loads(tmp_path, [])
    assert "the page format of prefix-00000000.safetensors is another: " in caplog.text


def test_other_windows_are_refused_with_both_named(rng, tmp_path, caplog):
    PrefixStore(tmp_path, replace(FORM, windows=(None, 512))).save([make_segment(rng, group=1)])
    assert_loads(tmp_path, [], WINDOWED)
    assert "is another: windows [None, 512] (here [None, 1024])" in caplog.text


@pytest.mark.parametrize(
    ("form", "refusal"),
    [
        (FORM, None),
        (WINDOWED, "is another: windows [None] (here [None, 1024]); make both with the same settings"),
        (replace(FORM, windows=(1024,)), "is another: windows [None] (here [1024])"),
        (replace(FORM, windows=(None, None)), "is another: windows [None] (here [None, None])"),
        (page_format(layer_num=1), "is another: layer_num 2 (here 1)"),
    ],
)
def test_a_file_from_before_there_were_groups_is_read_where_there_is_one_of_full_attention(
    tmp_path, caplog, form, refusal
):
    path = tmp_path / "prefix-00000000.safetensors"
    without = {name: value for name, value in FORM.to_dict().items() if name != "windows"}
    pages = np.random.default_rng().integers(0, 256, FORM.page_bytes, np.uint8)
    forge(path, header={"version": 2, "page_format": without}, pages=pages, without="group")
    data = pages.view(FORM.dtype).reshape(1, *FORM.page_shape)
    expected = [] if refusal else [PrefixSegment(scope(), np.arange(PAGE_SIZE, dtype=np.int32), 0, data)]
    assert_loads(tmp_path, expected, form)
    assert [refusal in record.getMessage() for record in caplog.records] == [True] * bool(refusal)


def test_a_segment_of_no_group_is_not_saved(rng, tmp_path):
    with pytest.raises(ShapeError, match="group=1 is none of the 1 groups"):
        PrefixStore(tmp_path, FORM).save([make_segment(rng, group=1)])
    assert_loads(tmp_path, [])


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
    for directory in (tmp_path / "file" / "below", tmp_path / "nul\0", None, 5, b"bytes"):
        with pytest.raises(ConfigError, match="cannot keep prefixes in"):
            PrefixStore(directory, FORM)


def test_a_store_takes_its_directory_as_text_or_path_and_its_page_format(tmp_path):
    assert PrefixStore(str(tmp_path / "text"), FORM).directory.is_dir()
    with pytest.raises(ConfigError, match="it must be a PageFormat"):
        PrefixStore(tmp_path, FORM.to_dict())


@pytest.mark.parametrize("theirs", [None, 5, [1], "ab"])
def test_a_page_format_that_is_no_mapping_is_refused(theirs):
    with pytest.raises(ConfigError, match="page format of x"):
        FORM.require_same(theirs, "x")


@pytest.mark.parametrize(
    ("layer_num", "dtype", "layout"),
    [
        (2, FORM.dtype, None),
        (2, "no dtype", FORM.layout),
        (2, None, FORM.layout),
        (True, FORM.dtype, FORM.layout),
        (2, ">f4", page_format(np.float32).layout),  # the same name, and every number another
    ],
)
def test_parts_of_a_page_format_that_are_none_are_refused(layer_num, dtype, layout):
    with pytest.raises(ConfigError):
        PageFormat(layer_num, dtype, layout)


def test_a_page_format_takes_any_name_of_a_dtype_and_keeps_a_layout_of_its_own():
    layout = dict(page_format(np.float32).layout)
    form = PageFormat(2, "float32", layout)
    layout["page_size"] *= 2
    assert form == page_format(np.float32)


def start_python(code):
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{Path(__file__).parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


SLOW_WRITER = """
import os, pathlib, sys
import numpy as np
from prefix_pages import PAGE_SIZE, page_format, random_pages, scope
from engine.memory.offload.page_format import PrefixSegment
from engine.memory.offload.store import PrefixStore
real = os.fsync
def pause(descriptor):
    if not os.path.isdir(f"/proc/self/fd/{{descriptor}}"):
        print("writing", flush=True)
        sys.stdin.readline()
    real(descriptor)
os.fsync = pause
rng = np.random.default_rng()
segments = [PrefixSegment(scope(), np.full(PAGE_SIZE, {value}, np.int32), 0, random_pages(rng, page_format(), 1))] * 2
print(PrefixStore(pathlib.Path({directory!r}), page_format()).save(segments), flush=True)
"""


def test_engines_that_start_leave_what_a_living_one_writes(rng, tmp_path):
    old = [make_segment(rng) for _ in range(2)]
    PrefixStore(tmp_path, FORM).save(old)
    writer = start_python(SLOW_WRITER.format(value=7, directory=str(tmp_path)))
    for written in range(2):
        assert writer.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob("*.tmp"))) == 1
        loaded = list(PrefixStore(tmp_path, FORM).load())
        assert [int(each.token_ids[0]) for each in loaded[:written]] == [7] * written
        assert all(same_segment(*pair) for pair in zip(loaded[written:], old[written:], strict=True))
        assert len(list(tmp_path.glob("*.tmp"))) == 1
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert writer.stdout.readline() == "2\n"
    writer.communicate(timeout=60)
    assert writer.returncode == 0


def test_a_save_waits_for_a_save_in_progress_and_the_last_save_is_whole(rng, tmp_path):
    writer = start_python(SLOW_WRITER.format(value=7, directory=str(tmp_path)))
    assert writer.stdout.readline() == "writing\n"
    segments = [make_segment(rng) for _ in range(3)]
    second = threading.Thread(target=PrefixStore(tmp_path, FORM).save, args=[segments])
    second.start()
    time.sleep(0.2)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]  # the first one's, and nothing else yet
    writer.communicate("\n\n", 60)
    assert writer.returncode == 0
    second.join(60)
    assert_loads(tmp_path, segments)
    assert len(list(tmp_path.iterdir())) == 3


def test_many_saves_at_once_leave_one_whole_save(rng, tmp_path):
    saves = [[make_segment(rng) for _ in range(n)] for n in (1, 2, 3, 4)]
    failed = []

    def save_often(segments):
        try:
            for _ in range(5):
                PrefixStore(tmp_path, FORM).save(segments)
                list(PrefixStore(tmp_path, FORM).load())
        except BaseException as error:  # must fail the test, not its thread
            failed.append(error)

    threads = [threading.Thread(target=save_often, args=[segments]) for segments in saves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    loaded = list(PrefixStore(tmp_path, FORM).load())
    assert any(
        len(loaded) == len(save) and all(same_segment(*pair) for pair in zip(loaded, save, strict=True))
        for save in saves
    )


def test_a_save_that_waited_too_long_raises_and_changes_nothing(rng, tmp_path, monkeypatch):
    writer = start_python(SLOW_WRITER.format(value=7, directory=str(tmp_path)))
    assert writer.stdout.readline() == "writing\n"
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(prefix_store, "_LOCK_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="another process has been saving prefixes"):
        PrefixStore(tmp_path, FORM).save([make_segment(rng)])
    assert sorted(tmp_path.iterdir()) == before
    writer.kill()
    writer.communicate()
    PrefixStore(tmp_path, FORM).save([])  # the lock ended with its process, and what it wrote is left over
    assert not list(tmp_path.iterdir())


def test_where_the_file_system_has_no_locks_it_is_said_and_nothing_temporary_is_touched(
    rng, tmp_path, monkeypatch, caplog
):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(prefix_store.fcntl, "flock", no_locks)
    temporary = tmp_path / f"prefix-00000000.safetensors.{'0' * 32}.tmp"
    temporary.write_text("another's")
    segments = [make_segment(rng)]
    PrefixStore(tmp_path, FORM).save(segments)
    assert "has no locks" in caplog.text
    assert_loads(tmp_path, segments)
    assert temporary.read_text() == "another's"


def test_a_file_that_vanishes_while_it_is_read_is_skipped(rng, tmp_path, monkeypatch, caplog):
    segments = [make_segment(rng) for _ in range(3)]
    PrefixStore(tmp_path, FORM).save(segments)
    loading = PrefixStore(tmp_path, FORM).load()
    assert same_segment(next(loading), segments[0])
    (tmp_path / "prefix-00000001.safetensors").unlink()
    assert [same_segment(each, segments[2]) for each in loading] == [True]
    assert not caplog.records


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{here}/{path.name}")  # the path itself may be too long for a socket
        os.close(here)


STRANGE = {
    "directory": lambda path: path.mkdir(),
    "full directory": lambda path: (path.mkdir(), (path / "mine").write_text("")),
    "pipe": make_fifo,
    "socket": make_socket,
    "dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a segment": lambda path: path.symlink_to(path.parent / "prefix-00000000.safetensors"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["prefix-00000001.safetensors", "prefix-00000001.safetensors.tmp"])
def test_what_is_no_file_is_named_left_out_and_left_alone(rng, tmp_path, caplog, kind, name):
    segments = [make_segment(rng) for _ in range(3)]
    PrefixStore(tmp_path, FORM).save(segments[:1])
    STRANGE[kind](tmp_path / name)
    before = (tmp_path / name).lstat()
    assert_loads(tmp_path, segments[:1])
    assert name in caplog.text
    store = PrefixStore(tmp_path, FORM)
    assert store.save(segments) == 3
    assert_loads(tmp_path, segments)
    assert store.save([]) == 0
    assert (tmp_path / name).lstat().st_ino == before.st_ino


def test_a_leftover_that_cannot_be_removed_is_named_and_the_rest_loads(rng, tmp_path, monkeypatch, caplog):
    """As in a directory that is read only; a test may run as a user to whom none is."""
    segments = [make_segment(rng)]
    PrefixStore(tmp_path, FORM).save(segments)
    leftover = tmp_path / f"prefix-00000001.safetensors.{'a' * 32}.tmp"
    leftover.write_text("")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        assert_loads(tmp_path, segments)
    assert leftover.name in caplog.text
    list(PrefixStore(tmp_path, FORM).load())
    assert not leftover.exists()


def test_a_temporary_file_that_names_no_writer_is_left_until_it_is_old(tmp_path):
    young, old = (tmp_path / f"prefix-0000000{n}.safetensors.tmp" for n in (1, 2))
    for path in (young, old):
        path.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    list(PrefixStore(tmp_path, FORM).load())
    assert (young.exists(), old.exists()) == (True, False)


def test_a_directory_that_is_gone_or_no_longer_one_loads_nothing(rng, tmp_path):
    store = PrefixStore(tmp_path / "here", FORM)
    (tmp_path / "here").rmdir()
    assert list(store.load()) == []
    (tmp_path / "here").write_text("")
    assert list(store.load()) == []


def forge(path, *, header=None, tokens=None, pages=None, without=None):
    """A file with a digest that is right for whatever it says."""
    whole = {
        "format": prefix_store.FORMAT,
        "version": prefix_store.VERSION,
        "page_format": FORM.to_dict(),
        "scope": scope().key_bytes().decode(),
        "first_page": 0,
        "group": 0,
    }
    whole.pop(without, None)
    text = header if isinstance(header, str) else json.dumps(whole | (header or {}))
    tokens = np.arange(PAGE_SIZE, dtype=np.int32) if tokens is None else tokens
    pages = np.zeros(FORM.page_bytes, np.uint8) if pages is None else pages
    metadata = {"header": text, "digest": prefix_store._digest(text, tokens, pages)}
    save_file({"token_ids": tokens, "pages": pages}, path, metadata)
    path.chmod(0o600)


DEEP = "[" * 100_000 + "]" * 100_000
FORGED = {
    "scope: a number": {"header": {"scope": 5}},
    "scope: a list": {"header": {"scope": ["m", 0]}},
    "scope: null": {"header": {"scope": None}},
    "scope: deep": {"header": {"scope": DEEP}},
    "scope: lone surrogate": {"header": {"scope": "\ud800"}},
    "scope: layout no pairs": {"header": {"scope": '["m",0,null,"",[5]]'}},
    "header: deep": {"header": DEEP},
    "header: a number": {"header": "5"},
    "header: a list": {"header": "[]"},
    "header: not JSON": {"header": "{"},
    "page_format: a number": {"header": {"page_format": 5}},
    "page_format: pairs": {"header": {"page_format": [["a", 1]]}},
    "page_format: null": {"header": {"page_format": None}},
    "first_page: text": {"header": {"first_page": "0"}},
    "first_page: true": {"header": {"first_page": True}, "tokens": np.arange(2 * PAGE_SIZE, dtype=np.int32)},
    "first_page: a fraction": {"header": {"first_page": 0.0}},
    "first_page: negative": {"header": {"first_page": -1}, "tokens": np.arange(0, dtype=np.int32)},
    "first_page: huge": {"header": {"first_page": 10**300}},
    "group: text": {"header": {"group": "0"}},
    "group: true": {"header": {"group": False}},
    "group: none": {"without": "group"},
    "group: of no layers": {"header": {"group": 1}},
    "group: negative": {"header": {"group": -1}},
    "version: text": {"header": {"version": str(prefix_store.VERSION)}},
    "version: old": {"header": {"version": 1}},
    "version: before groups, with groups": {"header": {"version": 2, "page_format": WINDOWED.to_dict()}},
    "version: before groups, no format": {"header": {"version": 2, "page_format": None}},
    "format: list": {"header": {"format": []}},
    "tokens: no vector": {"tokens": np.zeros((2, 2), np.int32)},
    "tokens: one number": {"tokens": np.zeros((), np.int32)},
    "tokens: floats": {"tokens": np.zeros(PAGE_SIZE)},
    "tokens: beyond int32": {"tokens": np.full(PAGE_SIZE, 2**64 - 1, np.uint64)},
    "tokens: too few": {"tokens": np.arange(PAGE_SIZE - 1, dtype=np.int32)},
    "pages: half a page": {"pages": np.zeros(FORM.page_bytes // 2, np.uint8)},
    "pages: no bytes": {"pages": np.zeros(FORM.page_bytes // 4, np.float32)},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_file_whose_digest_is_right_and_whose_content_is_not_is_named_and_left_out(rng, tmp_path, caplog, what):
    segments = [make_segment(rng)]
    PrefixStore(tmp_path, FORM).save(segments)
    forge(tmp_path / "prefix-00000001.safetensors")
    assert len(list(PrefixStore(tmp_path, FORM).load())) == 2  # the forger knows his trade
    forge(tmp_path / "prefix-00000001.safetensors", **FORGED[what])
    assert_loads(tmp_path, segments)
    assert "prefix-00000001.safetensors is not restored" in caplog.text


@pytest.mark.parametrize("pages", [2**40, 2**20])
def test_a_file_larger_than_memory_is_left_out_without_reading_it(tmp_path, caplog, pages):
    """A sparse file of unwritten zeros: one page of tokens, and as many bytes of pages as a disk has."""
    forge(tmp_path / "honest")
    with safe_open(tmp_path / "honest", framework="np") as file:
        metadata = file.metadata()
    size = 4 * PAGE_SIZE
    header = {
        "__metadata__": metadata,
        "token_ids": {"dtype": "I32", "shape": [PAGE_SIZE], "data_offsets": [0, size]},
        "pages": {"dtype": "U8", "shape": [pages], "data_offsets": [size, size + pages]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "prefix-00000000.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size + pages)
    assert_loads(tmp_path, [])
    assert f"{pages} bytes are not the 1 pages" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        (99_000_000).to_bytes(8, "little") + b"{" * 1000,
        (200_000).to_bytes(8, "little") + DEEP.encode(),
    ],
    ids=["huge header", "header beyond the file", "deep header"],
)
def test_a_header_that_no_file_can_have_is_named_and_left_out(tmp_path, caplog, content):
    (tmp_path / "prefix-00000000.safetensors").write_bytes(content)
    assert_loads(tmp_path, [])
    assert "prefix-00000000.safetensors is not restored" in caplog.text


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_files_and_the_directory_made_for_them_are_their_users_alone(rng, tmp_path, umask):
    before = os.umask(umask)
    try:
        PrefixStore(tmp_path / "made", FORM).save([make_segment(rng)])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").iterdir()] == [0o600]


def test_a_directory_that_others_can_write_is_said_so_and_what_they_wrote_is_left_out(rng, tmp_path, caplog):
    tmp_path.chmod(0o777)
    segments = [make_segment(rng) for _ in range(2)]
    PrefixStore(tmp_path, FORM).save(segments)
    assert "can be written by other users" in caplog.text
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o777  # it may be meant so
    (tmp_path / "prefix-00000000.safetensors").chmod(0o666)
    assert_loads(tmp_path, segments[1:])
    assert "prefix-00000000.safetensors is not restored: it can be written by other users" in caplog.text


def test_a_scope_that_is_none_is_not_saved(rng, tmp_path):
    with pytest.raises(ConfigError, match="scope is a str"):
        PrefixStore(tmp_path, FORM).save([make_segment(rng, of="m")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [[[1, 2], [3]], np.array([2**64 - 1] * 4, np.uint64), [2**31] * 4, [1.0] * 4])
def test_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ShapeError, match=r"token[_ ]id"):
        FORM.check_pages(tokens, 0, np.zeros((1, *FORM.page_shape), FORM.dtype))
