"""Typed configuration: what a user may set, checked where it enters."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from bisect import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, shown

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "float8_e4m3fn", "int8", "int4")
EVICTION_POLICIES = ("lru", "lfu", "priority")
IMPLS = ("auto", "reference", "xla", "cpu", "tpu", "gpu")
MAX_PAGE_SIZE = 256
MAX_SLOTS = 2**31 - 1  # of one pool, its null page included: slots are int32
MAX_TOKENS = MAX_SLOTS - MAX_PAGE_SIZE
MAX_DEVICES = 2**16
# The values that each option of EngineConfig may have, besides None where that is its default.
CHOICES = {
    "dtype": ("auto", *DTYPES),
    "kv_cache_dtype": ("auto", *KV_DTYPES),
    "attention_impl": IMPLS,
    "eviction_policy": EVICTION_POLICIES,
}
FLAGS = ("parse_special_tokens", "overlap_steps", "disable_radix_cache")
COUNTS = {  # least and most
    "page_size": (1, MAX_PAGE_SIZE),
    "max_total_tokens": (1, MAX_TOKENS),
    "max_running_requests": (1, 2**16),
    "chunked_prefill_size": (1, 2**20),
    "context_length": (1, MAX_TOKENS),
    "host_tier_bytes": (0, 2**46),
    "tp": (1, MAX_DEVICES),
    "dp": (1, MAX_DEVICES),
    "cp": (1, MAX_DEVICES),
}
NAMED_SPLITS = 8  # a message names at most so many values that would divide


@dataclass(frozen=True)
class EngineConfig:
    """The options of an engine; ``docs/options.md`` is made from this list.

    Attributes:
        model: checkpoint directory in the Hugging Face layout; None is the small Llama that ships with the package.
        dtype: dtype of weights and activations; "auto" is the one that decodes fast: float32 on a CPU, bfloat16 on
            accelerators.
        kv_cache_dtype: dtype of the pool; "auto" is ``dtype``. Narrower ones hold more tokens in the same bytes: what
            each costs and gives is in docs/quantised-kv.md.
        parse_special_tokens: whether the name of a special token in a prompt's text becomes that token, as chat
            templates need; otherwise it is plain text, so that a user's words cannot end or begin a turn.
        page_size: tokens per page.
        max_total_tokens: usable token slots in the pool, a multiple of ``page_size``; None sizes the pool by
            ``mem_fraction_static``, at most ``max_running_requests * context_length`` of every group of layers. A pool
            that the memory cannot hold is refused.
        mem_fraction_static: fraction of the device's memory for weights and pool together, above 0 and below 1; on a
            CPU, of the memory that the machine had available before the weights were loaded, less ``host_tier_bytes``.
        max_running_requests: most requests that run at once, over all replicas; the page table, of one row each and
            one column per page of ``context_length``, may take 1 GiB.
        chunked_prefill_size: most new tokens in a step, though every running request may always decode; longer prompts
            are prefilled in chunks.
        overlap_steps: whether a step is prepared and dispatched while the step before it runs; otherwise a step's
            tokens are there when ``LLM.step`` returns. Answers are the same.
        context_length: most tokens of prompt and answer together; None is the model's own limit, which also bounds it.
            A context length that is set must fit into the pool that the memory allows.
        attention_impl: implementation of attention; "auto" takes the fastest that supports the device and the call.
        disable_radix_cache: whether the prefix cache is off, so that no page of a past request is kept.
        eviction_policy: which cached prefixes are evicted first: the least recently used, the least frequently used, or
            those of the lowest priority.
        host_tier_bytes: bytes of host memory for pages that the prefix cache evicts, at most what is available; 0
            discards them. Needs the prefix cache.
        prefix_cache_dir: directory that cached prefixes are loaded from, and saved to by ``LLM.save_prefix_cache``;
            needs ``host_tier_bytes``. Several engines may share one; see docs/serving-memory.md.
        record: file to which every decision about pages is written, for ``python -m engine trace``; it is made anew,
            has no text and no token ids, and ends at 256 MiB. See docs/pages.md.
        tp: devices that divide the heads and the weights among them (tensor parallel).
        dp: replicas of attention (data parallel), each with an equal part of the pool, the rows and a step's tokens; a
            divisor of all three.
        cp: devices that divide the tokens of each page among them (context parallel), for contexts that one device
            cannot hold; a divisor of ``page_size``.
    """

    model: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    parse_special_tokens: bool = True
    page_size: int = 16
    max_total_tokens: int | None = None
    mem_fraction_static: float = 0.85
    max_running_requests: int = 8
    chunked_prefill_size: int = 256
    overlap_steps: bool = True
    context_length: int | None = None
    attention_impl: str = "auto"
    disable_radix_cache: bool = False
    eviction_policy: str = "lru"
    host_tier_bytes: int = 0
    prefix_cache_dir: str | None = None
    record: str | None = None
    tp: int = 1
    dp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        """Checks every value; raises ConfigError."""
        if self.model is not None and not isinstance(self.model, str):
            raise ConfigError(f"model={shown(self.model)} must be the path of a checkpoint directory")
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be true or false")
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            if value is not None or getattr(EngineConfig, name) is not None:  # the default may be None
                _check_count(name, value, least, most)
        if self.host_tier_bytes and self.disable_radix_cache:
            raise ConfigError("host_tier_bytes needs the prefix cache: what it keeps is found through it; enable it")
        if not isinstance(self.prefix_cache_dir, str | os.PathLike | None):
            raise ConfigError(f"prefix_cache_dir={shown(self.prefix_cache_dir)} must be the path of a directory")
        if self.prefix_cache_dir is not None and not self.host_tier_bytes:
            raise ConfigError("prefix_cache_dir needs a host tier to load into; set host_tier_bytes")
        if not isinstance(self.record, str | os.PathLike | None):
            raise ConfigError(f"record={shown(self.record)} must be the path of a file")
        if self.max_total_tokens is not None and self.max_total_tokens % self.page_size:
            below = self.max_total_tokens // self.page_size * self.page_size
            raise ConfigError(
                f"max_total_tokens={self.max_total_tokens} is not a multiple of page_size={self.page_size}; "
                f"use {f'{below} or ' if below else ''}{below + self.page_size}"
            )
        self._check_split()
        if not isinstance(self.mem_fraction_static, float) or not 0 < self.mem_fraction_static < 1:
            raise ConfigError(
                f"mem_fraction_static={shown(self.mem_fraction_static)} must lie between 0 and 1, both excluded"
            )

    def _check_split(self) -> None:
        require_split("cp", self.cp, {"page_size": self.page_size})
        shared = {name: getattr(self, name) for name in ("max_running_requests", "chunked_prefill_size")}
        if self.max_total_tokens is not None:
            shared["pages of max_total_tokens"] = self.max_total_tokens // self.page_size
        require_split("dp", self.dp, shared)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Makes a configuration from a mapping; an unknown key raises ConfigError with the nearest known key."""
        refuse_unknown_keys(values, (field.name for field in dataclasses.fields(cls)), "engine configuration")
        return cls(**values)


