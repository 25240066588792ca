"""The serving runner's own step of a Llama, parcel to tokens, compiled for TPUs or a GPU that need not be present."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from engine.bench.tpu.hlo import aliases, collectives, kernel_vmem_bytes, launches, moves_of_at_least
from engine.distributed.mesh import DATA_AXIS, TENSOR_AXIS, make_mesh, named
from engine.distributed.placement import Placement
from engine.kv.pool import TokenToKVPool
from engine.kv.split import buffer_spec
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.models.sharding import abstract_model, split_config, weight_bytes
from engine.serving.device.batcher import parcel_shapes
from engine.serving.device.device_rows import DeviceRows
from engine.serving.device.layer_attention import LayerAttention, layer_backends
from engine.serving.device.runner import forward_step

DTYPE = jnp.bfloat16


def compile_step(
    *,
    topology: str,
    model: dict[str, Any],
    layers: int,
    pool_tokens: int,
    page_size: int,
    tokens: int,
    rows: int,
    context: int,
    tp: int = 1,
    dp: int = 1,
    cp: int = 1,
) -> dict[str, Any]:
    """Compiles the runner's own step with bfloat16 weights over a donated bfloat16 pool.

    Args:
        topology: name of the TPU slice, e.g. "v5e:2x4".
        model: the geometry, a ``[model]`` table.
        layers: how many of its layers; all are equal, so a few are enough to see what each one does.
        pool_tokens: usable token slots of each replica.
        page_size: tokens per page.
        tokens: new tokens of each replica, T.
        rows: sequences of each replica, B.
        context: longest context in tokens.
        tp: devices that share the heads and weights.
        dp: replicas.
        cp: devices that share the tokens of a page.

    Returns:
        Bytes per device, as planned for weights and pool, and as compiled for arguments, alias and temporaries; how
        many arrays are donated and how many results are in their argument's memory; kernels; collectives (opcode and
        shape to count); and instructions that move an array as large as a layer's buffer.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(tp=tp, dp=dp, cp=cp, devices=devices)
    return compile_step_on(
        devices, mesh, "tpu", model=model, layers=layers, pool_tokens=pool_tokens, page_size=page_size, tokens=tokens,
        rows=rows, context=context,
    )  # fmt: skip


def compile_step_on(
    devices: list[jax.Device],
    mesh: Mesh | None,
    platform: str,
    *,
    model: dict[str, Any],
    layers: int,
    pool_tokens: int,
    page_size: int,
    tokens: int,
    rows: int,
    context: int,
) -> dict[str, Any]:
    """Like ``compile_step``, over a mesh or on the first of some devices; ``platform`` is "tpu" or "gpu"."""
    tp, dp = (1, 1) if mesh is None else (mesh.shape.get(TENSOR_AXIS, 1), mesh.shape.get(DATA_AXIS, 1))
    whole = split_config(ModelConfig.from_mapping(model), tp)
    config = dataclasses.replace(whole, num_hidden_layers=layers, layer_windows=whole.layer_windows[:layers])
    place = _Places(mesh, devices[0], platform)
    attention = LayerAttention.of(layer_backends(config, page_size=page_size, impl=platform), mesh)
    groups = attention.groups
    llama, pool = place.model(config), place.pool(config, groups.num_buffers, pool_tokens, page_size)
    graph, weights = nnx.split(llama)
    pages = -(-context // page_size)
    shape = parcel_shapes(rows, tokens, page_size, groups.num_groups)[-1]
    leaves, structure = jax.tree.flatten(weights)
    donated = (1, 2)
    step = partial(forward_step, graph, structure, attention, Placement(mesh), shape)
    arguments = (
        leaves,
        pool,
        place.rows(dp * rows, groups.num_groups, pages),
        place.by_replica((dp * shape.packed_size,)),
    )
    with jax.sharding.use_abstract_mesh((mesh or Mesh(np.array(devices[:1]), ("x",))).abstract_mesh):
        compiled = jax.jit(step, donate_argnums=donated).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    layer_bytes = pool.device_bytes // pool.layer_num
    return {
        "weight bytes": weight_bytes(llama),
        "pool bytes": pool.device_bytes,
        "argument bytes": memory.argument_size_in_bytes,
        "donated arrays": len(jax.tree.leaves([arguments[n] for n in donated])),
        "aliased arrays": aliases(text),
        "alias bytes": memory.alias_size_in_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        "VMEM bytes": list(kernel_vmem_bytes(text).values()),
        "launches": launches(text),
        "collectives": dict(Counter(collectives(text))),
        "moves": moves_of_at_least(text, layer_bytes),
    }


@dataclasses.dataclass(frozen=True)
class _Places:
    """Shapes with their placement: over a mesh, or on one device."""

    mesh: Mesh | None
    device: jax.Device
    platform: str

    def _on(self, array: Any, *entries: str | None) -> jax.ShapeDtypeStruct:
        sharding = SingleDeviceSharding(self.device) if self.mesh is None else named(self.mesh, *entries)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def model(self, config: ModelConfig) -> Decoder:
        llama = abstract_model(config, DTYPE, self.mesh)
        if self.mesh is None:
            nnx.update(llama, jax.tree.map(self._on, nnx.state(llama)))
        return llama

    def pool(self, config: ModelConfig, layers: int, size: int, page_size: int) -> TokenToKVPool:
        def make() -> TokenToKVPool:
            heads = config.num_key_value_heads
            return TokenToKVPool(
                size, page_size, DTYPE, heads, config.head_dim, layers, self.mesh, platform=self.platform
            )  # fmt: skip

        pool: TokenToKVPool = jax.eval_shape(make)
        sharding = (
            SingleDeviceSharding(self.device) if self.mesh is None else NamedSharding(self.mesh, buffer_spec(self.mesh))
        )
        return TokenToKVPool.tree_unflatten(
            (pool.size, pool.layout, pool.mesh),
            (tuple(jax.ShapeDtypeStruct(b.shape, b.dtype, sharding=sharding) for b in pool.buffers),),
        )

    def by_replica(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return self._on(jax.ShapeDtypeStruct(shape, np.int32), DATA_AXIS)

    def rows(self, rows: int, groups: int, pages: int) -> DeviceRows:
        empty = jax.eval_shape(partial(DeviceRows.empty, rows, groups, pages))
        placed: DeviceRows = jax.tree.map(lambda array: self.by_replica(array.shape), empty)
        return placed
