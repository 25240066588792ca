"""Reading compiled programs: loops, slots, instructions and what a baseline calls worse."""

import json

import pytest

from engine.bench import tpu_static
from engine.bench.static_options import read_baseline, write_baseline
from engine.bench.tpu import baseline
from engine.bench.tpu.bundles import read_program
from engine.bench.tpu.figures import find_lanes, rival_figures
from engine.bench.tpu.hlo import aliases, collectives, instructions, kernel_vmem_bytes, launches, moves_of_at_least
from engine.errors import BackendUnsupported

# (loop begins here, depth, MXU instructions) of each bundle: a loop of two blocks' loops as the kernel has them.
LANE = [
    (True, 2, 0),  # block
    (True, 3, 0),  # fetch, a run
    (True, 4, 0), (False, 4, 0), (False, 4, 0),  # a page at a time
    (False, 3, 0),
    (False, 2, 0),
    (True, 3, 2), (False, 3, 2),  # whole chunks
    (False, 2, 0),
    (True, 3, 2), (False, 3, 2), (False, 3, 2),  # edges
    (False, 2, 0),
]  # fmt: skip
BUNDLES = [(False, 0, 0), (True, 1, 0), *LANE, (False, 1, 0), (True, 1, 0), *LANE, (False, 1, 0), (False, 0, 0)]


def dump(folder, bundles=BUNDLES):
    lines = [f"  {i:#x}   {'LB' if begins else '  '}: {'> ' * depth}{{ ... }}" for i, (begins, depth, _) in
             enumerate(bundles)]  # fmt: skip
    (folder / "1-kernel-03-final_bundles.txt").write_text("header\n" + "\n".join(lines))
    table = "== CAPACITY:\nMXU, VALU, VLOAD:FILL, VSTORE:SPILL\n 2 4 3 2\n\n== UTILIZATION:\n"
    rows = [f"{mxu} 4 1 0" for _, _, mxu in bundles]
    (folder / "1-kernel-01-final_hlo-static-per-bundle-utilization.txt").write_text(table + "\n".join(rows))
    return folder / "1-kernel-03-final_bundles.txt"


def test_loops_nest_as_they_are_marked(tmp_path):
    program = read_program(dump(tmp_path))
    first, second = program.root.children
    assert (first.first, first.bundles, second.first) == (1, 16, 17)
    (block,) = first.children
    assert [loop.bundles for loop in block.children] == [5, 2, 3]
    assert block.children[0].children[0].bundles == 3
    assert block.own_bundles == 4
    assert program.use(block.children[1]) == {"MXU": 1.0, "VALU": 1.0, "FILL": 1 / 3, "SPILL": 0.0}
    assert sum(1 for _ in program.root.walk()) == 1 + 2 * 6


def test_a_block_costs_its_turns(tmp_path):
    decode, prefill = find_lanes(read_program(dump(tmp_path)), 2)
    assert decode.block.first < prefill.block.first
    # 4 chunks of 2, 3 groups of 2 (of 5 when their pages go one by one), and 4 more; the edge is not the steady state.
    assert decode.bundles(4, 3, 1, scattered=False) == 4 * 2 + 3 * 2 + 4
    assert decode.bundles(4, 3, 1, scattered=True) == 4 * 2 + 3 * 5 + 4
    assert prefill.bundles(1, 1, 8, scattered=False) == 8 * 2 + 2 + 4


def test_a_program_that_is_not_the_kernel_is_refused(tmp_path):
    with pytest.raises(BackendUnsupported, match="1 loops over blocks"):
        find_lanes(read_program(dump(tmp_path, BUNDLES[:17])), 2)


def test_the_rivals_blocks_are_counted_with_what_is_around_the_loop(tmp_path):
    one = [(False, 0, 0), (True, 1, 0), (False, 1, 0), (True, 2, 2), (False, 2, 2), (False, 1, 0)]
    program = read_program(dump(tmp_path, one))
    found = rival_figures(program, program, decode_tokens=10, prefill_flops=100, chunks=3)
    assert found["decode bundles per token"] == 5 / 10
    assert found["prefill FLOPs per bundle"] == 300 / (5 + 2 * 2)
    assert found["prefill FLOPs per bundle, compute alone"] == 50


HLO = """
%inner (q: bf16[4,8]) -> bf16[4,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %held = bf16[4,8]{1,0} copy(%q)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel.1 = (bf16[2,8]{1,0}, /*index=1*/bf16[4,8]{1,0}) custom-call(%p), custom_call_target="tpu_custom_call", \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %copy.2 = bf16[4,8]{0,1} copy(%p)
  %fusion.3 = bf16[3]{0} fusion(%p), kind=kLoop, calls=%inner
  %gather = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%p), dimensions={0}
  %small = f8e4m3fn[3]{0} negate(%p)
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%kernel.1), index=1
}
"""


def test_instructions_carry_the_bytes_of_their_largest_array():
    found = {i.name: (i.opcode, i.largest_bytes) for i in instructions(HLO)}
    assert found["kernel.1"] == ("custom-call", 64)
    assert found["small"] == ("negate", 3)
    assert moves_of_at_least(HLO, 64) == ["copy copy.2: 64 bytes"]
    assert collectives(HLO) == ["all-gather bf16[16]"]
    assert kernel_vmem_bytes(HLO) == {"kernel.1": 4096}


