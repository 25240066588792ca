"""Makes the parts of an engine from its configuration."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engine.config import MAX_SLOTS, EngineConfig
from engine.distributed.mesh import make_mesh
from engine.distributed.processes import is_first
from engine.errors import ConfigError
from engine.kv.layout import KVLayout
from engine.kv.pool import TokenToKVPool
from engine.kv.split import split_layout
from engine.layer_groups import LayerGroups
from engine.memory.manager import CacheManager
from engine.memory.offload.host_tier import HostTier
from engine.memory.offload.page_format import PageFormat, PrefixSegment
from engine.memory.offload.store import PrefixStore
from engine.memory.prefix.cache import EvictionPolicyName
from engine.models.decoder import Decoder
from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.models.fingerprint import fingerprint
from engine.models.model_config import ModelConfig
from engine.models.sharding import split_config, weight_bytes
from engine.planning.page_demand import PageDemand
from engine.planning.sizing import PoolPlan, require_page_table, require_room, size_pool
from engine.serving.device.device_memory import device_memory
from engine.serving.device.layer_attention import LayerAttention, layer_backends
from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.trace.recorded_books import RecordedCacheManager, RecordedHostTier
from engine.trace.recorder import Recorder


def model_directory(model: object) -> Path:
    """The checkpoint's directory; None is the Llama that ships. Raises ConfigError where ``model`` is not a path."""
    if not isinstance(model, str | os.PathLike | None):
        raise ConfigError(f"model={model!r} must be a Decoder or the path of a checkpoint directory")
    return DEFAULT_MODEL_DIR if model is None else Path(model)


def make_mesh_of(config: EngineConfig) -> Mesh | None:
    """The mesh that a configuration asks for; None is one device."""
    return make_mesh(tp=config.tp, dp=config.dp, cp=config.cp)


def context_length(config: EngineConfig, model: ModelConfig) -> int:
    """Most tokens of one request; raises ConfigError where the option exceeds the model's positions."""
    wanted = config.context_length or model.context_length
    if wanted > model.context_length:
        raise ConfigError(f"context_length={wanted} exceeds the model's {model.context_length} positions; lower it")
    return wanted


def plan_pool(
    config: EngineConfig,
    model: ModelConfig,
    kv_dtype: Any,
    *,
    platform: str,
    device_bytes: int | None = None,
    weight_bytes: int = 0,
) -> PoolPlan:
    """Sizes the pool: ``max_total_tokens`` where it is set, else what the batch could use and the devices can hold.

    Args:
        config: the engine's options.
        model: the geometry, with its KV heads as stored or as repeated for ``tp``.
        kv_dtype: dtype of the pool.
        platform: platform whose padding the pool is stored with.
        device_bytes: bytes of memory of each device; None where it does not report them.
        weight_bytes: bytes of that memory in use, by the weights.

    Raises:
        ConfigError: the memory cannot hold the pool, or the page table would be too large; the message has the
            arithmetic.
    """
    whole = KVLayout.create(
        head_num=split_config(model, config.tp).num_key_value_heads,
        head_dim=model.head_dim,
        dtype=kv_dtype,
        page_size=config.page_size,
        platform=platform,
    )
    layout = split_layout(whole, tp=config.tp, cp=config.cp, platform=platform)
    longest, devices = context_length(config, model), config.tp * config.cp
    groups = LayerGroups.of(model.layer_windows)
    demand = PageDemand(groups.windows, config.page_size, ahead_tokens(config))
    require_page_table(config.max_running_requests, longest, config.page_size, groups.num_groups)
    requests, most_pages = config.max_running_requests // config.dp, MAX_SLOTS // config.page_size - 1
    size = (config.max_total_tokens or 0) // config.dp or size_pool(
        groups,
        demand,
        token_bytes=layout.bytes_per_token,
        wanted_pages=min(demand.pages_of(requests, longest), most_pages),
        device_bytes=device_bytes,
        weight_bytes=weight_bytes,
        mem_fraction_static=config.mem_fraction_static,
        devices=devices,
        request_tokens=config.context_length or 0,
    )
    plan = PoolPlan(
        size_tokens=size * config.dp,
        groups=groups,
        demand=demand,
        token_bytes=layout.bytes_per_token,
        context_length=longest,
        devices=devices * config.dp,
        replicas=config.dp,
    )
    if device_bytes is not None:
        require_room(plan, device_bytes, weight_bytes, config.mem_fraction_static)
    return plan


