"""Loads what an engine needs before it has a pool: configuration, mesh, weights and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.models.checkpoint import load_model
from engine.models.decoder import Decoder
from engine.models.sharding import shard_model
from engine.models.text import Tokenizer, load_tokenizer
from engine.serving.build import make_mesh_of, model_directory

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The loaded parts.

    Attributes:
        config: the engine's options.
        mesh: the mesh of devices; None is one device.
        model: the weights, over the mesh.
        tokenizer: None where prompts must be token ids.
    """

    config: EngineConfig
    mesh: Mesh | None
    model: Decoder
    tokenizer: Tokenizer | None = None


def load_parts(model: str | Path | Decoder | None, options: Mapping[str, Any]) -> Loaded:
    """Reads a checkpoint, or takes a model that is in memory already.

    Args:
        model: as for ``LLM``.
        options: the other fields of EngineConfig.

    Raises:
        ConfigError: an option is unknown or wrong.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if isinstance(model, Decoder):
        config = EngineConfig.from_mapping(options)
        mesh = make_mesh_of(config)
        if config.dtype not in ("auto", model.dtype.name):
            raise ConfigError(f"dtype={config.dtype!r} for a model of {model.dtype}; leave it out, or cast the model")
        loaded = Loaded(config, mesh, shard_model(model, mesh))
    else:
        directory = model_directory(model)
        config = EngineConfig.from_mapping({"model": str(directory), **options})
        mesh = make_mesh_of(config)
        weights = load_model(directory, dtype=weights_dtype(config), mesh=mesh)
        tokenizer = load_tokenizer(directory, parse_special_tokens=config.parse_special_tokens)
        loaded = Loaded(config, mesh, weights, tokenizer)
    _logger.log(logging.WARNING if is_slow(loaded.model) else logging.INFO, "%s", describe_dtype(config, loaded.model))
    return loaded


def weights_dtype(config: EngineConfig) -> Any:
    """The dtype of weights and activations: the configured one, or for "auto" the platform's fast one."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def is_slow(model: Decoder) -> bool:
    """Whether another dtype would decode several times faster here."""
    return jax.default_backend() == "cpu" and model.dtype != jnp.float32


def describe_dtype(config: EngineConfig, model: Decoder) -> str:
    """One line: the dtype of weights and activations, the option that chose it, and whether it is slow here."""
    chosen = "dtype='auto'" if config.dtype == "auto" else f"dtype={config.dtype!r}"
    if is_slow(model):
        return f"weights are {model.dtype} ({chosen}), which a CPU decodes several times slower than float32"
    why = ", which a CPU decodes several times faster than 16 bits" if jax.default_backend() == "cpu" else ""
    return f"weights are {model.dtype} ({chosen}){why}"
