"""Where a user's cached files lie, and which files and folders no other user can have changed.

Asked before a file is loaded as code or its contents are believed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_SHARED_BITS = stat.S_IWGRP | stat.S_IWOTH


def cache_directory() -> Path:
    """This package's folder in the user's cache directory, ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist.

    Raises:
        RuntimeError: there is no home directory.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative base would depend on where the process runs; the XDG specification says to ignore it.
    return (base if base.is_absolute() else Path.home() / ".cache") / "fused-kv-engine"


def flaw_of(path: Path, *, folder: bool = False) -> str | None:
    """Why the file at ``path`` may be another user's work; None where only this user, or root, can have written it.

    Args:
        path: the file itself, not what a link leads to: a link is a flaw.
        folder: whether it must be a folder; else it must be a regular file.

    Raises:
        OSError: there is nothing at ``path``, or its status cannot be read.
    """
    status = path.lstat()
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
        return f"is not a {'folder' if folder else 'regular file'} but something else, such as a link"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user, {status.st_uid}"
    if status.st_mode & _SHARED_BITS:
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def flaw_above(folder: Path) -> str | None:
    """Why another user could replace ``folder``, with the ancestor that permits it; None where none can.

    Raises:
        OSError: the status of an ancestor cannot be read.
    """
    absolute = Path(os.path.abspath(folder))
    for ancestor in dict.fromkeys([*absolute.parents, *absolute.resolve().parents]):
        status = ancestor.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"lies in {ancestor}, which belongs to another user, {status.st_uid}"
        # In a sticky folder, such as /tmp, only the owner of a file can rename it. A group may be the user's own.
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"lies in {ancestor}, which every user can write to"
    return None
