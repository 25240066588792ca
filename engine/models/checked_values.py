"""Checks of the values in a model's configuration; a refused value is named."""

from __future__ import annotations

from engine.errors import ConfigError, shown

LARGEST_COUNT = 1 << 24  # above it, the product of two sizes fits no memory
LONGEST_CONTEXT = (1 << 31) - 1  # positions are int32


def require_count(name: str, value: object, most: int) -> int:
    """Returns ``value``; raises ConfigError where it is not a whole number from 1 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"invalid model config: {name}={shown(value)} must be a whole number from 1 to {most}")
    return value


def require_number(name: str, value: object, *, least: float, most: float) -> float:
    """Returns ``value``; raises ConfigError where it is not a finite number from ``least`` to ``most``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"invalid model config: {name}={shown(value)} must be a number from {least:g} to {most:g}")
    return float(value)


def require_flag(name: str, value: object) -> bool:
    """Returns ``value``; raises ConfigError where it is not true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"invalid model config: {name}={shown(value)} must be true or false")
    return value


def require_token_ids(name: str, value: object) -> tuple[int, ...]:
    """Returns the token ids of ``value``: one id, a list of ids, or None; raises ConfigError for anything else."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ConfigError(f"invalid model config: {name}={shown(value)} must be token ids (one, a list, or none)")
    return ids


def unsupported(name: str, value: object, supported: object) -> ConfigError:
    """The error for a feature that this package's models do not have."""
    return ConfigError(f"unsupported model: {name}={shown(value)}; supported: {supported}")
