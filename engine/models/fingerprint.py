"""A model's fingerprint: equal for models that compute with equal numbers, whatever file or object they came from."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Executor, ThreadPoolExecutor
from enum import Enum
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.models.sharding import key_names

PIECE_BYTES = 16 << 20  # bytes that a thread hashes at a time
THREADS = 8
_RULE = "model fingerprint 1"  # a change of what is hashed takes another number
_SETTINGS = (bool, int, float, str, type(None), np.generic, np.dtype, Enum, ModelConfig)


def fingerprint(model: Decoder) -> str:
    """A SHA-256 over every byte of every weight and over every setting of every module, as hexadecimal digits.

    Settings are the configuration, the dtypes, and what a module derives from them, such as a norm's epsilon: every
    plain value, since one too many costs a cache hit and one too few gives wrong answers. How the weights are split
    over devices does not count. Up to ``THREADS`` cores hash 1 to 2 GB/s each, and the host holds one weight at a time.
    Where processes share the weights, all must call it, because the weights are gathered.

    Args:
        model: the model as it is served; it is not changed.
    """
    digest = hashlib.sha256(json.dumps([_RULE, settings_of(model)]).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    with ThreadPoolExecutor(THREADS) as threads:
        for path, leaf in leaves:
            digest.update(json.dumps([key_names(path), str(leaf.dtype), list(leaf.shape)]).encode())
            digest.update(_digest_of(_on_host(leaf), threads))
    return digest.hexdigest()


def settings_of(model: Decoder) -> list[tuple[str, str, str, str]]:
    """Path, module, name and value of each plain attribute of each module: a compiled program depends on all."""
    settings = []
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, _SETTINGS) or (isinstance(value, type) and issubclass(value, np.generic)):
                settings.append(("/".join(map(str, path)), type(module).__name__, name, repr(value)))
    return sorted(settings)


def _on_host(leaf: Any) -> np.ndarray[Any, Any]:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable and isinstance(leaf.sharding, NamedSharding):
        leaf = jax.jit(_same, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
    # A second array over the same memory, since jax keeps the host's copy for as long as the array lives.
    parts = [shard.data for shard in leaf.addressable_shards]
    array: np.ndarray[Any, Any] = jax.device_get(
        jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    )
    return array


def _same(leaf: jax.Array) -> jax.Array:
    return leaf


def _digest_of(array: np.ndarray[Any, Any], threads: Executor) -> bytes:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, data.size, PIECE_BYTES)]
    return hashlib.sha256(b"".join(threads.map(_sha256, pieces))).digest()


def _sha256(data: np.ndarray[Any, Any]) -> bytes:
    return hashlib.sha256(data.data).digest()
