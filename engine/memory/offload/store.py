"""Prefixes on disk: pages saved by one process and taken up by another.

One safetensors file per segment, each complete in itself. A file appears under its name only when all of it has reached
the disk (temporary file, fsync, rename, fsync of the directory), and is believed only if its digest, version and page
format are right and no other user can have written it, so neither a crash nor a damaged or foreign file can bring wrong
keys and values back. Only their user can read the files and the directory that is made for them: they hold prompts
and salts.

A process that writes holds a lock (``flock``) of the directory, which ends with the process. Readers take none: a file
is whole at any moment, or gone. A temporary file is removed only under the lock, when no process works on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as serialize

from engine.errors import ConfigError
from engine.memory.offload.page_format import PageFormat, PrefixSegment
from engine.memory.prefix import checked_scope
from engine.memory.scope import CacheScope
from engine.user_files import flaw_of

FORMAT = "engine-kv-prefix"
VERSION = 3  # 1: scopes named by a part of the weights; 2: one group of layers, of full attention
_BEFORE_GROUPS = 2
_NAME = "prefix-{:08d}.safetensors"
_PATTERN = "prefix-" + "[0-9]" * 8 + ".safetensors"  # other files in the directory are not touched
_TEMPORARY = ".tmp"
_LOCK_SECONDS, _POLL_SECONDS = 60.0, 0.05
_OLD_SECONDS = 3600.0  # a temporary file that names no writer and is older is no longer written to

_logger = logging.getLogger(__name__)


class _Lock(Enum):
    HELD = auto()
    BUSY = auto()
    UNKNOWN = auto()  # the file system has none


class PrefixStore:
    """A directory of saved segments. Many processes may read it; those that save do it one after the other.

    The scope says whether the model is still the one that the pages were made with: let ``CacheScope.model`` name it in
    a way that holds across processes, such as a digest of all its weights, its configuration and its dtype.

    Args:
        directory: made if it is missing, with mode 0700; an existing one is left as it is, with a warning where other
            users can write to it.
        page_format: format of the pages to save, and the only one that is restored.

    Attributes:
        loaded: digest of everything that ``load`` has returned.

    Raises:
        ConfigError: the directory cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str], page_format: PageFormat) -> None:
        if not isinstance(page_format, PageFormat):
            raise ConfigError(f"page_format is a {type(page_format).__name__}; it must be a PageFormat")
        try:
            self.directory = Path(directory)
            _make_private(self.directory)
        except (OSError, TypeError, ValueError) as error:  # no path at all, or one with a NUL
            raise ConfigError(
                f"cannot keep prefixes in {directory}: {error}; name a directory that can be made"
            ) from error
        self.page_format = page_format
        self.loaded = ""

    def save(self, segments: Iterable[PrefixSegment]) -> int:
        """Writes segments, each safe on disk before the next is begun, and then removes those of earlier saves.

        A crash half way leaves whole files only, some of this save and some of the one before.

        Args:
            segments: in the order in which ``load`` is to return them.

        Returns:
            How many were written.

        Raises:
            ConfigError: another process has been saving to the directory for a minute; nothing was written.
            ShapeError: a segment does not have the store's page format; those before it have been written.
            OSError: the disk refuses; those before it have been written.
        """
        with self._locked(_LOCK_SECONDS) as lock:
            if lock is _Lock.BUSY:
                raise ConfigError(
                    f"another process has been saving prefixes to {self.directory} for {_LOCK_SECONDS:.0f} s; wait for "
                    "it, or let each engine save to a directory of its own"
                )
            if lock is _Lock.HELD:
                self._remove_leftovers()
            else:
                _logger.warning("%s has no locks: let one process at a time save prefixes there", self.directory)
            written = set()
            for name, segment in zip(self._free_names(), segments, strict=False):
                self._write(name, self._encode(segment))
                written.add(name)
            for path in self._files():
                if path.name not in written and path.is_file() and not path.is_symlink():
                    path.unlink(missing_ok=True)
            _sync_directory(self.directory)
        return len(written)

    def load(self) -> Iterator[PrefixSegment]:
        """Reads the segments back, one at a time; what is damaged or foreign is logged with the reason and left out."""
        try:
            with self._locked(0.0) as lock:
                if lock is _Lock.HELD:
                    self._remove_leftovers()
        except OSError as error:
            _logger.warning("what crashed saves left in %s stays: %s", self.directory, error)
        for path in self._files():
            try:
                segment, digest = self._decode(path)
            except FileNotFoundError:
                continue  # a save that runs meanwhile has removed it
            except Exception as error:  # a file that anybody may have made can raise anything
                _logger.warning("saved prefix %s is not restored: %.500s", path.name, error)
            else:
                self.loaded = hashlib.blake2b((self.loaded + digest).encode(), digest_size=32).hexdigest()
                yield segment

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob(_PATTERN))

    def _free_names(self) -> Iterator[str]:
        """Names to write under, in order: all but those of files that a rename cannot or must not replace."""
        for name in map(_NAME.format, itertools.count()):
            path = self.directory / name
            if (path.is_file() and not path.is_symlink()) or not os.path.lexists(path):
                yield name

    @contextlib.contextmanager
    def _locked(self, patience: float) -> Iterator[_Lock]:
        """Tries to be the only writer, for ``patience`` seconds."""
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield _try_lock(descriptor, patience)
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may have the descriptor as well
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        """Removes the temporary files of dead writers; the log names what cannot be removed."""
        for path in self.directory.glob(f"{_PATTERN}*{_TEMPORARY}"):
            try:
                status = path.lstat()
                names_writer = path.name.count(".") > _NAME.count(".") + _TEMPORARY.count(".")
                if not stat.S_ISREG(status.st_mode):
                    _logger.warning("%s is no file of a crashed save; it is left alone", path.name)
                elif names_writer or time.time() - status.st_mtime > _OLD_SECONDS:
                    path.unlink()
            except OSError as error:
                _logger.warning("%s, which a crashed save left, cannot be removed: %s", path.name, error)

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.directory / f"{name}.{uuid4().hex}{_TEMPORARY}"
        try:
            temporary.touch(mode=0o600, exist_ok=False)
            temporary.chmod(0o600)  # whatever the umask
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.directory / name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(self.directory)

    def _encode(self, segment: PrefixSegment) -> bytes:
        tokens = self.page_format.check_pages(segment.token_ids, segment.first_page, segment.data)
        scope = checked_scope(segment.scope)
        # As bytes, because not every dtype of a pool is one of the file format's.
        pages = np.ascontiguousarray(segment.data).reshape(-1).view(np.uint8)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "page_format": self.page_format.to_dict(),
            "scope": scope.key_bytes().decode(),
            "first_page": int(segment.first_page),
            "group": self.page_format.checked_group(segment.group),
        }
        text = json.dumps(header, sort_keys=True)
        metadata = {"header": text, "digest": _digest(text, tokens, pages)}
        content: bytes = serialize({"token_ids": tokens, "pages": pages}, metadata)
        return content

    def _decode(self, path: Path) -> tuple[PrefixSegment, str]:
        if flaw := flaw_of(path):  # before it is opened: the other end of a pipe may never come
            raise ConfigError(f"it {flaw}; remove it")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            text = metadata.get("header", "null")
            header = json.loads(text)
            group = self._checked_group(header, path.name)
            self._check_sizes(header["first_page"], file.get_slice("token_ids"), file.get_slice("pages"))
            tokens, pages = file.get_tensor("token_ids"), file.get_tensor("pages")
        digest = _digest(text, tokens, pages)
        if digest != metadata.get("digest"):
            raise ConfigError("its digest does not match: it is damaged; delete it")
        data = pages.view(self.page_format.dtype).reshape(-1, *self.page_format.page_shape)
        tokens = self.page_format.check_pages(tokens, header["first_page"], data)
        scope = CacheScope.from_key_bytes(header["scope"].encode())
        return PrefixSegment(scope, tokens, header["first_page"], data, group), digest

    def _checked_group(self, header: Any, name: str) -> int:
        """Returns the group of a file whose header says that it is one of ours."""
        said = [header.get(name) for name in ("format", "version")] if isinstance(header, dict) else [header, None]
        if said == [FORMAT, _BEFORE_GROUPS] and isinstance(header["page_format"], dict):
            header = {"group": 0} | header | {"page_format": {"windows": [None]} | header["page_format"]}
        elif said != [FORMAT, VERSION]:
            raise ConfigError(f"{said[0]!r} version {said[1]!r} is not {FORMAT!r} version {VERSION}; delete it")
        self.page_format.require_same(header["page_format"], name)
        return self.page_format.checked_group(header["group"])

    def _check_sizes(self, first_page: int, tokens: Any, pages: Any) -> None:
        """Refuses parts that do not fit together, before they are read: they may be larger than the memory."""
        if tokens.get_dtype() != "I32" or pages.get_dtype() != "U8":
            raise ConfigError(f"it holds {tokens.get_dtype()} and {pages.get_dtype()}, not int32 and bytes; delete it")
        (token_count,), (byte_count,) = tokens.get_shape(), pages.get_shape()
        page_count = token_count // self.page_format.page_size - first_page
        if byte_count != page_count * self.page_format.page_bytes:
            raise ConfigError(
                f"{byte_count} bytes are not the {page_count} pages of {self.page_format.page_bytes} that its tokens "
                "stand for; delete it"
            )


def _digest(header: str, tokens: np.ndarray, pages: np.ndarray) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=32)
    for array in (tokens, pages):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _make_private(directory: Path) -> None:
    """Makes a directory that only its user can read, or logs how an existing one is not."""
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not directory.is_dir():
            raise
        if flaw := flaw_of(directory.resolve(), folder=True):
            _logger.warning("the directory of saved prefixes %s %s: give it mode 0700", directory, flaw)
    else:
        directory.chmod(0o700)  # whatever the umask


def _try_lock(descriptor: int, patience: float) -> _Lock:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _Lock.HELD
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return _Lock.BUSY
            time.sleep(_POLL_SECONDS)
        except OSError:
            return _Lock.UNKNOWN


def _sync_directory(directory: Path) -> None:
    """Makes renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
