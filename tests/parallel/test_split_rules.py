"""What may be split how: refusals before anything is loaded, and weights that go straight to their shards."""

from pathlib import Path

import pytest
from devices import run_on_devices

from engine.config import EngineConfig, read_toml
from engine.distributed.mesh import make_mesh
from engine.errors import ConfigError
from engine.models.model_config import ModelConfig
from engine.models.sharding import split_config
from engine.serving.build import plan_pool

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*-*.toml"))  # those with a geometry


def geometry(**changes):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    return ModelConfig(**{**sizes, **changes})


EXPERTS = {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("tp", "changes", "message"),
    [
        (5, {}, "tp=5 does not divide num_attention_heads=12 and intermediate_size=96.*; use tp 1, 2, 4, 12"),
        (24, {}, "tp=24 does not divide num_attention_heads=12"),
        (3, {}, r"tp=3 does not divide num_key_value_heads=4 \(nor is a multiple of it\); use tp 1, 2, 4, 12"),
        (4, {"vocab_size": 97, "hidden_size": 66}, "tp=4 does not divide hidden_size=66"),
        (4, EXPERTS | {"intermediate_size": 95}, "tp=4 does not divide num_local_experts=6; use tp 1, 2$"),
    ],
)
def test_a_split_that_does_not_divide_is_refused_with_what_would(tp, changes, message):
    with pytest.raises(ConfigError, match=message):
        split_config(geometry(**changes), tp)


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 4), (4, 4), (12, 12)])
def test_heads_are_repeated_only_where_devices_are_more(tp, heads):
    assert split_config(geometry(), tp).num_key_value_heads == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cp": 3}, "cp=3 does not divide page_size=16; use cp 1, 2, 4, 8, 16"),
        ({"dp": 3}, "dp=3 does not divide max_running_requests=8 and chunked_prefill_size=256; use dp 1, 2, 4, 8"),
        ({"dp": 2, "max_total_tokens": 48}, "dp=2 does not divide pages of max_total_tokens=3; use dp 1"),
        ({"tp": 0}, "tp=0 must be a whole number from 1 to"),
    ],
)
def test_the_configuration_refuses_what_does_not_divide(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_too_few_devices_are_refused_with_the_count():
    with pytest.raises(ConfigError, match="needs 4096 devices and there are"):
        make_mesh(tp=4096)


@pytest.mark.parametrize("axes", [{}, {"dp": 4}, {"cp": 8}, {"tp": 2, "dp": 2, "cp": 2}], ids=str)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_file_says_the_split_and_the_plan_is_the_whole_one_over_its_devices(tmp_path, path, axes):
    kept = [line for line in path.read_text().splitlines() if line.split("=")[0].strip() not in axes]
    (tmp_path / "split.toml").write_text("\n".join([*kept, *(f"{name} = {size}" for name, size in axes.items())]))
    tables = read_toml(tmp_path / "split.toml")
    model = ModelConfig.from_mapping(tables["model"])
    if any(model.layer_windows):  # what a window keeps depends on the tokens of a replica's step
        tables["engine"]["max_total_tokens"] = 1 << 20
    split = EngineConfig.from_mapping(tables["engine"])
    assert {name: getattr(split, name) for name in axes} == axes
    alone = EngineConfig.from_mapping({**tables["engine"], "tp": 1, "dp": 1, "cp": 1})
    one, many = (plan_pool(engine, model, "bfloat16", platform="tpu") for engine in (alone, split))
    repeats = max(1, split.tp // model.num_key_value_heads)
    null_pages = (many.replicas - 1) * many.page_size * many.token_bytes * many.buffers
    assert many.total_bytes == one.total_bytes * repeats + null_pages
    assert many.device_bytes * split.tp * split.dp * split.cp == many.total_bytes


@pytest.mark.parametrize(("kv_heads", "model_type", "dtype"), [(4, "llama", "float32"), (2, "qwen2", "bfloat16")])
def test_weights_go_from_the_file_to_their_shards(kv_heads, model_type, dtype):
    (result,) = run_on_devices("checkpoint_program.py", kv_heads, 4, model_type, dtype, devices=4)
    assert result["different"] == []
    assert result["heads"] == 4
    # Each shard is read for itself: nothing whole that is split, and of repeated heads what is stored.
    assert result["read"] == result["held"]
