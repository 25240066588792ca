import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.planning.sizing import PoolPlan, format_bytes, size_pool


def test_a_device_that_does_not_say_its_memory_gets_what_is_wanted_in_whole_pages():
    assert size_pool(page_size=16, layers=2, token_bytes=64, wanted_tokens=33) == 48


@given(
    page_size=st.integers(1, 256),
    layers=st.integers(1, 80),
    token_bytes=st.integers(1, 65536),
    device_bytes=st.integers(2**20, 2**37),
    fraction=st.floats(0.01, 0.99),
)
def test_pool_and_weights_stay_within_their_share(page_size, layers, token_bytes, device_bytes, fraction):
    weight_bytes = device_bytes // 3
    sizes = {"page_size": page_size, "layers": layers, "token_bytes": token_bytes}
    try:
        size = size_pool(
            **sizes,
            wanted_tokens=10**12,
            device_bytes=device_bytes,
            weight_bytes=weight_bytes,
            mem_fraction_static=fraction,
        )
    except ConfigError:
        assert 2 * page_size * layers * token_bytes > device_bytes * fraction - weight_bytes
        return
    used = PoolPlan(size_tokens=size, context_length=1, **sizes).total_bytes + weight_bytes
    assert size >= page_size
    assert size % page_size == 0
    assert used <= device_bytes * fraction < used + 2 * page_size * layers * token_bytes


def test_a_pool_that_cannot_hold_a_page_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"0\.5 of 1\.00 MiB less 400\.00 KiB of weights leaves 112\.00 KiB"):
        size_pool(
            page_size=16,
            layers=32,
            token_bytes=4096,
            wanted_tokens=16,
            device_bytes=2**20,
            weight_bytes=400 * 1024,
            mem_fraction_static=0.5,
        )


def test_the_plan_of_llama_3_8b_is_what_the_arithmetic_says():
    # 8 KV heads of 128 in bf16, K and V: 4 KiB a token and layer, 128 KiB a token.
    plan = PoolPlan(size_tokens=8192 * 4, page_size=16, layers=32, token_bytes=4096, context_length=8192)
    assert plan.pages == 2048
    assert plan.layer_bytes == (8192 * 4 + 16) * 4096
    assert plan.max_concurrency == 4.0
    assert "32,768 tokens in 2,048 pages of 16" in plan.describe()
    assert "4.00x" in plan.describe()


def test_concurrency_counts_whole_pages():
    plan = PoolPlan(size_tokens=64, page_size=16, layers=1, token_bytes=1, context_length=17)
    assert plan.max_concurrency == 2.0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (2**30 * 3 // 2, "1.50 GiB")]
)
def test_bytes_are_told_in_the_largest_unit(count, text):
    assert format_bytes(count) == text
