"""Makes the parts of an engine from its configuration."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from flax import nnx

from engine.attention.backend import FlashAttentionBackend
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv.layout import KVLayout
from engine.kv.pool import TokenToKVPool
from engine.memory.cache_manager import CacheManager
from engine.memory.host_tier import HostTier
from engine.memory.page_format import PageFormat
from engine.memory.page_mover import PageMover
from engine.memory.prefix_cache import EvictionPolicyName
from engine.memory.prefix_store import PrefixStore
from engine.models.llama import Llama
from engine.models.llama_config import LlamaConfig
from engine.planning.sizing import PoolPlan, size_pool

_names_of_models: WeakKeyDictionary[Llama, str] = WeakKeyDictionary()

DIGEST_BYTES = 1 << 20  # from each end of a weight file: reading a large model whole would take as long as loading it


def weights_dtype(config: EngineConfig) -> Any:
    """The dtype of weights and activations: float32 on CPU, where 16 bits are no faster, unless told."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def context_length(config: EngineConfig, model: LlamaConfig) -> int:
    """Most tokens of one request; raises ConfigError where more are wanted than the model has positions."""
    wanted = config.context_length or model.max_position_embeddings
    if wanted > model.max_position_embeddings:
        raise ConfigError(
            f"context_length={wanted} exceeds the model's {model.max_position_embeddings} positions; lower it"
        )
    return wanted


def plan_pool(
    config: EngineConfig,
    model: LlamaConfig,
    kv_dtype: Any,
    *,
    platform: str,
    device_bytes: int | None = None,
    weight_bytes: int = 0,
) -> PoolPlan:
    """Sizes the pool: ``max_total_tokens`` where it is set, else what the batch could use and the device can hold.

    Args:
        config: what the user wants.
        model: the geometry.
        kv_dtype: of the pool.
        platform: whose padding the pool is stored with.
        device_bytes: the device's memory; None where it does not say.
        weight_bytes: what the weights take of it.
    """
    layout = KVLayout.create(
        head_num=model.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=kv_dtype,
        page_size=config.page_size,
        platform=platform,
    )
    longest = context_length(config, model)
    size = config.max_total_tokens or size_pool(
        page_size=config.page_size,
        layers=model.num_hidden_layers,
        token_bytes=layout.bytes_per_token,
        wanted_tokens=config.max_running_requests * -(-longest // config.page_size) * config.page_size,
        device_bytes=device_bytes,
        weight_bytes=weight_bytes,
        mem_fraction_static=config.mem_fraction_static,
    )
    return PoolPlan(
        size_tokens=size,
        page_size=config.page_size,
        layers=model.num_hidden_layers,
        token_bytes=layout.bytes_per_token,
        context_length=longest,
    )


def make_pool(config: EngineConfig, model: Llama) -> tuple[PoolPlan, TokenToKVPool]:
    """Sizes the pool for the device that holds ``model`` and creates it there."""
    dtype = model.dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    plan = plan_pool(
        config,
        model.config,
        dtype,
        platform=jax.default_backend(),
        device_bytes=(jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
    )
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    return plan, TokenToKVPool(plan.size_tokens, plan.page_size, dtype, heads, head_dim, plan.layers)


def make_cache(
    config: EngineConfig, model: LlamaConfig, pool: TokenToKVPool, mover: PageMover
) -> tuple[CacheManager, PrefixStore | None]:
    """The books over ``pool``; with a host tier, filled from the directory where one is given.

    Returns:
        The cache manager, and the store to save its prefixes to.
    """
    policy = None if config.disable_radix_cache else cast(EvictionPolicyName, config.eviction_policy)
    longest = context_length(config, model)
    cache = CacheManager(pool.size, pool.page_size, config.max_running_requests, longest, policy=policy)
    if not config.host_tier_bytes:
        return cache, None
    page_format = PageFormat(pool.layer_num, dtype=pool.dtype, layout=pool.layout.to_dict())
    tier = HostTier(config.host_tier_bytes, page_format)
    cache.attach_host_tier(tier, mover)
    if config.prefix_cache_dir is None:
        return cache, None
    store = PrefixStore(Path(config.prefix_cache_dir), page_format)
    for segment in store.load():
        tier.put(segment.scope, segment.token_ids, segment.first_page, segment.data)
    return cache, store


def weights_identity(model: Llama, directory: Path | None) -> str:
    """Names the weights, the same in every process that loads the same files, so that saved prefixes stay theirs.

    A digest of the checkpoint's configuration and of each weight file's size, header and last bytes; weights that were
    made in memory get a random name, the same for the same object, which no other object and no other process shares.
    """
    if directory is None:
        return _names_of_models.setdefault(model, f"memory-{uuid4().hex}")
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            digest.update(file.read(DIGEST_BYTES))
            file.seek(max(0, path.stat().st_size - DIGEST_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def make_backend(config: EngineConfig, model: LlamaConfig) -> FlashAttentionBackend:
    """The attention that all layers share."""
    return FlashAttentionBackend(
        page_size=config.page_size,
        num_q_heads=model.num_attention_heads,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        sliding_window=model.sliding_window,
        impl=config.attention_impl,
    )