def refuse_unknown_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises ConfigError where ``given`` has a key that is not ``known``; the message has the nearest known key."""
    names = sorted(known)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"unknown key {shown(key)} in the {what}; {hint}")


def require_split(option: str, parts: int, sizes: Mapping[str, int]) -> None:
    """Refuses an option that does not divide every size that it splits.

    Args:
        option: name of the option, e.g. "tp".
        parts: value of the option.
        sizes: names and values of the sizes that must be multiples of ``parts``.

    Raises:
        ConfigError: a size is not a multiple; the message lists the values that divide all, the nearest of many.
    """
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % parts]
    if wrong:
        fitting = _divisors(math.gcd(*sizes.values()))
        near = bisect(fitting, parts)
        first = max(0, min(near - NAMED_SPLITS // 2, len(fitting) - NAMED_SPLITS))
        named = ", ".join(map(str, fitting[first : first + NAMED_SPLITS]))
        raise ConfigError(f"{option}={parts} does not divide {' and '.join(wrong)}; use {option} {named}")


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def read_toml(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads a configuration file with the tables ``[model]`` (geometry, optional) and ``[engine]``.

    Raises:
        ConfigError: the file is absent, is not TOML, or has an unknown table.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number too long, tables too deep; or a path with a NUL
        raise ConfigError(f"the configuration {path} is not valid TOML: {error}") from error
    refuse_unknown_keys(content, ("model", "engine"), f"configuration {path}")
    for table, values in content.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{table!r} in the configuration {path} must be a table, [{table}]; got {shown(values)}")
    return content


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={shown(value)} is not known; choose one of {', '.join(choices)}")


def _check_count(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name}={shown(value)} must be a whole number from {least} to {most}")
