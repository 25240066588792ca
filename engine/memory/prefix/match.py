"""Results and arguments of the prefix cache: matches, evicted pages, checked arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError
from engine.memory.integers import Int32, integer_vector
from engine.memory.pages import PageIds
from engine.memory.prefix.tree import RadixNode
from engine.memory.scope import CacheScope


@dataclass(eq=False, slots=True)
class PrefixMatch:
    """What ``RadixCache.match`` found: a handle to lock, to record and to unlock.

    Attributes:
        pages: int32 ``[n]`` page ids of the cached prefix, in the order of the tokens, read-only.
        num_tokens: tokens in those pages.
        num_queried: tokens that were looked up.
        owner: the forest of the cache that may use it; a cleared cache has another one. Internal to the cache.
        node: the node at which or within which it ends; None if nothing of its scope is cached. Internal to the cache.
        locks: how often it is locked. Internal to the cache.
    """

    pages: PageIds
    num_tokens: int
    num_queried: int
    owner: object
    node: RadixNode | None
    locks: int = field(default=0, init=False)


@dataclass(frozen=True)
class EvictedPages:
    """Pages that are about to be released, their contents still in place.

    Attributes:
        scope: scope in which they were cached.
        token_ids: int32, the whole prefix up to the end of the last page.
        first_page: number of pages of the prefix before them.
        pages: int32 ``[n]`` page ids.
    """

    scope: CacheScope
    token_ids: Int32
    first_page: int
    pages: PageIds


def checked_scope(scope: CacheScope) -> CacheScope:
    """The scope itself; raises ConfigError where it is none."""
    if not isinstance(scope, CacheScope):
        raise ConfigError(f"scope is a {type(scope).__name__}; it must be a CacheScope, with every field given")
    return scope


def token_vector(token_ids: npt.ArrayLike) -> Int32:
    """Reads token ids as int32; an int32 vector as it is.

    Raises:
        ShapeError: not a vector, not integers, or an integer beyond int32.
    """
    return _int32_vector("token_ids", token_ids, "token id")


def whole_pages(token_ids: npt.ArrayLike, pages: npt.ArrayLike, page_size: int) -> tuple[Int32, PageIds]:
    """A sequence's whole pages of tokens, and as many page ids.

    Raises:
        ShapeError: arrays of a wrong shape or dtype, or another number of pages.
    """
    tokens, page_ids = token_vector(token_ids), PageIds(_int32_vector("pages", pages, "page"))
    if page_ids.size != tokens.size // page_size:
        raise ShapeError(
            f"{page_ids.size} pages of {page_size} for {tokens.size} tokens; pass the {tokens.size // page_size} full "
            "ones, without the partial last page"
        )
    return tokens[: page_ids.size * page_size], page_ids


def _int32_vector(name: str, values: npt.ArrayLike, each: str) -> Int32:
    if isinstance(values, np.ndarray) and values.dtype == np.int32 and values.ndim == 1:
        return values
    wide = integer_vector(name, values)
    vector = wide.astype(np.int32)
    if (vector != wide).any():
        raise ShapeError(f"{each} {wide[(vector != wide).argmax()]} is beyond int32; {name} are int32")
    return vector
