from __future__ import annotations

import subprocess
import sys

import pytest

from engine.attention.impl.tpu.block_sizes import VMEM_BYTES
from engine.attention.impl.tpu.tpu_entry import GENERATIONS, target_generation
from engine.errors import BackendUnsupported


def test_every_generation_that_is_taken_has_block_sizes() -> None:
    assert set(GENERATIONS.values()) == set(VMEM_BYTES)


def test_a_cpu_is_no_tpu() -> None:
    with pytest.raises(BackendUnsupported, match="'cpu'"):
        target_generation()


@pytest.mark.parametrize("module", ["engine.attention", "engine.kv", "engine.bench.__main__"])
def test_importing_loads_neither_libtpu_nor_pallas(module: str) -> None:
    loaded = "[name for name in sys.modules if name.startswith(('libtpu', 'jax.experimental.pallas'))]"
    assert subprocess.run([sys.executable, "-c", f"import sys, {module}; sys.exit(bool({loaded}))"]).returncode == 0
