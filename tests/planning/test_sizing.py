import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.layer_groups import LayerGroups, first_kept_page
from engine.planning import PageDemand, PoolPlan, format_bytes, require_page_table, require_room, size_pool

GIB = 2**30


def layers_of(page_size, layers, ahead_tokens=1):
    """The groups of layers, a number of full ones or a list of their windows, and the pages that requests take."""
    groups = LayerGroups.of([None] * layers if isinstance(layers, int) else layers)
    return groups, PageDemand(groups.windows, page_size, ahead_tokens)


def plan_of(size_tokens, page_size=16, layers=16, ahead_tokens=1, **changes):
    sizes = {"token_bytes": 4096, "context_length": 131_072}
    return PoolPlan(size_tokens, *layers_of(page_size, layers, ahead_tokens), **sizes | changes)


def test_a_device_that_does_not_say_its_memory_gets_what_is_wanted_in_whole_pages():
    assert size_pool(*layers_of(16, 2), token_bytes=64, wanted_pages=3) == 48


@given(
    page_size=st.integers(1, 256),
    layers=st.integers(1, 80),
    token_bytes=st.integers(1, 65536),
    device_bytes=st.integers(2**20, 2**37),
    fraction=st.floats(0.01, 0.99),
)
def test_pool_and_weights_stay_within_their_share(page_size, layers, token_bytes, device_bytes, fraction):
    weight_bytes = device_bytes // 3
    of_layers = layers_of(page_size, layers)
    try:
        size = size_pool(
            *of_layers,
            token_bytes=token_bytes,
            wanted_pages=10**12,
            device_bytes=device_bytes,
            weight_bytes=weight_bytes,
            mem_fraction_static=fraction,
        )
    except ConfigError:
        assert 2 * page_size * layers * token_bytes > device_bytes * fraction - weight_bytes
        return
    used = PoolPlan(size, *of_layers, token_bytes, context_length=1).total_bytes + weight_bytes
    assert size >= page_size
    assert size % page_size == 0
    assert used <= device_bytes * fraction < used + 2 * page_size * layers * token_bytes


def test_a_pool_that_cannot_hold_a_page_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"0\.5 of 1\.00 MiB less 400\.00 KiB of weights leaves 112\.00 KiB"):
        size_pool(
            *layers_of(16, 32),
            token_bytes=4096,
            wanted_pages=1,
            device_bytes=2**20,
            weight_bytes=400 * 1024,
            mem_fraction_static=0.5,
        )


def test_the_plan_of_llama_3_8b_is_what_the_arithmetic_says():
    # 8 KV heads of 128 in bf16, K and V: 4 KiB per token and layer, 128 KiB per token.
    plan = plan_of(8192 * 4, layers=32, context_length=8192)
    assert plan.pages == 2048
    assert plan.layer_bytes == (8192 * 4 + 16) * 4096
    assert plan.max_concurrency == 4.0
    assert "32,768 tokens in 2,048 pages of 16" in plan.describe()
    assert plan.describe() == (
        "KV cache size: 32,768 tokens in 2,048 pages of 16, 128.06 MiB per layer, 4.00 GiB in 32 layers; maximum "
        "concurrency for 8,192 tokens per request: 4.00x"
    )


def test_concurrency_counts_whole_pages():
    plan = plan_of(64, layers=1, token_bytes=1, context_length=17)
    assert plan.max_concurrency == 2.0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (2**30 * 3 // 2, "1.50 GiB")]
)
def test_bytes_are_printed_in_the_largest_unit(count, text):
    assert format_bytes(count) == text


def test_a_request_that_the_memory_cannot_hold_is_refused_with_the_longest_context_that_fits():
    # 64 KiB per token: 2 GiB less 1 GiB hold 16 Ki tokens, the null page's 16 among them.
    options = {"token_bytes": 4096, "wanted_pages": 10**9, "device_bytes": 4 * GIB}
    options |= {"weight_bytes": GIB, "mem_fraction_static": 0.5}
    assert size_pool(*layers_of(16, 16), **options, request_tokens=16_368) == 16_368
    with pytest.raises(
        ConfigError, match=r"16,369 tokens: its pool takes 1\.00 GiB, 0\.5 of 4\.00 GiB less"
    ) as refused:
        size_pool(*layers_of(16, 16), **options, request_tokens=16_369)
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
    with pytest.raises(ConfigError, match=r"32,768 pages .*for each of 4 groups of layers\) takes 2\.00 GiB"):
        require_page_table(2**14, 2**17, 16, 4)


