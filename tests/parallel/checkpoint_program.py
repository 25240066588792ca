"""Loads a checkpoint over meshes and compares every shard with the whole tensors: one line of JSON a mesh."""

from __future__ import annotations

import json
import sys
import tempfile

import jax
import numpy as np
from flax import nnx
from serving_support import make_llama

from engine.distributed.mesh import make_mesh
from engine.models.checkpoint import load_model, save_model
from engine.models.sharding import key_names
from engine.models.tensor_files import StoredTensor

read_bytes = 0
whole_read = StoredTensor.read


def counted(self, *args):
    global read_bytes
    part = whole_read(self, *args)
    read_bytes += part.nbytes
    return part


StoredTensor.read = counted


def leaves(model):
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {".".join(key_names(path)): leaf for path, leaf in flat}


def expected(name, array, repeats, head_dim):
    """The parameter with each KV head repeated, head by head."""
    if repeats == 1 or name.split(".")[-2] not in ("k_proj", "v_proj"):
        return array
    heads = [array[..., i : i + head_dim] for i in range(0, array.shape[-1], head_dim)]
    return np.concatenate([head for head in heads for _ in range(repeats)], axis=-1)


def main(kv_heads, tp, model_type, dtype):
    model = make_llama(
        seed=4, num_attention_heads=8, num_key_value_heads=kv_heads, model_type=model_type, attention_bias=True
    )
    whole = leaves(model)
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, directory, dtype=dtype)
        loaded = load_model(directory, dtype=dtype, mesh=make_mesh(tp=tp))
    different = []
    for name, leaf in leaves(loaded).items():
        wanted = expected(name, np.asarray(whole[name].astype(dtype)), max(1, tp // kv_heads), 12)
        for shard in leaf.addressable_shards:
            same = np.array_equal(np.asarray(shard.data), wanted[shard.index])
            different += [] if same else [name]
    shards = [(name, shard) for name, leaf in leaves(loaded).items() for shard in leaf.addressable_shards]
    parts = {(name, str(shard.index)): shard.data.nbytes for name, shard in shards}  # copies of one part are read once
    heads = loaded.config.num_key_value_heads
    print(json.dumps({"different": different, "read": read_bytes, "held": sum(parts.values()), "heads": heads}))


main(*(json.loads(argument) for argument in sys.argv[1:]))
