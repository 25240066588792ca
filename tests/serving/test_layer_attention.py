import jax.numpy as jnp
import numpy as np
import pytest
from serving_support import make_llama
from windowed_steps import make_runner, play, relative_error

from engine.attention import AttentionMetadata, FlashAttentionBackend
from engine.errors import ConfigError
from engine.layer_groups import first_kept_page
from engine.serving.device.batcher import parcel_shapes
from engine.serving.device.device_rows import DeviceRows
from engine.serving.device.layer_attention import LayerAttention
from engine.serving.device.parcel import NOWHERE, SHARED_PAGES

PAGE = 4


def backend(window=None, **options):
    sizes = {"page_size": PAGE, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 12}
    return FlashAttentionBackend(sliding_window=window, **sizes, **options)


@pytest.mark.parametrize(
    ("windows", "impl"),
    [
        ((7, 7, None, 7, 7, None), "cpu"),
        ((None, 5, 5, 5, 19), "xla"),
        ((6, None), "reference"),
        ((9, 9), "cpu"),
    ],
)
def test_unlike_layers_over_shared_buffers_compute_what_dense_layers_do(windows, impl):
    """Pages behind a window are taken by other sequences and groups at once, and all that nobody holds is NaN."""
    error, rows = relative_error(play(windows, impl))
    assert rows >= 24
    assert error < 2e-5


@pytest.mark.parametrize("impl", ["cpu", "xla"])
def test_several_layers_write_one_buffer_in_place(impl):
    windows = (7, None, 7, 7, None, 7)
    runner, shape, groups = make_runner(make_llama(num_hidden_layers=6), windows, impl, pages=10_000)
    memory = runner._steps[shape].memory_analysis()
    assert (groups.num_buffers, groups.num_groups) == (2, 3)
    assert memory.alias_size_in_bytes >= runner.pool.kv_size_bytes
    assert memory.temp_size_in_bytes < runner.pool.kv_size_bytes / 20


def test_layers_of_equal_options_share_one_backend():
    made = LayerAttention.of([backend(8), backend(), backend(8), backend(8, soft_cap=3.0)])
    assert made.backends[0] is made.backends[2]
    assert [each.soft_cap for each in made.backends] == [None, None, None, 3.0]
    assert [each.sliding_window for each in made.backends] == [8, None, 8, 8]


def test_a_model_without_layers_has_no_attention():
    with pytest.raises(ConfigError, match="without layers"):
        LayerAttention.of([])


def test_sinks_and_static_options_reach_the_layer_they_belong_to():
    layers = [backend(3, sm_scale=0.3), backend(soft_cap=0.7), backend(3, soft_cap=2.0), backend(sm_scale=0.2)]
    attention, rng = LayerAttention.of(layers), np.random.default_rng()
    q, k, v = (jnp.asarray(rng.standard_normal((6, heads, 12)), jnp.float32) for heads in (4, 2, 2))
    sinks = jnp.asarray(rng.standard_normal((len(layers), 4)), jnp.float32)
    tables = 1 + rng.permutation(2 * attention.groups.num_groups).reshape(-1, 1, 2)
    metadata = [AttentionMetadata.build(table, [0, 6], [6], num_tokens=6, page_size=PAGE) for table in tables]
    empty = jnp.zeros(((1 + tables.size) * PAGE, 4, 12))
    attend = attention.over([empty] * attention.groups.num_buffers, metadata)
    for layer, each in enumerate(layers):
        own = sinks[layer] if layer % 2 else None
        expected, _ = each(q, k, v, empty, metadata[0], sinks=own)
        np.testing.assert_allclose(attend(layer, q, k, v, own), expected, atol=2e-6)


def test_the_device_reads_each_groups_pages_and_none_that_a_window_has_left():
    rng = np.random.default_rng()
    rows, groups, columns, window = 5, 3, 7, 10
    table = rng.integers(1, 1000, (rows, groups, columns)).astype(np.int32)
    places = rng.permutation(table.size)
    sent = jnp.asarray([*places, NOWHERE], jnp.int32), jnp.asarray([*table.reshape(-1)[places], 7], jnp.int32)
    device = DeviceRows.empty(rows, groups, columns).with_pages(*sent)
    asked, computed = np.array([3, NOWHERE, 0, 4], np.int32), (27, 0, 9, 13)
    first = np.array([first_kept_page(window, count, PAGE) for count in computed], np.int32)
    for group in range(groups):
        expected = table[np.minimum(asked, rows - 1), group]
        expected[asked == NOWHERE] = 0
        np.testing.assert_array_equal(device.pages_of(jnp.asarray(asked), group), expected)
        expected[np.arange(columns) < first[:, None]] = 0
        np.testing.assert_array_equal(device.pages_of(jnp.asarray(asked), group, jnp.asarray(first)), expected)


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_a_parcel_has_room_for_the_pages_that_its_tokens_begin_in_every_group(groups):
    rng = np.random.default_rng()
    for shape in parcel_shapes(8, 256, 16, groups):
        for _ in range(20):
            ends = np.sort(rng.integers(0, shape.tokens + 1, shape.rows - 1))
            counts, starts = np.diff(ends, prepend=0, append=shape.tokens), rng.integers(0, 100, shape.rows)
            begun = int((-(-(starts + counts) // 16) - -(-starts // 16)).sum())
            assert groups * begun <= shape.updates - SHARED_PAGES
