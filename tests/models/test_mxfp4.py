"""Weights in four bits: every number of the format, parts of a weight, and whole checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_model import random_model
from safetensors.numpy import load_file, save_file
from tiny_families import tiny

from engine.errors import CheckpointError, ConfigError
from engine.models.checkpoint import load_config, load_model, save_model
from engine.models.model_config import ModelConfig
from engine.models.mxfp4 import PackedTensor, decoded, with_packed
from engine.models.tensor_files import stored_tensors

EXPERTS = "model.layers.1.mlp.experts"
# A width that blocks of 32 divide for the one weight, and that of the other is two blocks.
CONFIG = ModelConfig(**tiny("gpt_oss", hidden_size=64, intermediate_size=32))


def number_of(nibble: int) -> float:
    """A number of E2M1 by its definition: a sign, two bits of exponent (bias 1), one of mantissa."""
    exponent, mantissa = nibble >> 1 & 3, nibble & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if nibble & 8 else size


def decode_by_definition(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 ``[..., B * 32]``, a byte at a time."""
    numbers = np.empty((*blocks.shape, 2))
    for index in np.ndindex(blocks.shape):
        power = 2.0 ** (int(scales[index[:-1]]) - 127)
        byte = int(blocks[index])
        numbers[index] = number_of(byte & 15) * power, number_of(byte >> 4) * power
    return numbers.reshape(*scales.shape[:-1], -1)


def random_packed(outputs: int, inputs: int, experts: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng()
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
    return blocks, rng.integers(118, 127, blocks.shape[:-1], np.uint8)


def test_every_byte_and_every_scale_decodes_by_its_definition() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for scale in (0, 1, 100, 126, 127, 128, 252):
        scales = np.full(16, scale, np.uint8)
        np.testing.assert_array_equal(decoded(blocks, scales), decode_by_definition(blocks, scales))
    assert np.isnan(decoded(blocks, np.full(16, 255, np.uint8))).all()


def test_bfloat16_holds_the_numbers_exactly() -> None:
    blocks, scales = random_packed(8, 64)
    numbers = decoded(blocks, scales)
    np.testing.assert_array_equal(numbers.astype(jnp.bfloat16).astype(np.float32), numbers)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with packed experts, and the weights that they stand for."""
    save_model(random_model(CONFIG), tmp_path)
    tensors, plain = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = random_packed(outputs, inputs, experts)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = decode_by_definition(blocks, scales).swapaxes(1, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_checkpoint_loads_as_the_weights_that_it_stands_for(
    packed: tuple[Path, dict[str, Any]], dtype: str
) -> None:
    directory, plain = packed
    loaded = load_model(directory, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(loaded))} == {jnp.dtype(dtype)}
    for index, layer in enumerate(loaded.layers):
        for name in ("gate_up_proj", "down_proj"):
            got = np.asarray(getattr(layer.mlp.experts, name)[...]).astype(np.float64)
            np.testing.assert_array_equal(got, plain[f"model.layers.{index}.mlp.experts.{name}"])


def test_any_part_of_a_packed_weight_is_the_part_of_the_whole(packed: tuple[Path, dict[str, Any]]) -> None:
    directory, plain = packed
    tensors = with_packed(stored_tensors(directory))
    tensor = tensors[f"{EXPERTS}.gate_up_proj"]
    assert isinstance(tensor, PackedTensor)
    whole = plain[f"{EXPERTS}.gate_up_proj"]
    assert tensor.shape == whole.shape == (8, 64, 64)
    rng = np.random.default_rng()
    for _ in range(20):
        bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
        index = tuple(slice(int(first), int(last)) for first, last in bounds)[: rng.integers(0, 4)]
        np.testing.assert_array_equal(tensor.read(index).astype(np.float64), whole[index])


def test_the_published_quantisation_is_accepted_and_others_are_refused(packed: tuple[Path, dict[str, Any]]) -> None:
    config = CONFIG.to_hf()
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    assert ModelConfig.from_hf(config | {"quantization_config": method}) == load_config(packed[0])
    for wrong in ({"quant_method": "fp8"}, {}, [], "mxfp4"):
        with pytest.raises(ConfigError, match="quantization_config"):
            ModelConfig.from_hf(config | {"quantization_config": wrong})
    with pytest.raises(ConfigError, match="quantization_config"):
        ModelConfig.from_hf(ModelConfig(**tiny("qwen3")).to_hf() | {"quantization_config": method})


def test_parts_that_do_not_fit_are_named(packed: tuple[Path, dict[str, Any]]) -> None:
    path = packed[0] / "model.safetensors"
    tensors = load_file(path)
    scales = f"{EXPERTS}.down_proj_scales"
    save_file(tensors | {scales: tensors[scales][..., :-1].copy()[:, :-1]}, path)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks is .* and .*down_proj_scales"):
        load_model(packed[0], dtype="float32")
    del tensors[scales]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing \[\S*experts\.down_proj\].*down_proj_blocks"):
        load_model(packed[0], dtype="float32")
