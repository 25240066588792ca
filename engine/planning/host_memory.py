"""How much memory this process can still take on its machine.

It is the least of what the system reports as available, what each control group above the process has left, and what
the process's limit of address space leaves. Other processes take memory too, so the answer holds only for now.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ConfigError
from engine.planning.units import format_bytes

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # a control group (version 1) without a limit reports more than this


def available_bytes() -> int | None:
    """Bytes that this process can still take, or None where the system does not report them.

    Linux reports what is free or can be reclaimed. Other systems report what is free, or only what is installed, of
    which half is counted.
    """
    found = [*_system(), *_control_groups(), *_address_space()]
    return max(0, min(found)) if found else None


def require_host_memory(wanted_bytes: int, what: str, remedy: str) -> None:
    """Refuses an allocation that the machine cannot hold, before anything is reserved.

    Args:
        wanted_bytes: bytes that this process, or all processes on this machine together, will take.
        what: what takes them, as the subject of the message.
        remedy: what to do, as the end of the message.

    Raises:
        ConfigError: fewer bytes are available.
    """
    available = available_bytes()
    if available is not None and wanted_bytes > available:
        raise ConfigError(
            f"{what} takes {format_bytes(wanted_bytes)} of host memory and {format_bytes(available)} are available; "
            f"{remedy}"
        )


def _system() -> Iterator[int]:
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
            return
    names = getattr(os, "sysconf_names", {})  # empty on a system without POSIX
    for name, divisor in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        if name in names and (pages := os.sysconf(name)) > 0:
            yield pages * os.sysconf("SC_PAGE_SIZE") // divisor
            return


def _control_groups() -> Iterator[int]:
    """Bytes left of the limit of each control group from this process's up to the root, version 1 or 2."""
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        here = root / path.strip().lstrip("/")
        # In a container the root of the tree is its own group, whatever path the line names.
        for group in (here, *here.parents):
            bounds, uses = _number(group / limit), _number(group / used)
            if bounds is not None and uses is not None and bounds < UNLIMITED_BYTES:
                yield bounds - uses + _reclaimable(group)
            if group == root:
                break


def _reclaimable(group: Path) -> int:
    """Bytes of cached files in a group's use, which the system drops when memory is short."""
    counts = dict(line.split(None, 1) for line in _lines(group / "memory.stat") if " " in line)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def _address_space() -> Iterator[int]:
    try:
        import resource  # not on every system
    except ImportError:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    sizes = _lines(PROC / "self" / "statm")
    if limit != resource.RLIM_INFINITY and sizes:
        yield limit - int(sizes[0].split()[0]) * resource.getpagesize()


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
