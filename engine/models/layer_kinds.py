"""Which layers have the sliding window: read from the spellings of Hugging Face configurations, and written.

Most recent files name each layer's kind in ``layer_types``; Qwen's older ones say from which layer on, Gemma 3's older
ones say of how many layers one has full attention, and where a file says nothing the architecture has its own rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.models.checked_values import LARGEST_COUNT, LONGEST_CONTEXT, require_count, require_flag, unsupported
from engine.models.families import Family

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_from_hf(values: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """The window of each layer by a ``config.json``.

    Args:
        values: the parsed JSON object, with the architecture's defaults for what it leaves out.
        family: the model's family.

    Raises:
        ConfigError: a value has the wrong type, or a layer should have a window and there is none.
    """
    window = values.get("sliding_window") if family.windowed else None
    # Of the families whose files have the switch, it alone says whether there is a window.
    if "use_sliding_window" in family.defaults and not require_flag("use_sliding_window", values["use_sliding_window"]):
        window = None
    return layer_windows(values, family, window, first=values.get("max_window_layers", 0))


def layer_windows(values: Mapping[str, Any], family: Family, window: Any, *, first: Any = 0) -> tuple[int | None, ...]:
    """The window of each layer.

    Args:
        values: a configuration's table, with ``num_hidden_layers`` and perhaps ``layer_types``.
        family: the model's family.
        window: the window of those layers that have one, or None.
        first: the first layer with the window, where nothing else says which layers have it.

    Raises:
        ConfigError: as for ``windows_from_hf``.
    """
    layers = values["num_hidden_layers"]
    if window is not None:
        require_count("sliding_window", window, LONGEST_CONTEXT)
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = _kinds_by_rule(values, family, layers, windowed=window is not None, first=first)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds) or len(kinds) != layers:
        raise unsupported("layer_types", kinds, f"a list of {layers} names, one for each of num_hidden_layers")
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise unsupported("layer_types", unknown, [FULL, SLIDING])
    if SLIDING in kinds and window is None:
        raise unsupported("layer_types", SLIDING, f"{FULL} where the model has no sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _kinds_by_rule(values: Mapping[str, Any], family: Family, layers: int, *, windowed: bool, first: Any) -> list[str]:
    if family.full_every:
        every = require_count(
            "sliding_window_pattern", values.get("sliding_window_pattern", family.full_every), LARGEST_COUNT
        )
        return [FULL if layer % every == 0 else SLIDING for layer in range(1, layers + 1)]
    if not windowed:
        return [FULL] * layers
    first = first if first == 0 else require_count("max_window_layers", first, LARGEST_COUNT)
    return [FULL if layer < first else SLIDING for layer in range(layers)]


def kinds_of(windows: Sequence[int | None]) -> list[str]:
    """The ``layer_types`` of layers with these windows."""
    return [FULL if window is None else SLIDING for window in windows]
