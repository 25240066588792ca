from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_model import random_model
from safetensors.numpy import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.models.checkpoint import load_config, load_model, save_model
from engine.models.decoder import Decoder
from engine.models.default_model import byte_tokenizer
from engine.models.model_config import ModelConfig
from engine.models.rotary import Llama3Scaling
from engine.models.text import load_tokenizer

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 256),
    bos_token_id=1,
    eos_token_id=(2, 3),
)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def assert_same_parameters(left: Decoder, right: Decoder) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(left), nnx.state(right))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(random_model(CONFIG), tmp_path)
    return tmp_path


def shard(directory: Path) -> tuple[Path, dict[str, str]]:
    """Splits the one weight file in two, with an index; returns the index's path and its map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    weight_map = {name: files[position % 2] for position, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def rewrite_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tie_word_embeddings=True),
        replace(CONFIG, attention_bias=True),
        replace(CONFIG, model_type="qwen2", attention_bias=True, eos_token_id=()),
        replace(CONFIG, model_type="mistral", layer_windows=(16, None)),
    ],
    ids=["untied", "tied", "biases", "qwen2", "mistral"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_saved_loads_back_bit_for_bit(tmp_path: Path, config: ModelConfig, dtype: str) -> None:
    model = random_model(config, dtype)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.config == config
    assert_same_parameters(loaded, model)


def test_loading_converts_to_the_dtype_asked_for(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(loaded))} == {jnp.dtype("bfloat16")}
    original = random_model(CONFIG)
    np.testing.assert_array_equal(
        loaded.layers[0].mlp.up_proj.kernel[...], original.layers[0].mlp.up_proj.kernel[...].astype(jnp.bfloat16)
    )


def test_saving_in_another_dtype_rounds_once(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    save_model(model, tmp_path, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")[Q_PROJ]
    assert stored.dtype == jnp.bfloat16
    kernel = np.asarray(model.layers[1].self_attn.q_proj.kernel[...])
    np.testing.assert_array_equal(stored, kernel.T.astype(jnp.bfloat16))


def test_shards_load_like_one_file(checkpoint: Path) -> None:
    shard(checkpoint)
    assert_same_parameters(load_model(checkpoint, dtype="float32"), random_model(CONFIG))


def test_redundant_tensors_are_passed_over(tmp_path: Path) -> None:
    model = random_model(replace(CONFIG, tie_word_embeddings=True))
    save_model(model, tmp_path)

    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = np.ones((61, 24), np.float32)

    rewrite_tensors(tmp_path, add)
    assert_same_parameters(load_model(tmp_path, dtype="float32"), model)


def test_end_tokens_of_the_generation_config_count_beside_those_of_the_config(checkpoint: Path) -> None:
    assert load_config(checkpoint).eos_token_id == (2, 3)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_config(checkpoint).eos_token_id == (2, 3, 9)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 8, 9]}))
    assert load_config(checkpoint).eos_token_id == (2, 3, 8, 9)
    (checkpoint / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_config(checkpoint).eos_token_id == (2, 3)


@pytest.mark.parametrize(
    ("file", "named"),
    [("config.json", r"config\.json does not exist"), ("model.safetensors", r"neither model\.safetensors nor")],
)
def test_a_missing_file_is_named(checkpoint: Path, file: str, named: str) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(CheckpointError, match=named):
        load_model(checkpoint, dtype="float32")


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere", dtype="float32")


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\udcff"])
def test_a_corrupt_config_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(checkpoint, dtype="float32")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"hidden_size": 24, "hidden_size": 32}',
        '{"rope_theta": NaN}',
        '{"rope_theta": Infinity}',
        '{"rope_theta": 1' + "0" * 5000 + "}",
    ],
    ids=["deep list", "deep table", "a key twice", "NaN", "Infinity", "a number of 5000 digits"],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_no_checkpoint_has_is_refused_by_path(checkpoint: Path, file: str, content: str) -> None:
    byte_tokenizer().save(str(checkpoint / "tokenizer.json"))
    (checkpoint / file).write_text(content)
    load = load_tokenizer if file.startswith("tokenizer") else load_config
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        load(checkpoint)


def test_a_number_too_large_for_a_float_is_refused_by_name(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 1e400'))
    with pytest.raises(ConfigError, match="rope_theta=inf"):
        load_config(checkpoint)


def test_end_tokens_of_the_generation_config_must_be_tokens(checkpoint: Path) -> None:
    for wrong in ("2", [2, "x"], 61, 2.0):
        (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ConfigError, match="eos_token_id"):
            load_config(checkpoint)


def test_what_is_no_checkpoint_folder_is_named_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "weights").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "consolidated.00.pth").write_bytes(b"")
    for name, said in {
        "model.gguf": "is a GGUF file",
        "weights": "is a file",
        "empty": r"config\.json does not exist.*holds \[\]",
        "other": r"config\.json does not exist.*holds \[consolidated",
        "meta-llama/Llama-3-8B": "a name on a hub is not fetched",
        "a" * 5000: "cannot look into",
    }.items():
        with pytest.raises(CheckpointError, match=said) as refused:
            load_model(name, dtype="float32")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "consolidated.00.pth", "model-q4.gguf"])
def test_weights_of_another_format_are_named(checkpoint: Path, other: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / other)
    with pytest.raises(CheckpointError, match=f"neither.*but {other}; convert"):
        load_model(checkpoint, dtype="float32")


@pytest.mark.parametrize("same", [True, False], ids=["the embedding again", "another head"])
def test_a_tied_model_with_another_stored_head_says_that_it_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, same: bool
) -> None:
    model = random_model(replace(CONFIG, tie_word_embeddings=True))
    save_model(model, tmp_path)
    embedding = np.asarray(model.embed_tokens.embedding[...])
    head = embedding if same else np.random.default_rng(3).normal(size=embedding.shape).astype(np.float32)
    rewrite_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert_same_parameters(load_model(tmp_path, dtype="float32"), model)
    assert ("is not used" in caplog.text) != same


def test_an_unsupported_model_is_refused_before_its_weights_are_looked_at(checkpoint: Path) -> None:
    rewrite_config(checkpoint, model_type="gemma")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="gemma"):
        load_model(checkpoint, dtype="float32")


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=lambda kept: f"{kept} bytes")
def test_a_truncated_file_is_refused(checkpoint: Path, kept: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_model(checkpoint, dtype="float32")


def test_a_corrupt_header_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_model(checkpoint, dtype="float32")


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    rewrite_tensors(checkpoint, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=r"1 tensors missing \[model\.layers\.1\.self_attn\.q_proj\.weight\]"):
        load_model(checkpoint, dtype="float32")


def test_an_unexpected_tensor_is_named(checkpoint: Path) -> None:
    rewrite_tensors(checkpoint, lambda tensors: tensors.update({"model.adapter.weight": np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected \[model\.adapter\.weight\]"):
        load_model(checkpoint, dtype="float32")


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    rewrite_tensors(checkpoint, lambda tensors: tensors.update({Q_PROJ: np.ones((24, 32), np.float32)}))
    with pytest.raises(CheckpointError, match=r"q_proj.*expected \[32, 24\].*found \[24, 32\]"):
        load_model(checkpoint, dtype="float32")


def test_a_config_of_another_model_is_refused(checkpoint: Path) -> None:
    rewrite_config(checkpoint, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="9 tensors missing"):
        load_model(checkpoint, dtype="float32")


def test_quantised_tensors_are_refused(checkpoint: Path) -> None:
    rewrite_tensors(checkpoint, lambda tensors: tensors.update({Q_PROJ: np.ones((32, 24), np.int8)}))
    with pytest.raises(CheckpointError, match="I8"):
        load_model(checkpoint, dtype="float32")


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: \['model-00002-of-00002"):
        load_model(checkpoint, dtype="float32")


def test_an_index_that_points_at_the_wrong_shard_is_refused(checkpoint: Path) -> None:
    index, weight_map = shard(checkpoint)
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {weight_map[Q_PROJ]}
    index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: other.pop()}}))
    with pytest.raises(CheckpointError, match="points 1 tensors at shards that do not hold them"):
        load_model(checkpoint, dtype="float32")


def test_an_index_that_leaves_its_folder_is_refused(checkpoint: Path) -> None:
    index, weight_map = shard(checkpoint)
    index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="elsewhere"):
        load_model(checkpoint, dtype="float32")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_a_corrupt_index_is_refused(checkpoint: Path, content: str) -> None:
    index, _ = shard(checkpoint)
    index.write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(checkpoint, dtype="float32")
