"""Which files and folders nobody but their user can have changed: asked of what is loaded as code, or taken as true."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_SHARED_BITS = stat.S_IWGRP | stat.S_IWOTH


def flaw_of(path: Path, *, folder: bool = False) -> str | None:
    """Why what lies at ``path`` may be another user's work; None where it is this user's, or root's, alone.

    Args:
        path: itself, not what a link leads to: a link is a flaw.
        folder: whether it is to be a folder, else a regular file.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
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
    """Why another user could put another folder in the place of ``folder``, with the ancestor that lets them.

    Raises:
        OSError: an ancestor cannot be looked at.
    """
    absolute = Path(os.path.abspath(folder))
    for ancestor in dict.fromkeys([*absolute.parents, *absolute.resolve().parents]):
        status = ancestor.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"lies in {ancestor}, which belongs to another user, {status.st_uid}"
        # A sticky folder, such as /tmp, lets nobody rename what is not theirs. A group may be the user's own.
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"lies in {ancestor}, to which everybody can write"
    return None
