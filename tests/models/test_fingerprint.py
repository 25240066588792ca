"""A fingerprint is equal for equal models, wherever they come from, and changes with what changes keys and values."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors import safe_open

from engine.distributed.mesh import AXES
from engine.models.checkpoint import load_model, save_model
from engine.models.decoder import Decoder
from engine.models.fingerprint import PIECE_BYTES, fingerprint, settings_of
from engine.models.model_config import ModelConfig
from engine.models.rotary import LinearScaling
from engine.models.sharding import shard_model
from engine.models.tensor_files import INDEX_FILE, SINGLE_FILE

GEOMETRY = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
GEOMETRY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def make(seed=0, dtype=jnp.float32, **changes):
    return Decoder(ModelConfig(**GEOMETRY | changes), dtype=dtype, rngs=nnx.Rngs(seed))


@pytest.fixture
def seed():
    return int(np.random.default_rng().integers(1 << 30))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_made_again_saved_and_loaded_is_the_same(seed, tmp_path, dtype):
    model = make(seed, dtype)
    save_model(model, tmp_path)
    assert fingerprint(make(seed, dtype)) == fingerprint(load_model(tmp_path, dtype=dtype)) == fingerprint(model)


def test_every_weight_counts_to_its_last_byte(seed):
    model = make(seed, attention_bias=True)
    seen = {fingerprint(model)}
    state = nnx.to_pure_dict(nnx.state(model))
    leaves, tree = jax.tree_util.tree_flatten(state)
    for index in range(len(leaves)):
        changed = list(leaves)
        bits = np.array(changed[index]).view(np.uint32)
        bits.reshape(-1)[-1 if index % 2 else bits.size // 2] ^= 1
        changed[index] = jnp.asarray(bits.view(np.float32))
        other = make(seed, attention_bias=True)
        replaced = nnx.state(other)
        nnx.replace_by_pure_dict(replaced, jax.tree_util.tree_unflatten(tree, changed))
        nnx.update(other, replaced)
        seen.add(fingerprint(other))
    assert len(seen) == len(leaves) + 1


def test_pieces_of_a_large_weight_cannot_change_places(seed):
    rows = 3 * PIECE_BYTES // (4 * 32)
    model, other = make(seed, vocab_size=rows), make(seed, vocab_size=rows)
    pieces = jnp.split(model.embed_tokens.embedding[...], 3)
    other.embed_tokens.embedding[...] = jnp.concatenate([pieces[1], pieces[0], pieces[2]])
    assert fingerprint(model) != fingerprint(other)


def test_weights_of_equal_shape_cannot_change_places(seed):
    model, other = make(seed), make(seed)
    other.layers[0].self_attn, other.layers[1].self_attn = model.layers[1].self_attn, model.layers[0].self_attn
    other.layers[0].self_attn.layer_id, other.layers[1].self_attn.layer_id = 0, 1
    assert fingerprint(make(seed)) != fingerprint(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5000.0},
        {"rms_norm_eps": 1e-3},
        {"rope_scaling": LinearScaling(factor=8.0)},
        {"model_type": "mistral", "layer_windows": (16, 16)},
        {"model_type": "mistral"},
        {"max_position_embeddings": 99},
    ],
)
def test_every_field_of_the_configuration_counts_also_where_it_is_changed_in_memory(seed, changes):
    made, overridden = make(seed, **changes), make(seed)
    overridden.config = dataclasses.replace(overridden.config, **changes)
    assert fingerprint(make(seed)) not in (fingerprint(made), fingerprint(overridden))


def test_heads_that_share_a_width_count(seed):
    assert fingerprint(make(seed)) != fingerprint(make(seed, num_attention_heads=2, num_key_value_heads=1, head_dim=16))


def test_a_setting_of_one_module_counts(seed):
    model = make(seed)
    model.layers[1].input_layernorm.epsilon = 1e-3
    assert fingerprint(model) != fingerprint(make(seed))


def test_a_setting_that_is_numpys_counts_by_its_value(seed):
    models = [make(seed) for _ in range(2)]
    for model, epsilon in zip(models, np.float32([1e-3, 1e-2]), strict=True):
        model.norm.epsilon = epsilon
    assert fingerprint(models[0]) != fingerprint(models[1])


def test_weights_that_are_numpys_are_named_as_the_same_on_a_device(seed):
    assert fingerprint(with_numpy_weights(make(seed))) == fingerprint(make(seed))


@pytest.mark.parametrize("mesh", [None, Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)])
def test_what_is_done_to_a_model_later_does_not_reach_the_one_that_an_engine_took(seed, mesh):
    model = with_numpy_weights(make(seed))
    taken = shard_model(model, mesh)
    for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))):
        leaf += 1  # NumPy's, in place
    model.config = dataclasses.replace(model.config, rope_theta=5.0)
    assert fingerprint(taken) == fingerprint(make(seed))


def with_numpy_weights(model):
    """In memory that a CPU device would share: aligned to 64 bytes."""
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, jax.tree.map(aligned, nnx.to_pure_dict(state)))
    nnx.update(model, state)
    return model


def aligned(leaf):
    room = np.empty(leaf.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    array = room[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
    array[...] = leaf
    return array


def test_the_same_numbers_in_another_compute_dtype_are_another_model(seed):
    half, wide = make(seed, jnp.bfloat16), make(seed)
    nnx.update(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(half)))
    assert fingerprint(half) != fingerprint(wide)


@pytest.mark.parametrize("how", ["update", "assign"])
def test_a_model_that_is_changed_in_place_is_another(seed, how):
    model = make(seed)
    before = fingerprint(model)
    if how == "update":
        nnx.update(model, nnx.state(make(seed + 1)))
    else:
        kernel = model.layers[0].self_attn.k_proj.kernel
        kernel[...] = kernel[...].at[3, 3].add(1.0)
    assert fingerprint(model) != before


@pytest.mark.parametrize("sharded", [False, True])
def test_a_byte_in_the_middle_of_a_checkpoint_counts_with_size_and_times_kept(seed, tmp_path, sharded):
    """Of a file so large that its ends say nothing of its middle; of shards behind links, as a cache of files has."""
    save_model(make(seed, intermediate_size=16384), tmp_path)
    path = tmp_path / SINGLE_FILE
    assert path.stat().st_size > 4 << 20
    if sharded:
        blob = tmp_path / "blob"
        path.rename(blob)
        (tmp_path / "model-00001-of-00001.safetensors").symlink_to(blob)
        names = index_of(blob)
        (tmp_path / INDEX_FILE).write_text(names)
        path = blob
    before, content, stat = load_model(tmp_path, dtype=jnp.float32), bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 0x20
    first = fingerprint(before)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert fingerprint(load_model(tmp_path, dtype=jnp.float32)) != first


def index_of(blob):
    with safe_open(blob, framework="np") as file:
        return json.dumps({"weight_map": dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")})


def test_nothing_that_an_object_or_a_process_has_of_its_own_is_hashed(seed):
    assert not any(" at 0x" in value for *_, value in settings_of(make(seed)))
