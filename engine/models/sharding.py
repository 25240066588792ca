"""Which device holds which part of the weights: Megatron's columns and rows (arXiv 1909.08053) as NamedSharding rules.

Where there are more devices than KV heads, each KV head is repeated at load, so every device has a whole one. Query
heads of one KV head are neighbours, so an even split keeps them on devices that hold a copy of their KV head. Experts
are split like the MLP, each by its width: every device has a part of every expert, and the routing does not matter.
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
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # split by output: no exchange between devices
ROWS = ("o_proj", "down_proj")  # split by input: partial sums are added over the devices
REPEATED = ("k_proj", "v_proj")
# Parameters without a module of their own. Of experts the first axis counts them, and the width is that of one.
_BY_LEAF = {
    "sinks": PartitionSpec(TENSOR_AXIS),
    "gate_up_proj": PartitionSpec(None, None, TENSOR_AXIS),
    "gate_up_proj_bias": PartitionSpec(None, TENSOR_AXIS),
    "down_proj": PartitionSpec(None, TENSOR_AXIS, None),
}


def split_config(config: ModelConfig, tp: int) -> ModelConfig:
    """The geometry of a model whose heads are split ``tp`` ways: at least ``tp`` KV heads, repeated if necessary.

    Raises:
        ConfigError: ``tp`` does not divide the heads or the widths; the message lists the values that do.
    """
    wrong = _misfits(config, tp)
    if wrong:
        fitting = [str(n) for n in range(1, config.num_attention_heads + 1) if not _misfits(config, n)]
        raise ConfigError(f"tp={tp} does not divide {' and '.join(wrong)}; use tp {', '.join(fitting)}")
    return dataclasses.replace(config, num_key_value_heads=max(config.num_key_value_heads, tp))


def _misfits(config: ModelConfig, tp: int) -> list[str]:
    """The sizes that ``tp`` devices cannot divide evenly, as ``name=value``."""
    names = ["num_attention_heads", "intermediate_size"]
    if config.vocab_size % tp:
        names.append("hidden_size")  # by which the embedding is split instead
    wrong = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) % tp]
    heads = config.num_key_value_heads
    return wrong + [f"num_key_value_heads={heads} (nor is a multiple of it)"] * bool(heads % tp and tp % heads)


def weight_spec(names: Sequence[str], config: ModelConfig, tp: int) -> PartitionSpec:
    """How a parameter is split.

    Args:
        names: the parameter's path in the model, e.g. ``("layers", "0", "self_attn", "q_proj", "kernel")``.
        config: the model's geometry.
        tp: devices along the tensor axis.
    """
    module, leaf = names[-2:]
    if leaf in _BY_LEAF:
        return _BY_LEAF[leaf]
    if module in COLUMNS:
        return PartitionSpec(None, TENSOR_AXIS) if leaf == "kernel" else PartitionSpec(TENSOR_AXIS)
    if module in ROWS and leaf == "kernel":
        return PartitionSpec(TENSOR_AXIS, None)
    if module in ("embed_tokens", "lm_head"):
        # By the vocabulary where tp divides it, else by the width: [vocab, hidden] and [hidden, vocab].
        first_axis = (config.vocab_size % tp == 0) == (leaf == "embedding")
        return PartitionSpec(TENSOR_AXIS, None) if first_axis else PartitionSpec(None, TENSOR_AXIS)
    return PartitionSpec()


def weight_sharding(names: Sequence[str], config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """``weight_spec`` over a mesh."""
    return NamedSharding(mesh, weight_spec(names, config, axis_size(mesh, TENSOR_AXIS)))


def abstract_model(config: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> Decoder:
    """A model whose weights are shapes, with shardings over a mesh; nothing is allocated.

    Args:
        config: the geometry; over a mesh, that of ``split_config``.
        dtype: dtype of weights and activations.
        mesh: the mesh that the weights will lie on, or None.
    """
    model: Decoder = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
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
    """How many copies a parameter has of each stored KV head; 1 for all but the K and V projections."""
    return heads // stored_heads if names[-2] in REPEATED else 1


def shard_model(model: Decoder, mesh: Mesh | None) -> Decoder:
    """A copy of the model over a mesh, or on the device where it lies; the given model is left as it is.

    Later changes of the given model do not reach the copy: NumPy weights are copied.

    Raises:
        ConfigError: the mesh does not divide the model.
    """
    if mesh is None:
        graph, weights = nnx.split(model)
        return nnx.merge(graph, jax.tree.map(_unchanging, weights))
    config = split_config(model.config, axis_size(mesh, TENSOR_AXIS))
    split = abstract_model(config, model.dtype, mesh)
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


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights on each device; a split parameter counts by the part that a device holds."""
    total = 0
    for leaf in jax.tree.leaves(nnx.state(model)):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * jnp.dtype(leaf.dtype).itemsize
    return total
