"""How Hugging Face configurations state rotary parameters: three spellings of the same table.

Transformers 5 writes ``rope_parameters`` (theta inside); before it came ``rope_theta`` next to ``rope_scaling``,
whose kind is ``rope_type`` or, older still, ``type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.errors import ConfigError
from engine.models.rotary import LinearScaling, Llama3Scaling, RopeScaling

_DEFAULT_THETA = 10000.0
_SUPPORTED = ("default", "linear", "llama3")


def rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling rule of a configuration.

    Args:
        config: a parsed ``config.json``.

    Raises:
        ConfigError: the rope type is not supported, or a parameter of it is missing or out of range.
    """
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"invalid model config: rope parameters are {table!r}; they must be a table")
    theta = table.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    partial = table.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"unsupported model: partial_rotary_factor={partial}; supported: 1.0")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(factor=_number(table, kind, "factor"))
    if kind == "llama3":
        return theta, _llama3(table)
    raise ConfigError(f"unsupported model: rope_type={kind!r}; supported: {list(_SUPPORTED)}")


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the ``rope_scaling`` table of a rule, None for none."""
    if scaling is None:
        return None
    return {"rope_type": "linear" if isinstance(scaling, LinearScaling) else "llama3", **asdict(scaling)}


def _llama3(table: Mapping[str, Any]) -> Llama3Scaling:
    low, high = _number(table, "llama3", "low_freq_factor"), _number(table, "llama3", "high_freq_factor")
    if not low < high:
        raise ConfigError(
            f"invalid model config: low_freq_factor={low} must be below high_freq_factor={high} for rope_type 'llama3'"
        )
    return Llama3Scaling(
        factor=_number(table, "llama3", "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=int(_number(table, "llama3", "original_max_position_embeddings")),
    )


def _number(table: Mapping[str, Any], kind: str, key: str) -> float:
    value = table.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"invalid model config: rope_type {kind!r} needs a positive number {key}, found {value!r}")
    return float(value)
