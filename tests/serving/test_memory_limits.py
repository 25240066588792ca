"""A machine with little memory: every pool, tier and page table is sized by it, or refused before it is made."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from serving_support import make_llama

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv import pool as kv_pool
from engine.kv import room
from engine.kv.pool import TokenToKVPool
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat
from engine.models.sharding import weight_bytes
from engine.models.tensor_files import StoredTensor
from engine.planning import host_memory
from engine.serving.build import make_pool, plan_pool
from engine.serving.device.device_memory import device_memory
from engine.serving.llm import LLM

TOKEN_BYTES = 2 * 2 * 2 * 12 * 4  # 2 layers of K and V, 2 heads of 12 float32
CHEAP = {"page_size": 8, "max_running_requests": 4, "chunked_prefill_size": 4}


@pytest.fixture
def machine_with(tmp_path, monkeypatch):
    def has(available):
        monkeypatch.setattr(host_memory, "PROC", tmp_path)
        (tmp_path / "meminfo").write_text(f"MemAvailable: {available // 1024} kB\n")

    return has


def plan_of(llama, **options):
    return make_pool(EngineConfig(**CHEAP | options), llama, None)[0]


def test_the_default_pool_takes_its_share_of_what_the_machine_has(machine_with):
    llama = make_llama()
    machine_with(10 * 2**30)
    assert plan_of(llama).size_tokens == 4 * 192
    machine_with(256 * 1024)
    plan, weights = plan_of(llama), weight_bytes(llama)
    share = 0.85 * (256 * 1024 + weights)
    assert plan.total_bytes + weights <= share < plan.total_bytes + weights + 8 * TOKEN_BYTES
    assert 8 <= plan.size_tokens < 4 * 192


@pytest.mark.parametrize("windows", [(9, 9), (9, None)])
def test_the_default_pool_of_a_model_with_windows_is_as_large_as_without(machine_with, windows):
    machine_with(10 * 2**30)
    with_windows = plan_of(make_llama(model_type="mistral", layer_windows=windows))
    assert with_windows.total_bytes - with_windows.buffers * 8 * TOKEN_BYTES // 2 == 4 * 192 * TOKEN_BYTES


def test_a_planned_pool_is_never_larger_than_its_slots_can_be_numbered():
    model = make_llama(max_position_embeddings=2**20).config
    config = EngineConfig(page_size=256, max_running_requests=2**15, chunked_prefill_size=2**15)
    plan = plan_pool(config, model, "bfloat16", platform="tpu")
    assert plan.size_tokens + 256 <= 2**31 - 1 < plan.size_tokens + 2 * 256


def test_a_host_tier_is_taken_from_the_pool_of_a_cpu(machine_with):
    machine_with(256 * 1024)
    alone, beside = plan_of(make_llama()), plan_of(make_llama(), host_tier_bytes=100 * 1024)
    assert alone.total_bytes - beside.total_bytes == pytest.approx(85 * 1024, abs=8 * TOKEN_BYTES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_total_tokens": 8 * 2**20}, "no room for max_total_tokens=8388608: the pool takes .* longest context"),
        ({"max_total_tokens": 8 * (2**28 - 33)}, "lower max_total_tokens to"),
        ({"context_length": 190}, "no room for one request of 190 tokens: .* the longest context that fits is"),
        ({"host_tier_bytes": 2**30}, "host_tier_bytes=1073741824 in 1 processes takes 1.00 GiB .* lower host_tier"),
    ],
)
def test_what_the_machine_cannot_hold_is_refused_before_it_is_made(machine_with, monkeypatch, options, message):
    machine_with(72 * 1024)
    monkeypatch.setattr(kv_pool, "_zeros", lambda *_: pytest.fail("a buffer was made"))
    with pytest.raises(ConfigError, match=message):
        LLM(make_llama(), **CHEAP, **options)


def test_weights_that_the_machine_cannot_hold_are_refused_before_they_are_read(machine_with, monkeypatch):
    machine_with(2**20)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(
        ConfigError, match=r"the model of .* in float32 takes 3\.\d\d MiB of host memory and 1\.00 MiB are"
    ):
        LLM(**CHEAP, dtype="float32")


def test_a_page_table_that_is_absurd_is_refused_before_the_pool_is_made():
    llama = make_llama(max_position_embeddings=2**22)
    with pytest.raises(ConfigError, match=r"the page table of max_running_requests=65,536 rows of 524,288 pages"):
        LLM(llama, page_size=8, max_running_requests=2**16, chunked_prefill_size=2**16)


def test_virtual_devices_share_the_memory_of_their_host(machine_with):
    machine_with(2**20)
    devices = [SimpleNamespace(platform="cpu", process_index=0, memory_stats=lambda: None)] * 4
    with room.room_for("a pool", 2**18, devices):
        pass
    refused = pytest.raises(ConfigError, match=r"a pool takes 1\.00 MiB of host memory and 1\.00 MiB are available")
    with refused, room.room_for("a pool", 2**18 + 1, devices):
        pass
    memory = device_memory(devices, weight_bytes=100, host_bytes=2**18)
    assert (memory.limit_bytes, memory.used_bytes) == (3 * 2**16 + 100, 100)


def test_a_pool_larger_than_the_memory_of_its_device_is_refused(monkeypatch):
    monkeypatch.setattr(room, "report_of", lambda _: {"bytes_limit": 2**20})
    TokenToKVPool(1024, 16, "float32", 2, 12, 2)
    with pytest.raises(
        ConfigError, match=r"a pool of 4,096 tokens in 2 layers takes 1\.51 MiB on each device and .* has"
    ):
        TokenToKVPool(4096, 16, "float32", 2, 12, 2)


def test_a_pool_that_a_device_has_no_memory_for_raises_config_error(monkeypatch):
    monkeypatch.setattr(room, "require_host_memory", lambda *_: None)
    with pytest.raises(ConfigError, match="which is more than is free; make it smaller"):
        TokenToKVPool(2**31 - 32, 16, "float32", 64, 256, 1)  # 256 TiB


def test_a_pool_is_traced_whatever_the_memory(machine_with):
    machine_with(0)
    pool = jax.eval_shape(lambda: TokenToKVPool(2**20, 16, "float32", 8, 128, 32))
    assert pool.buffers[0].shape == (2**20 + 16, 16, 128)


def test_slots_that_int32_cannot_number_are_refused():
    with pytest.raises(ConfigError, match="more than 2,147,483,647 slots"):
        TokenToKVPool(2**31 - 16, 16, "float32", 1, 8, 1)


def test_a_tier_larger_than_the_memory_of_the_host_is_refused(machine_with):
    machine_with(2**20)
    pool = TokenToKVPool(64, 16, "float32", 2, 12, 2)
    page_format = PageFormat(2, dtype=np.dtype(np.float32), layout=pool.layout.to_dict())
    HostTier(2**20, page_format)
    with pytest.raises(ConfigError, match=r"a host tier of 1048577 bytes takes 1\.00 MiB of host memory"):
        HostTier(2**20 + 1, page_format)
