"""The tuner's logic, with a timer of the test: what is tried, what is remembered, and the table that is read back."""

import json
import re

import pytest

from engine.attention.impl.tpu import block_sizes
from engine.attention.impl.tpu.block_sizes import VMEM_BYTES, VMEM_SHARE, load_overrides
from engine.bench import tune
from engine.bench.__main__ import main
from engine.bench.tpu.tuning import Journal, Target, best, candidates, formula, scratch_bytes, search, write_overrides

LLAMA = Target("v6e", heads=8, group=4, head_dim=128, page_size=16, dtype="bfloat16")


def seconds(target, mode, blocks):
    """A made-up machine: decode likes to fetch 4,096 tokens in chunks of 512, prefill 512 queries in chunks of 256."""
    if mode == "decode":
        return 1 + abs(blocks.decode_fetch_pages - 256) + abs(blocks.decode_chunk_pages - 32)
    return 1 + abs(blocks.prefill_queries - 512) + abs(blocks.prefill_chunk_pages - 16)


def run(journal, timer=seconds, targets=(LLAMA,)):
    return [trial for _, trial in search(targets, timer, journal)]


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("generation", ["v5e", "v6e", "v7x"])
def test_candidates_are_whole_distinct_and_fit_vmem(generation, page_size):
    for heads, dtype in ((8, "bfloat16"), (1, "float8_e4m3fn"), (4, "float32")):
        target = Target(generation, heads, 4, 128, page_size, dtype)
        start = formula(target)
        for mode in ("decode", "prefill"):
            tried = candidates(target, mode, start)
            assert tried, target
            assert len(set(tried)) == len(tried)
            for blocks in tried:
                assert blocks.decode_fetch_pages % blocks.decode_chunk_pages == 0
                assert blocks.prefill_fetch_pages % blocks.prefill_chunk_pages == 0
                assert blocks.prefill_queries % 8 == 0
                assert scratch_bytes(target, blocks) <= VMEM_BYTES[generation] * VMEM_SHARE


def test_a_smaller_vmem_leaves_fewer_candidates():
    many, few = (Target(generation, 16, 4, 128, 128, "bfloat16") for generation in ("v6e", "v7x"))
    assert len(candidates(few, "decode", formula(few))) < len(candidates(many, "decode", formula(many)))


def test_the_fastest_of_each_mode_is_found_and_read_back_by_choose_blocks(tmp_path, monkeypatch):
    table, journal = tmp_path / "overrides.json", Journal(tmp_path / "trials")
    run(journal)
    assert write_overrides(table, [LLAMA], journal) == 1
    monkeypatch.setattr(block_sizes.load_overrides.__wrapped__, "__defaults__", (table,))
    load_overrides.cache_clear()
    try:
        found = formula(LLAMA)
    finally:
        load_overrides.cache_clear()
    assert (found.decode_fetch_pages, found.decode_chunk_pages) == (256, 32)
    assert (found.prefill_queries, found.prefill_chunk_pages) == (512, 16)


def test_an_interrupted_search_continues_where_it_was(tmp_path):
    calls = []

    def breaks_down(target, mode, blocks):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append((mode, blocks))
        return seconds(target, mode, blocks)

    with pytest.raises(KeyboardInterrupt):
        run(Journal(tmp_path / "trials"), breaks_down)
    with (tmp_path / "trials").open("a") as file:
        file.write('{"target": {"generation')  # the power went while a line was written
    resumed = []

    def counts(target, mode, blocks):
        resumed.append((mode, blocks))
        return seconds(target, mode, blocks)

    journal = Journal(tmp_path / "trials")
    assert len(journal.trials) == 5
    trials = run(journal, counts)
    assert len(calls) + len(resumed) == len(trials)
    assert not set(calls) & set(resumed)
    assert [t.seconds for t in Journal(tmp_path / "trials").trials] == [t.seconds for t in journal.trials]


def test_what_does_not_compile_is_noted_and_passed_over(tmp_path):
    fastest = []

    def refuses_the_fastest(target, mode, blocks):
        if mode == "decode" and (blocks.decode_fetch_pages, blocks.decode_chunk_pages) == (256, 32):
            fastest.append(blocks)
            raise RuntimeError("Ran out of memory in memory space vmem")
        return seconds(target, mode, blocks)

    journal = Journal(tmp_path / "trials")
    run(journal, refuses_the_fastest)
    (failed,) = [trial for trial in journal.trials if trial.seconds is None]
    assert failed.blocks == fastest[0]
    assert "vmem" in failed.failed
    assert best(journal, LLAMA, "decode") not in (None, fastest[0])
    run(Journal(tmp_path / "trials"), lambda *_: pytest.fail("nothing is left to try"))


def test_the_table_keeps_others_entries_and_is_whole_or_as_before(tmp_path, monkeypatch):
    table, journal = tmp_path / "overrides.json", Journal(tmp_path / "trials")
    other = Target("v5e", 2, 4, 128, 32, "bfloat16")
    table.write_text(json.dumps([other.entry(formula(other)), LLAMA.entry(formula(LLAMA))]))
    before = table.read_text()
    run(journal)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_overrides(table, [LLAMA], journal)
    assert table.read_text() == before
    write_overrides(table, [LLAMA], journal)
    entries = json.loads(table.read_text())
    assert [entry["generation"] for entry in entries] == ["v5e", "v6e"]
    assert len(load_overrides(table)) == 2


def test_nothing_is_tuned_where_there_is_no_tpu(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "tune"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert re.search(r"BackendUnsupported: .*not on 'cpu'", capsys.readouterr().err)
    monkeypatch.setattr(tune, "target_generation", lambda: "v6e")
    monkeypatch.setattr("sys.argv", ["bench", "tune", "--gen", "v5e"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "cannot tune for v5e on a v6e" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
