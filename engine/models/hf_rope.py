"""Reads rotary parameters from Hugging Face configurations, which spell the same table in three ways.

Transformers 5 writes ``rope_parameters`` (theta inside, and one table for each kind of layer where they differ).
Earlier versions write ``rope_theta`` next to ``rope_scaling``, whose kind is ``rope_type`` or, older still, ``type``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from engine.errors import ConfigError, shown
from engine.models.checked_values import require_number, unsupported
from engine.models.families import Family
from engine.models.layer_kinds import FULL, SLIDING
from engine.models.rotary import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, yarn_attention_factor

_DEFAULT_THETA = 10000.0
_RULES: dict[type[RopeScaling], str] = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
_SUPPORTED = ("default", *_RULES.values())


def ropes_from_hf(values: Mapping[str, Any], family: Family, windows: Sequence[int | None]) -> dict[str, Any]:
    """The fields of a ModelConfig about rotary embedding.

    Args:
        values: a parsed ``config.json``, with the architecture's defaults for what it leaves out.
        family: the model's family.
        windows: the window of each layer.

    Raises:
        ConfigError: a rope type is not supported, one of its parameters is missing or out of range, or layers differ
            in a way that the family does not have.
    """
    if values.get("rope_parameters") is not None and values.get("rope_scaling") is family.defaults.get("rope_scaling"):
        values = {key: values[key] for key in values if key != "rope_scaling"}
    local = "rope_local_base_freq" in family.settings
    kind = SLIDING if None not in windows and not local else FULL
    theta, scaling = rope_from_hf(values, kind)
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    nested = _nested(_tables(values))
    if local:
        table = nested.get(SLIDING, {})
        if rope_from_hf({"rope_parameters": table})[1] is not None:
            raise unsupported(f"rope_type of the {SLIDING} layers", table["rope_type"], ["default"])
        fields["rope_local_base_freq"] = _given(table, {}, "rope_theta", values["rope_local_base_freq"])
    elif len(set(windows)) > 1 and nested and rope_from_hf(values, SLIDING) != (theta, scaling):
        raise unsupported("rope parameters of each kind of layer", nested, "the same for all, or a gemma3_text")
    return fields


def rope_from_hf(config: Mapping[str, Any], layer_kind: str = FULL) -> tuple[float, RopeScaling | None]:
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
    if kind == "linear":
        return theta, LinearScaling(*_of(table, "factor"))
    # As in transformers: where it is left out, it is the context that the file states.
    before = _given(config, table, "original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind == "llama3":
        factor, low, high = _of(table, "factor", "low_freq_factor", "high_freq_factor")
        return theta, Llama3Scaling(factor, low, high, before)
    if kind == "yarn":
        return theta, _yarn(table, before)
    raise unsupported("rope_type", kind, list(_SUPPORTED))


def _of(table: Mapping[str, Any], *names: str) -> list[Any]:
    return [table.get(name) for name in names]


def _yarn(table: Mapping[str, Any], before: Any) -> YarnScaling:
    factor = require_number("factor of rope_type 'yarn'", table.get("factor"), least=1, most=1e6)
    attention_factor = table.get("attention_factor")
    if attention_factor is None:
        scales = [
            require_number(f"{name} of rope_type 'yarn'", table.get(name) or 0.0, least=0, most=1e6)
            for name in ("mscale", "mscale_all_dim")
        ]
        attention_factor = yarn_attention_factor(factor, *scales)
    return YarnScaling(
        factor,
        before,
        attention_factor,
        beta_fast=_given(table, {}, "beta_fast", 32.0),
        beta_slow=_given(table, {}, "beta_slow", 1.0),
        truncate=_given(table, {}, "truncate", True),
    )


def _tables(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of rope parameters, or of a table for each kind of layer."""
    tables = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    if wrong := [table for table in tables if not isinstance(table, Mapping)]:
        raise ConfigError(f"invalid model config: rope parameters are {shown(wrong[0])}; they must be a table")
    found: Mapping[str, Any] = next(filter(None, tables), {})
    return found


def _nested(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {key: value for key, value in table.items() if isinstance(value, Mapping)}


def _table(config: Mapping[str, Any], layer_kind: str) -> Mapping[str, Any]:
    """The table of rope parameters; where there is one for each kind of layer, that of ``layer_kind``."""
    table = _tables(config)
    nested = _nested(table)
    if not nested:
        return table
    if layer_kind not in nested:
        raise ConfigError(
            f"invalid model config: rope parameters for {sorted(nested)}, and a layer is a {layer_kind}; "
            "add a table for it"
        )
    return nested[layer_kind]


def _given(first: Mapping[str, Any], second: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((table[key] for table in (first, second) if table.get(key) is not None), default)


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` table of a scaling rule; None without one."""
    return None if scaling is None else {"rope_type": _RULES[type(scaling)], **asdict(scaling)}
