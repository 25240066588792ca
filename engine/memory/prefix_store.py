"""Prefixes on disk: pages saved by one process and taken up by another.

One safetensors file a segment, each complete in itself. A file appears under its name only when all of it has reached
the disk (temporary file, fsync, rename, fsync of the directory), and is believed only if its digest, version and page
format are right, so neither a crash nor a damaged or foreign file can bring wrong keys and values back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from engine.errors import ConfigError, EngineError
from engine.memory.page_format import PageFormat
from engine.memory.prefix_segment import PrefixSegment
from engine.memory.scope import CacheScope

FORMAT = "engine-kv-prefix"
VERSION = 1
_NAME = "prefix-{:08d}.safetensors"
_PATTERN = "prefix-" + "[0-9]" * 8 + ".safetensors"  # whatever else lies in the directory is not touched
_TEMPORARY = ".tmp"

_logger = logging.getLogger(__name__)


class PrefixStore:
    """A directory of saved segments, written by one process at a time.

    Whether the weights are still those that the pages were made with is the scope's to say: let ``CacheScope.model``
    name them in a way that holds across processes, such as a digest of the checkpoint.

    Args:
        directory: made if it is missing.
        page_format: of the pages to save, and the only one that is restored.

    Attributes:
        loaded: digest of everything that ``load`` has returned.

    Raises:
        ConfigError: the directory cannot be made.
    """

    def __init__(self, directory: Path, page_format: PageFormat) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot keep prefixes in {directory}: {error}; name a directory that can be made"
            ) from error
        self.directory = directory
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
            ShapeError: a segment does not have the store's page format; those before it have been written.
            OSError: the disk refuses; those before it have been written.
        """
        self._remove_temporary_files()
        written = 0
        for segment in segments:
            self._write(_NAME.format(written), self._encode(segment))
            written += 1
        for path in self._files()[written:]:
            path.unlink()
        _sync_directory(self.directory)
        return written

    def load(self) -> Iterator[PrefixSegment]:
        """Reads the segments back, one at a time; what is damaged or foreign is logged with the reason and left out."""
        self._remove_temporary_files()
        for path in self._files():
            try:
                segment, digest = self._decode(path)
            except (EngineError, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                _logger.warning("saved prefix %s is not restored: %s", path.name, error)
            else:
                self.loaded = hashlib.blake2b((self.loaded + digest).encode(), digest_size=32).hexdigest()
                yield segment

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob(_PATTERN))

    def _remove_temporary_files(self) -> None:
        for path in self.directory.glob(_PATTERN + _TEMPORARY):
            path.unlink(missing_ok=True)  # another process that loads from here may have done it

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.directory / (name + _TEMPORARY)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.directory / name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(self.directory)

    def _encode(self, segment: PrefixSegment) -> bytes:
        tokens = self.page_format.check_pages(segment.token_ids, segment.first_page, segment.data)
        # As bytes, because not every dtype of a pool is one of the file format's.
        pages = np.ascontiguousarray(segment.data).reshape(-1).view(np.uint8)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "page_format": self.page_format.to_dict(),
            "scope": segment.scope.key_bytes().decode(),
            "first_page": segment.first_page,
        }
        text = json.dumps(header, sort_keys=True)
        metadata = {"header": text, "digest": _digest(text, tokens, pages)}
        content: bytes = serialize({"token_ids": tokens, "pages": pages}, metadata)
        return content

    def _decode(self, path: Path) -> tuple[PrefixSegment, str]:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tokens, pages = file.get_tensor("token_ids"), file.get_tensor("pages")
        text = metadata["header"]
        digest = _digest(text, tokens, pages)
        if digest != metadata["digest"]:
            raise ConfigError("its digest does not match: it is damaged; delete it")
        header = json.loads(text)
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise ConfigError(
                f"{header['format']} version {header['version']} is not {FORMAT} version {VERSION}; delete it"
            )
        self.page_format.require_same(header["page_format"], path.name)
        data = pages.view(self.page_format.dtype).reshape(-1, *self.page_format.page_shape)
        tokens = self.page_format.check_pages(tokens, header["first_page"], data)
        scope = CacheScope.from_key_bytes(header["scope"].encode())
        return PrefixSegment(scope, tokens, header["first_page"], data), digest


def _digest(header: str, tokens: np.ndarray, pages: np.ndarray) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=32)
    for array in (tokens, pages):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    """Makes renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
