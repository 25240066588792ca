"""The reader of machine code, on a text small enough to be read."""

from pathlib import Path

import pytest

from engine.bench.gpu.sass import read_kernel, read_loops
from engine.errors import BackendUnsupported

CODE = """
kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
.L_x_3:
   2:-:-:Y:08        /*0010*/              @!P1 BRA `(.L_x_9)
.L_x_4:
   -:-:-:Y:01        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
   -:-:-:Y:01        /*0030*/              @UP1 UTMALDG.5D [UR8], [UR10]
   -:-:-:Y:01        /*0040*/                   LDL R3, [R1]
   2:-:-:Y:08        /*0050*/               @P1 BRA `(.L_x_4)
   -:-:-:Y:01        /*0060*/                   FFMA R3, R4, R5, R6
   2:-:-:Y:08        /*0070*/               @P2 BRA `(.L_x_3)
   -:-:-:Y:01        /*0080*/                   EXIT
.L_x_9:
   -:-:-:Y:01        /*0090*/                   NANOSLEEP 0x20
   2:-:-:Y:08        /*00a0*/                   BRA `(.L_x_4)
"""


def test_loops_are_distinguished(tmp_path: Path) -> None:
    inner, outer, waiting = read_loops(CODE)
    assert (inner.instructions, outer.instructions) == (4, 7)
    assert outer.holds(inner)
    assert not inner.holds(outer)
    assert inner.counts == {"HGMMA": 1, "UTMALDG": 1, "LDL": 1, "BRA": 1}
    assert waiting.counts["NANOSLEEP"] == 1
    assert inner.products == {(64, 64, 16): 1}
    assert inner.flops == 2 * 64 * 64 * 16


REPORT = (
    "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored\n"
    "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
    "ptxas info    : Used 168 registers, used 16 barriers\n"
)
RESOURCES = (
    "Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(arrival_count=1, "
    "num_barriers=1, orders_tensor_core=False): 2, Barrier(arrival_count=4, num_barriers=5, "
    "orders_tensor_core=False): 1}))"
)


def dump(folder: Path, report: str = REPORT, resources: str = RESOURCES) -> Path:
    (folder / "attend_7.ptxas").write_text(report)
    (folder / "attend_7.resources.txt").write_text(resources)
    (folder / "attend_7.sass_ctrl").write_text(CODE)
    return folder / "attend_7.sass_ctrl"


def test_a_kernel_is_read_with_what_stands_beside_it(tmp_path: Path) -> None:
    kernel = read_kernel(dump(tmp_path))
    assert (kernel.name, kernel.registers, kernel.spilled_bytes) == ("attend", 168, 32)
    assert kernel.shared_bytes == 1024 + 8 * (2 + 5)
    assert len(kernel.warnings) == 1
    assert [loop.instructions for loop in kernel.innermost("HGMMA")] == [4]


@pytest.mark.parametrize("other", [
    {"report": REPORT.replace("spill loads", "reloads")},
    {"report": REPORT.replace("Used", "It takes")},
    {"resources": "Resources()"},
])  # fmt: skip
def test_a_report_in_other_words_is_refused(tmp_path: Path, other: dict[str, str]) -> None:
    with pytest.raises(BackendUnsupported, match="cannot read the resources of attend"):
        read_kernel(dump(tmp_path, **other))
