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
EVICTION_POLICIES = ("lru", "lfu", "priority")
IMPLS = ("auto", "reference", "xla", "cpu", "tpu", "gpu")
MAX_PAGE_SIZE = 256
MAX_SLOTS = 2**31 - 1  # of one pool, its null page included: slots are int32
MAX_TOKENS = MAX_SLOTS - MAX_PAGE_SIZE
MAX_RUNNING_REQUESTS = 2**16
MAX_STEP_TOKENS = 2**20
MAX_HOST_TIER_BYTES = 2**46
MAX_DEVICES = 2**16
NAMED_SPLITS = 8  # of the values that would do, the message names at most these


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is told to hold and how.

    Attributes:
        model: checkpoint directory in the Hugging Face layout; None is the small Llama that ships with the package.
        dtype: of weights and activations; "auto" is what decodes fast: float32 on CPU, bfloat16 on accelerators.
        kv_cache_dtype: of the pool; "auto" is ``dtype``.
        parse_special_tokens: whether the name of a special token in a prompt's text becomes that token, as chat
            templates need; without, it is text like any other, so that a user's words cannot end or begin a turn.
        page_size: tokens a page, 1 to 256.
        max_total_tokens: usable token slots in the pool, 1 to 2**31 - 257, a multiple of ``page_size``; None sizes it
            by ``mem_fraction_static``, and never larger than ``max_running_requests * context_length``. What the
            memory cannot hold is refused.
        mem_fraction_static: share of the device's memory for weights and pool together, in (0, 1); on a CPU of what
            the machine had available before the weights were loaded, less ``host_tier_bytes``.
        max_running_requests: slots of the continuous batch, 1 to 2**16; times the pages of ``context_length`` they are
            the page table, of at most 1 GiB.
        chunked_prefill_size: most new tokens in a step, 1 to 2**20; longer prompts are prefilled in chunks.
        overlap_steps: whether a step is prepared and dispatched while the one before it runs; without, a step's tokens
            are there when ``LLM.step`` returns. Answers are the same.
        context_length: most tokens of prompt and answer together, at most the model's own limit, which None is. One
            that is given must fit into the pool that the memory allows.
        attention_impl: one of ``IMPLS``.
        disable_radix_cache: keep nothing of past requests.
        eviction_policy: what the prefix cache gives up first, "lru", "lfu" or "priority".
        host_tier_bytes: host memory for pages that the prefix cache gives up, at most 2**46 and what is available; 0
            lets them go.
        prefix_cache_dir: directory that cached prefixes are loaded from, and saved to by ``LLM.save_prefix_cache``;
            needs a host tier to load into. Several engines may share one; see docs/serving-memory.md.
        tp: devices that share the heads and the weights, 1 to 2**16.
        dp: replicas of attention, 1 to 2**16; each has its share of the pool, the slots and the tokens of a step.
        cp: devices that share the tokens of each page, 1 to 2**16, for contexts that one device cannot hold.
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
    tp: int = 1
    dp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        """Checks every value; raises ConfigError."""
        if self.model is not None and not isinstance(self.model, str):
            raise ConfigError(f"model={shown(self.model)} must be the path of a checkpoint directory")
        _check_choice("dtype", self.dtype, ("auto", *DTYPES))
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", *DTYPES))
        _check_choice("attention_impl", self.attention_impl, IMPLS)
        _check_choice("eviction_policy", self.eviction_policy, EVICTION_POLICIES)
        for name in ("disable_radix_cache", "overlap_steps", "parse_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be true or false")
        _check_count("host_tier_bytes", self.host_tier_bytes, least=0, most=MAX_HOST_TIER_BYTES)
        if self.host_tier_bytes and self.disable_radix_cache:
            raise ConfigError("host_tier_bytes needs the prefix cache: what it keeps is found through it; enable it")
        if not isinstance(self.prefix_cache_dir, str | os.PathLike | None):
            raise ConfigError(f"prefix_cache_dir={shown(self.prefix_cache_dir)} must be the path of a directory")
        if self.prefix_cache_dir is not None and not self.host_tier_bytes:
            raise ConfigError("prefix_cache_dir needs a host tier to load into; set host_tier_bytes")
        _check_count("page_size", self.page_size, most=MAX_PAGE_SIZE, rule="from {} to {}")
        _check_count("max_running_requests", self.max_running_requests, most=MAX_RUNNING_REQUESTS)
        _check_count("chunked_prefill_size", self.chunked_prefill_size, most=MAX_STEP_TOKENS)
        for name in ("max_total_tokens", "context_length"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), most=MAX_TOKENS)
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
        for name in ("tp", "dp", "cp"):
            _check_count(name, getattr(self, name), most=MAX_DEVICES)
        require_split("cp", self.cp, {"page_size": self.page_size})
        shared = {name: getattr(self, name) for name in ("max_running_requests", "chunked_prefill_size")}
        if self.max_total_tokens is not None:
            shared["pages of max_total_tokens"] = self.max_total_tokens // self.page_size
        require_split("dp", self.dp, shared)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Makes a configuration from a mapping; an unknown key raises ConfigError naming the nearest known one."""
        refuse_unknown_keys(values, (field.name for field in dataclasses.fields(cls)), "engine configuration")
        return cls(**values)


def refuse_unknown_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises ConfigError where ``given`` holds a key that is not ``known``, with the nearest known one."""
    names = sorted(known)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"unknown key {shown(key)} in the {what}; {hint}")


def require_split(option: str, parts: int, sizes: Mapping[str, int]) -> None:
    """Refuses a number of parts that does not divide what it splits.

    Args:
        option: its name, e.g. "tp".
        parts: its value.
        sizes: names and values of what must be a multiple of it.

    Raises:
        ConfigError: it does not divide; the message lists the values that do, of many the nearest.
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
        ConfigError: the file is absent, is not TOML, or has another table.
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


def _check_count(
    name: str, value: object, *, least: int = 1, most: int, rule: str = "at least {} and at most {}"
) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name}={shown(value)} must be a whole number {rule.format(least, most)}")
