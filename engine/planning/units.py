"""Numbers as people read them."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest binary unit that leaves at least 1, e.g. ``4.37 GiB``."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