def make_pool(config: EngineConfig, model: Decoder, mesh: Mesh | None) -> tuple[PoolPlan, TokenToKVPool]:
    """Sizes the pool for the devices that hold ``model`` and creates it there; the same size in every process."""
    dtype = model.dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    plan_for = partial(plan_pool, config, model.config, dtype, platform=devices[0].platform)
    weights = weight_bytes(model)
    measure = partial(device_memory, devices, weight_bytes=weights, host_bytes=config.host_tier_bytes)
    memory = measure()
    if memory and memory.limit_bytes - memory.used_bytes < plan_for().device_bytes:
        gc.collect()  # an engine that is no longer referenced may still hold its pool, in a cycle of references
        memory = measure()
    plan = (
        plan_for()
        if memory is None
        else plan_for(device_bytes=memory.limit_bytes, weight_bytes=max(weights, memory.used_bytes))
    )
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    size = plan.size_tokens // plan.replicas
    return plan, TokenToKVPool(size, plan.page_size, dtype, heads, head_dim, plan.buffers, mesh)


def make_caches(
    config: EngineConfig, model: ModelConfig, pool: TokenToKVPool, recorder: Recorder | None = None
) -> tuple[list[CacheManager], PrefixStore | None]:
    """A cache manager for each replica of ``pool``, and one host tier for all, filled from ``prefix_cache_dir``.

    Where there is a recorder, they tell it of every call.

    Returns:
        The cache managers, and the store to save their prefixes to, None without a directory.
    """
    policy = None if config.disable_radix_cache else cast(EvictionPolicyName, config.eviction_policy)
    longest, rows = context_length(config, model), config.max_running_requests // config.dp
    windows = LayerGroups.of(model.layer_windows).windows
    ahead = ahead_tokens(config)
    manager = CacheManager if recorder is None else partial(RecordedCacheManager, recorder)
    caches: list[CacheManager] = [
        manager(pool.size, pool.page_size, rows, longest, policy=policy, windows=windows, ahead_tokens=ahead)
        for _ in range(config.dp)
    ]
    if not config.host_tier_bytes:
        return caches, None
    page_format = PageFormat(
        pool.layer_num, dtype=pool.layout.page_dtype, layout=pool.layout.to_dict(), windows=windows
    )
    make_tier = HostTier if recorder is None else partial(RecordedHostTier, recorder)
    tier = make_tier(config.host_tier_bytes, page_format)
    for cache in caches:
        cache.attach_host_tier(tier)
    if config.prefix_cache_dir is None:
        return caches, None
    store = PrefixStore(config.prefix_cache_dir, page_format)
    for segment in store.load():
        tier.put(segment.scope, segment.token_ids, segment.first_page, segment.data, segment.group)
    return caches, store


def step_tokens(config: EngineConfig) -> int:
    """Most new tokens in a step of one replica: enough for every running request to decode."""
    return max(config.chunked_prefill_size, config.max_running_requests) // config.dp


def ahead_tokens(config: EngineConfig) -> int:
    """The most tokens of a request that are granted and not computed: of the step planned, and of the one under way."""
    return step_tokens(config) * (2 if config.overlap_steps else 1)


def make_recorder(config: EngineConfig) -> Recorder | None:
    """What records the decisions, where the configuration asks for it; of several processes in the first."""
    return Recorder.to_path(config.record) if config.record is not None and is_first() else None


def make_scheduler(
    config: EngineConfig, caches: list[CacheManager], clock: Callable[[], float], recorder: Recorder | None = None
) -> Scheduler:
    """What decides which requests run, over a replica for each of ``caches``."""
    queue = RequestQueue()
    replicas = [
        Replica(
            cache,
            queue,
            max_running_requests=config.max_running_requests // config.dp,
            max_step_tokens=step_tokens(config),
            index=index,
            pool_name="the pool" if config.dp == 1 else "the pool of a replica",
            recorder=recorder,
        )
        for index, cache in enumerate(caches)
    ]
    return Scheduler(replicas, queue, clock, recorder)


def weights_identity(config: EngineConfig, model: Decoder) -> str:
    """A name for the weights and settings that an engine's pages are computed with.

    Where prefixes are saved it is the model's fingerprint: equal for equal models, wherever they come from. Where
    pages do not leave the engine it is a name that no other engine has, which costs nothing.
    """
    return f"engine-{uuid4().hex}" if config.prefix_cache_dir is None else fingerprint(model)


def at_first_epoch(segment: PrefixSegment) -> PrefixSegment:
    """A segment under epoch 0, where another engine looks for it: its fingerprint alone names the weights."""
    return replace(segment, scope=replace(segment.scope, weights_epoch=0))


def make_attention(config: EngineConfig, model: ModelConfig, mesh: Mesh | None) -> LayerAttention:
    """The attention of the layers, over a mesh where there is one."""
    return LayerAttention.of(layer_backends(model, page_size=config.page_size, impl=config.attention_impl), mesh)
