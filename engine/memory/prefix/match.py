"""What the prefix cache hands out and takes in: matches, evicted pages, token vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, ShapeError
from engine.memory.integers import Int32, Int64, integer_vector
from engine.memory.prefix.tree import RadixNode
from engine.memory.scope import CacheScope


@dataclass(eq=False, slots=True)
class PrefixMatch:
    """What ``RadixCache.match`` found: a handle to lock, to record and to unlock.

    Attributes:
        pages: int32 ``[n]`` page ids of the cached prefix, read-only.
        num_tokens: tokens in those pages.
        num_queried: tokens that were asked for.
        owner: the trees of the cache that may use it; a cleared cache has others. The cache's own.
        node: where it ends, or the node around that point; None if nothing of its scope is cached. The cache's own.
        locks: how often it is locked. The cache's own.
    """

    pages: Int32
    num_tokens: int
    num_queried: int
    owner: object
    node: RadixNode | None
    locks: int = field(default=0, init=False)


@dataclass(frozen=True)
class EvictedPages:
    """Pages that are about to be released, their contents still in place.

    Attributes:
        scope: in which they were cached.
        token_ids: int32, the whole prefix up to the end of the last page.
        first_page: pages of the prefix before them.
        pages: int32 ``[n]`` page ids.
    """

    scope: CacheScope
    token_ids: Int32
    first_page: int
    pages: Int32


def checked_scope(scope: CacheScope) -> CacheScope:
    """Refuses what is not a scope, with a ConfigError."""
    if not isinstance(scope, CacheScope):
        raise ConfigError(f"scope is a {type(scope).__name__}; it must be a CacheScope, with every field given")
    return scope


def token_vector(token_ids: npt.ArrayLike) -> Int32:
    """Reads token ids as int32; an int32 vector as it is.

    Raises:
        ShapeError: not a vector, not integers, or an integer beyond int32.
    """
    if isinstance(token_ids, np.ndarray) and token_ids.dtype == np.int32 and token_ids.ndim == 1:
        return token_ids
    wide = integer_vector("token_ids", token_ids)
    tokens = wide.astype(np.int32)
    if (tokens != wide).any():
        raise ShapeError(f"token id {wide[(tokens != wide).argmax()]} is beyond int32; token ids are int32")
    return tokens


def whole_pages(token_ids: npt.ArrayLike, pages: npt.ArrayLike, page_size: int) -> tuple[Int32, Int64]:
    """A sequence's whole pages of tokens, and as many page ids.

    Raises:
        ShapeError: arrays of a wrong shape or dtype, or another number of pages.
    """
    tokens, page_ids = token_vector(token_ids), integer_vector("pages", pages)
    if page_ids.size != tokens.size // page_size:
        raise ShapeError(
            f"{page_ids.size} pages of {page_size} for {tokens.size} tokens; pass the {tokens.size // page_size} full "
            "ones, without the partial last page"
        )
    return tokens[: page_ids.size * page_size], page_ids