def pages_held(window, tokens, page_size, ahead):
    """The most pages of a sequence in a group: it computes ``ahead`` tokens a step and gives back what none can see."""
    most, computed = 0, 0
    while computed < tokens:
        granted = min(computed + ahead, tokens)
        first = 0 if window is None else first_kept_page(window, computed, page_size)
        most, computed = max(most, -(-granted // page_size) - first), granted
    return most


@given(
    windows=st.lists(st.sampled_from([None, 3, 16, 40]), min_size=1, max_size=12),
    page_size=st.integers(1, 16),
    tokens=st.integers(1, 200),
    ahead=st.integers(1, 50),
)
def test_a_request_never_holds_more_pages_than_are_planned_for_it(windows, page_size, tokens, ahead):
    groups, demand = layers_of(page_size, windows, ahead)
    held = sum(pages_held(window, tokens, page_size, ahead) for window in groups.windows)
    assert held <= demand.most_pages(tokens) <= held + groups.num_groups * (1 + -(-ahead // page_size))
    # One page per group for the offset of the window in its page, and the last step's tokens.


@given(
    windows=st.lists(st.sampled_from([None, 16, 40]), min_size=1, max_size=8),
    pages=st.integers(1, 500),
    most=st.integers(1, 3000),
)
def test_the_longest_context_that_fits_fits_and_no_longer_one_does(windows, pages, most):
    _, demand = layers_of(16, windows, 20)
    longest = demand.most_tokens(pages, most)
    assert longest == max((n for n in range(most + 1) if demand.most_pages(n) <= pages), default=0)


def test_a_pool_of_gemma_3_27b_serves_what_its_groups_hold():
    # Five of six layers have a window: 10 full layers, and 52 with a window in six groups, the last with 2 of 10.
    windows = [None if layer % 6 == 5 else 1024 for layer in range(62)]
    plan = plan_of(16 * 40_000, layers=windows, ahead_tokens=2048, context_length=131_072)
    assert plan.buffers == 10
    assert plan.total_bytes == 10 * (16 * 40_000 + 16) * 4096
    assert plan.model_token_bytes == 62 * 4096
    # 131,072 tokens are 8,192 pages. A window and a chunk of 2,048 before it lie in 1 + 3,071 / 16 pages, 193.
    most, decoding = 8192 + 6 * 193, 8192 + 6 * 66
    assert plan.demand.most_pages(131_072) == most
    assert plan.max_concurrency == 1 + (40_000 - most) / decoding
    text = plan.describe()
    assert "1 group of 10 full layers, 6 groups of 10 layers with a window of 1,024" in text
    assert "131,072 tokens in 8,192 pages of the group with full attention" in text
    assert "3,088 tokens in 193 pages of each of 6 groups with a window of 1,024" in text
    assert f"{most:,} pages, {format_bytes(most * 16 * 10 * 4096)}" in text
    wasted = 193 * 8 / (most * 10)
    assert f"8 of 70 places in the groups have no layer, which wastes {wasted:.2%}" in text
    assert format_bytes(int(wasted * plan.total_bytes)) in text
    short = plan_of(16 * most - 16, layers=windows, ahead_tokens=2048)
    assert short.max_concurrency == (most - 1) / most


def test_requests_of_windows_hold_little_while_they_decode_and_the_prompt_that_is_computed_more():
    _, demand = layers_of(16, [None, 64, 64, 64], 512)
    assert demand.requests_in(8 * (256 + 3 * 6) + 3 * (37 - 6), 4096) == 8


def test_the_automatic_size_has_room_for_what_the_windows_of_every_request_have_passed():
    windows = [None, 64, 64, 64]
    groups, demand = layers_of(16, windows, 512)
    pages = demand.pages_of(8, 4090)
    assert pages == 8 * 4 * 256 > 2 * 8 * demand.most_pages(4090)
    assert size_pool(groups, demand, token_bytes=1, wanted_pages=pages) == 16 * pages
