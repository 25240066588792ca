import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.planning.sizing import PoolPlan, format_bytes, require_page_table, require_room, size_pool

GIB = 2**30


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
    # 8 KV heads of 128 in bf16, K and V: 4 KiB per token and layer, 128 KiB per token.
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
def test_bytes_are_printed_in_the_largest_unit(count, text):
    assert format_bytes(count) == text


def plan_of(size_tokens, **changes):
    sizes = {"page_size": 16, "layers": 16, "token_bytes": 4096, "context_length": 131_072}
    return PoolPlan(size_tokens=size_tokens, **sizes | changes)


def test_a_request_that_the_memory_cannot_hold_is_refused_with_the_longest_context_that_fits():
    # 64 KiB per token: 2 GiB less 1 GiB hold 16 Ki tokens, the null page's 16 among them.
    options = {"page_size": 16, "layers": 16, "token_bytes": 4096, "wanted_tokens": 10**9, "device_bytes": 4 * GIB}
    options |= {"weight_bytes": GIB, "mem_fraction_static": 0.5}
    assert size_pool(**options, request_tokens=16_368) == 16_368
    with pytest.raises(
        ConfigError, match=r"16,369 tokens: its pool takes 1\.00 GiB, 0\.5 of 4\.00 GiB less"
    ) as refused:
        size_pool(**options, request_tokens=16_369)
    assert "the longest context that fits is 16,368 tokens" in str(refused.value)


@pytest.mark.parametrize(("devices", "replicas"), [(1, 1), (4, 1), (2, 2), (8, 4)])
def test_a_size_that_the_memory_cannot_hold_is_refused_with_the_largest_that_it_can(devices, replicas):
    def refused(size_tokens):
        plan = plan_of(size_tokens, devices=devices, replicas=replicas)
        with pytest.raises(ConfigError, match="no room for max_total_tokens") as error:
            require_room(plan, 4 * GIB, GIB, 0.5)
        return str(error.value)

    largest = int(refused(10**6 * 16).split("lower max_total_tokens to ")[1].split(",")[0])
    require_room(plan_of(largest, devices=devices, replicas=replicas), 4 * GIB, GIB, 0.5)
    message = refused(largest + 16 * replicas)
    assert "0.5 of 4.00 GiB less 1.00 GiB of weights leaves 1.00 GiB" in message
    assert f"one request of 131,072 tokens takes {format_bytes(8 * GIB * replicas // devices)}" in message
    assert f"the longest context that fits is {largest // replicas:,} tokens" in message


def test_a_page_table_that_no_machine_should_hold_is_refused_with_the_arithmetic():
    require_page_table(2**16, 2**16, 16)  # 1 GiB
    with pytest.raises(
        ConfigError, match=r"65,536 rows of 8,192 pages .* takes 2\.00 GiB.* to 32,768 or context_length"
    ):
        require_page_table(2**16, 2**17, 16)
    with pytest.raises(ConfigError, match="lower max_running_requests or context_length, or raise page_size"):
        require_page_table(1, 2**31 - 257, 1)
