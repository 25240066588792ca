"""Memory of a decode step on each device of a pod, as planned and as compiled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import topologies

from engine.bench.tpu.step import DTYPE, compile_step
from engine.config import EngineConfig
from engine.distributed.mesh import make_mesh
from engine.errors import ConfigError
from engine.models.model_config import ModelConfig
from engine.models.sharding import abstract_model, split_config, weight_bytes
from engine.planning.sizing import PoolPlan
from engine.serving.build import plan_pool

PAGE_SIZE = 128
MEMORY_SHARE = 0.9


def compile_pod(
    *, topology: str, model: dict[str, Any], layers: int, device_bytes: int, rows: int, context: int
) -> dict[str, Any]:
    """Plans the pool that fits beside the weights, and compiles a decode step of some layers over it.

    Each device of a tensor group holds one KV head; where the weights would not fit, twice as many devices share the
    heads, and each KV head is on two. The remaining axis has replicas.

    Args:
        topology: name of the TPU slice.
        model: the geometry, a ``[model]`` table.
        layers: how many of its first layers are compiled.
        device_bytes: memory of one device.
        rows: sequences of each replica.
        context: tokens of each sequence.

    Returns:
        The results of ``compile_step``; the sizes of the mesh; bytes of the whole model as planned, and how many
        sequences its pools serve at once, 0 where the weights do not fit.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = ModelConfig.from_mapping(model)
    tp = min(config.num_key_value_heads, len(devices))
    while (plan := _plan(config, devices, tp, device_bytes, context)) is None and 2 * tp <= len(devices):
        tp *= 2
    dp = len(devices) // tp
    replica_tokens = plan.size_tokens // dp if plan else rows * context
    found = compile_step(
        topology=topology,
        model=model,
        layers=layers,
        pool_tokens=replica_tokens,
        page_size=PAGE_SIZE,
        tokens=rows,
        rows=rows,
        context=context,
        tp=tp,
        dp=dp,
    )
    embedding = config.vocab_size * config.hidden_size * jnp.dtype(DTYPE).itemsize
    token_bytes = 2 * max(1, config.num_key_value_heads // tp) * config.head_dim * jnp.dtype(DTYPE).itemsize
    return found | {
        "devices": len(devices),
        "tp": tp,
        "dp": dp,
        "model weight bytes": _weights(config, devices, tp),
        "model pool bytes": plan.device_bytes if plan else 0,
        "sequences": int(plan.max_concurrency) if plan else 0,
        # Of an embedding table that is not the output projection a step reads only some rows.
        "unread bytes": 0 if config.tie_word_embeddings else embedding // tp,
        "context bytes": rows * token_bytes * sum(min(context, window or context) for window in config.layer_windows),
    }


def _weights(config: ModelConfig, devices: Any, tp: int) -> int:
    mesh = make_mesh(tp=tp, dp=len(devices) // tp, devices=devices)
    return weight_bytes(abstract_model(split_config(config, tp), DTYPE, mesh))


def _plan(config: ModelConfig, devices: Any, tp: int, device_bytes: int, context: int) -> PoolPlan | None:
    """The largest pool beside the weights, or None where there is no room for one request per replica."""
    dp = len(devices) // tp
    unlimited = dp * min(1 << 13, (1 << 16) // dp)  # requests: so many that memory limits the pool
    engine = EngineConfig(
        page_size=PAGE_SIZE,
        mem_fraction_static=MEMORY_SHARE,
        max_running_requests=unlimited,
        chunked_prefill_size=unlimited,
        context_length=context,
        tp=tp,
        dp=dp,
    )
    weights = _weights(config, devices, tp)
    try:
        plan = plan_pool(
            engine, config, DTYPE, platform="tpu", device_bytes=device_bytes, weight_bytes=weights
        )  # fmt: skip
    except ConfigError:
        return None
    return plan if plan.max_concurrency >= dp else None
