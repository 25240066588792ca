"""Reads rotary parameters from Hugging Face configurations, which spell the same table in three ways.

Transformers 5 writes ``rope_parameters`` (theta inside, and one table for each kind of layer where they differ).
Earlier versions write ``rope_theta`` next to ``rope_scaling``, whose kind is ``rope_type`` or, older still, ``type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.errors import ConfigError, shown
from engine.models.checked_values import unsupported
from engine.models.rotary import LinearScaling, Llama3Scaling, RopeScaling

_DEFAULT_THETA = 10000.0
_SUPPORTED = ("default", "linear", "llama3")


def rope_from_hf(config: Mapping[str, Any], layer_kind: str = "full_attention") -> tuple[float, RopeScaling | None]:
    """Returns theta and the scaling rule of a configuration.

    Args:
        config: a parsed ``config.json``.
        layer_kind: the kind of layer whose parameters to return, where there is a table for each kind.

    Raises:
        ConfigError: the rope type is not supported, or one of its parameters is missing or out of range.
    """
    table = _table(config, layer_kind)
    theta = _given(table, config, "rope_theta", _DEFAULT_THETA)
    partial = _given(table, config, "partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise unsupported("partial_rotary_factor", partial, 1.0)
    kind = _given(table, {"rope_type": table.get("type")}, "rope_type", "default")
    if kind == "default":
        return theta, None
    factor, low, high = (_given(table, {}, name, None) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if kind == "linear":
        return theta, LinearScaling(factor)
    if kind == "llama3":
        # As in transformers: where it is left out, it is the context that the file states.
        before = _given(config, table, "original_max_position_embeddings", config.get("max_position_embeddings"))
        return theta, Llama3Scaling(factor, low, high, before)
    raise unsupported("rope_type", kind, list(_SUPPORTED))


def _table(config: Mapping[str, Any], layer_kind: str) -> Mapping[str, Any]:
    """The table of rope parameters; where there is one for each kind of layer, that of ``layer_kind``."""
    tables = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    if wrong := [table for table in tables if not isinstance(table, Mapping)]:
        raise ConfigError(f"invalid model config: rope parameters are {shown(wrong[0])}; they must be a table")
    table: Mapping[str, Any] = next(filter(None, tables), {})
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    if not nested:
        return table
    if layer_kind not in nested:
        raise ConfigError(
            f"invalid model config: rope parameters for {sorted(nested)}, and every layer is a {layer_kind}; "
            "add a table for it"
        )
    return nested[layer_kind]


def _given(first: Mapping[str, Any], second: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((table[key] for table in (first, second) if table.get(key) is not None), default)


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` table of a scaling rule; None without one."""
    if scaling is None:
        return None
    return {"rope_type": "linear" if isinstance(scaling, LinearScaling) else "llama3", **asdict(scaling)}
