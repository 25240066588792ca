"""The counted bundles of the kernel: within the bars on v6e, and no worse than the baseline of this libtpu."""

from pathlib import Path

import pytest
from aot_support import NEEDS_LIBTPU

from engine.bench.static_options import read_baseline
from engine.bench.tpu import baseline
from engine.bench.tpu.libtpu import libtpu_version, missing_compiler
from engine.bench.tpu_static import measure

pytestmark = NEEDS_LIBTPU

BASELINE = read_baseline(Path(__file__).with_name("static_baseline.json"), libtpu_version()) if not missing_compiler() \
    else {}  # fmt: skip
FAST = ["v6e page 128", "v6e page 16"]


@pytest.fixture(scope="module")
def found():
    return dict(zip(FAST, measure([baseline.SHAPES[name] for name in FAST]), strict=True))


@pytest.fixture(scope="module")
def found_slowly():
    rest = [name for name in baseline.SHAPES if name not in FAST]
    return dict(zip(rest, measure([baseline.SHAPES[name] for name in rest]), strict=True))


def compare(name, figures):
    if not BASELINE:
        pytest.skip(
            f"libtpu {libtpu_version()} has no baseline: code differs between its versions, so there is nothing to "
            "compare with; write one with python -m engine.bench tpu-static --write-baseline"
        )
    assert baseline.regressions(BASELINE[name], figures) == []


@pytest.mark.parametrize("name", FAST)
def test_no_worse_than_the_baseline(found, name):
    compare(name, found[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in baseline.SHAPES if name not in FAST])
def test_other_shapes_are_no_worse_than_the_baseline(found_slowly, name):
    compare(name, found_slowly[name])


# Decode of tpu-inference costs 1.80 and 2.25 bundles per token there, and its prefill reaches 143,000.
@pytest.mark.parametrize(("name", "most"), [("v6e page 128", 1.5), ("v6e page 16", 1.7)])
def test_decode_and_prefill_are_within_the_bars(found, name, most):
    figures = found[name]
    assert figures["decode bundles per token"] <= most
    assert figures["prefill FLOPs per bundle"] >= 180_000
    # A tenth of 12,763 spills and 21,002 fills, the figures of tpu-inference's prefill loop.
    assert figures["prefill hot loop spills"] <= 1276
    assert figures["prefill hot loop fills"] <= 2100
