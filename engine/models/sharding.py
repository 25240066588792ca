"""Which device holds which part of the weights: Megatron's columns and rows (arXiv 1909.08053) as NamedSharding rules.

Where more devices share the heads than there are KV heads, each KV head is repeated once, here, so that every device
has a whole one and its query heads find it at home: query heads of one KV head are neighbours, so splitting them evenly
keeps each group with its copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.distributed.mesh import TENSOR_AXIS, axis_size
from engine.errors import ConfigError
from engine.models.llama import Llama
from engine.models.llama_config import LlamaConfig

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # split by output: no device waits for another
ROWS = ("o_proj", "down_proj")  # split by input: the partial sums are added up
REPEATED = ("k_proj", "v_proj")


def split_config(config: LlamaConfig, tp: int) -> LlamaConfig:
    """The geometry of a model whose heads are split ``tp`` ways: at least ``tp`` KV heads, repeated if need be.

    Raises:
        ConfigError: ``tp`` does not divide the heads or the widths; the message lists what does.
    """
    wrong = _misfits(config, tp)
    if wrong:
        fitting = [str(n) for n in range(1, config.num_attention_heads + 1) if not _misfits(config, n)]
        raise ConfigError(f"tp={tp} does not divide {' and '.join(wrong)}; use tp {', '.join(fitting)}")
    return dataclasses.replace(config, num_key_value_heads=max(config.num_key_value_heads, tp))


def _misfits(config: LlamaConfig, tp: int) -> list[str]:
    """What ``tp`` devices could not share evenly."""
    names = ["num_attention_heads", "intermediate_size"]
    if config.vocab_size % tp:
        names.append("hidden_size")  # what the embedding is split by instead
    wrong = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) % tp]
    heads = config.num_key_value_heads
    return wrong + [f"num_key_value_heads={heads} (nor is a multiple of it)"] * bool(heads % tp and tp % heads)


def weight_spec(names: Sequence[str], config: LlamaConfig, tp: int) -> PartitionSpec:
    """How a parameter is split.

    Args:
        names: its path in the model, e.g. ``("layers", "0", "self_attn", "q_proj", "kernel")``.
        config: the model's geometry.
        tp: devices along the tensor axis.
    """
    module, leaf = names[-2:]
    if module in COLUMNS:
        return PartitionSpec(None, TENSOR_AXIS) if leaf == "kernel" else PartitionSpec(TENSOR_AXIS)
    if module in ROWS and leaf == "kernel":
        return PartitionSpec(TENSOR_AXIS, None)
    if module in ("embed_tokens", "lm_head"):
        # By the vocabulary where that divides, else by the width: [vocab, hidden] and [hidden, vocab].
        first_axis = (config.vocab_size % tp == 0) == (leaf == "embedding")
        return PartitionSpec(TENSOR_AXIS, None) if first_axis else PartitionSpec(None, TENSOR_AXIS)
    return PartitionSpec()


def weight_sharding(names: Sequence[str], config: LlamaConfig, mesh: Mesh) -> NamedSharding:
    """``weight_spec`` over a mesh."""
    return NamedSharding(mesh, weight_spec(names, config, axis_size(mesh, TENSOR_AXIS)))


def abstract_llama(config: LlamaConfig, dtype: Any, mesh: Mesh | None = None) -> Llama:
    """A model of shapes: no weight is allocated; over a mesh each shape says how it is split.

    Args:
        config: the geometry, over a mesh that of ``split_config``.
        dtype: of weights and activations.
        mesh: where it will lie.
    """
    model: Llama = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    if mesh is not None:
        state = nnx.state(model)
        leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        shapes = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight_sharding(key_names(path), config, mesh))
            for path, leaf in leaves
        ]
        nnx.replace_by_pure_dict(state, jax.tree_util.tree_unflatten(tree, shapes))
        nnx.update(model, state)
    return model


def key_names(path: Sequence[Any]) -> list[str]:
    """A parameter's path as strings."""
    return [str(key.key) for key in path]


def repeats_of(names: Sequence[str], stored_heads: int, heads: int) -> int:
    """How often a parameter repeats each KV head that the checkpoint stores; 1 for all but K and V."""
    return heads // stored_heads if names[-2] in REPEATED else 1


def shard_llama(model: Llama, mesh: Mesh | None) -> Llama:
    """The same model over a mesh, or where it lies; the given one is left as it is.

    Whatever is done to that one later does not reach this one: weights that are NumPy's are copied.

    Raises:
        ConfigError: the mesh does not divide it.
    """
    if mesh is None:
        graph, weights = nnx.split(model)
        return nnx.merge(graph, jax.tree.map(_unchanging, weights))
    config = split_config(model.config, axis_size(mesh, TENSOR_AXIS))
    split = abstract_llama(config, model.dtype, mesh)
    state = nnx.state(split)
    targets, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    sources = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    arrays = []
    for (path, target), source in zip(targets, sources, strict=True):
        names = key_names(path)
        repeats = repeats_of(names, model.config.num_key_value_heads, config.num_key_value_heads)
        whole = repeat_heads(np.asarray(_unchanging(source)), repeats, config.head_dim)
        arrays.append(jax.make_array_from_callback(target.shape, target.sharding, whole.__getitem__))
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_unflatten(tree, arrays))
    nnx.update(split, state)
    return split


def _unchanging(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)  # a copy: a device may share the host's memory


def repeat_heads(array: Any, repeats: int, head_dim: int) -> Any:
    """Repeats each head on the last axis: ``[..., H * D] -> [..., H * repeats * D]``."""
    if repeats == 1:
        return array
    by_head = array.reshape(*array.shape[:-1], -1, head_dim)
    return np.repeat(by_head, repeats, axis=-2).reshape(*array.shape[:-1], -1)


def weight_bytes(model: Llama) -> int:
    """Bytes of the weights on each device: a split parameter counts by its share."""
    total = 0
    for leaf in jax.tree.leaves(nnx.state(model)):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * jnp.dtype(leaf.dtype).itemsize
    return total