LAUNCHING = """
%region (a: s32[], b: s32[]) -> s32[] {
  ROOT %sum = s32[] add(%a, %b)
}

%body (t: (s32[], s32[4])) -> (s32[], s32[4]) {
  %t = (s32[], s32[4]{0}) parameter(0)
  %f1 = s32[4]{0} fusion(%t), kind=kLoop, calls=%inner
  %copy.1 = s32[4]{0} copy(%f1)
  ROOT %next = (s32[], s32[4]{0}) tuple(%f1, %copy.1)
}

%short (p: s32[4]) -> s32[4] {
  ROOT %p = s32[4]{0} parameter(0)
}

%long (p.1: s32[4]) -> s32[4] {
  %p.1 = s32[4]{0} parameter(0)
  ROOT %f2 = s32[4]{0} fusion(%p.1), kind=kLoop, calls=%inner
}

ENTRY %main (x: s32[4]) -> s32[4] {
  %x = s32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %sums = s32[] reduce(%x, %zero), dimensions={0}, to_apply=%region
  %start = (s32[], s32[4]{0}) tuple(%zero, %x)
  %known = (s32[], s32[4]{0}) while(%start), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  %unknown = (s32[], s32[4]{0}) while(%known), condition=%less, body=%body
  %either = s32[4]{0} conditional(%sums, %x, %x), branch_computations={%short, %long}
  %moving = (s32[4]{0}, s32[4]{0}) copy-start(%either)
  %moved = s32[4]{0} copy-done(%moving)
  %kernel = s32[4]{0} custom-call(%moved), custom_call_target="mosaic_gpu_v2"
  ROOT %out = s32[4]{0} bitcast(%kernel)
}
"""


def test_launches_count_the_turns_of_loops_and_the_longest_branch():
    assert launches(LAUNCHING) == 1 + 6 * 2 + 2 + 1 + 1 + 1  # sums, known, unknown, either, moving, kernel


GOOD = {
    "decode bundles per token": 1.4,
    "prefill FLOPs per bundle": 190_000,
    "decode hot loop spills": 17,
    "prefill hot loop spills": 993,
    "VMEM bytes": 50 << 20,
}


@pytest.mark.parametrize(
    ("name", "worse", "allowed"),
    [
        ("decode bundles per token", 1.55, 1.53),
        ("prefill FLOPs per bundle", 170_000, 172_000),
        ("decode hot loop spills", 90, 80),
        ("prefill hot loop spills", 1160, 1150),
        ("VMEM bytes", 57 << 20, 55 << 20),
    ],
)
def test_more_than_a_tenth_and_the_slack_is_a_regression(name, worse, allowed):
    assert baseline.regressions(GOOD, GOOD | {name: allowed}) == []
    (line,) = baseline.regressions(GOOD, GOOD | {name: worse})
    assert line.startswith(name)
    assert len(baseline.regressions(GOOD, {key: value for key, value in GOOD.items() if key != name})) == 1


def test_a_baseline_is_kept_by_version(tmp_path):
    path = tmp_path / "baseline.json"
    assert read_baseline(path, "0.1") == {}
    write_baseline(path, "0.1", {"a": GOOD | {"not guarded": 1}}, baseline.GUARDED)
    write_baseline(path, "0.2", {"a": GOOD | {"VMEM bytes": 1}}, baseline.GUARDED)
    assert read_baseline(path, "0.1") == {"a": GOOD}
    assert read_baseline(path, "0.2")["a"]["VMEM bytes"] == 1
    assert read_baseline(path, "0.3") == {}
    assert sorted(json.loads(path.read_text())) == ["0.1", "0.2"]


def test_a_rival_whose_blocks_do_not_fit_is_compiled_with_halves_and_that_is_said(monkeypatch, capsys):
    tried = []

    def measure(shapes, target):
        tried.append(shapes[0].get("shrink", 1))
        if tried[-1] == 1:
            raise BackendUnsupported("Ran out of memory in memory space vmem. Used 72.32M of 63.94M vmem.")
        return [{"prefill blocks": [128]}]

    monkeypatch.setattr(tpu_static, "install", lambda: "nowhere")
    monkeypatch.setattr(tpu_static, "measure", measure)
    assert tpu_static.measure_rival({"gen": "v7x"}) == {"prefill blocks": [128]}
    assert tried == [1, 2]
    assert "do not fit the VMEM of v7x" in " ".join(capsys.readouterr().err.split())


def test_another_failure_of_the_rival_is_passed_on(monkeypatch):
    def measure(shapes, target):
        raise BackendUnsupported("no such instruction")

    monkeypatch.setattr(tpu_static, "install", lambda: "nowhere")
    monkeypatch.setattr(tpu_static, "measure", measure)
    with pytest.raises(BackendUnsupported, match="no such instruction"):
        tpu_static.measure_rival({"gen": "v7x"})


def test_results_that_lie_in_an_argument_are_counted():
    head = "HloModule jit_step, is_scheduled=true, input_output_alias="
    both = "{ {2}: (7, {}, may-alias), {3}: (8, {}, must-alias) }, entry_computation_layout={()->f32[8]{0}}\n"
    assert aliases(head + both) == 2
    assert aliases("HloModule jit_step, entry_computation_layout={()->f32[8]{0}}\n" + both) == 0
