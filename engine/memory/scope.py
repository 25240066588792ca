"""Under which conditions cached keys and values may be reused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError

MOST_BITS = 4096  # of a number in a key: Python refuses to write some thousand digits


@dataclass(frozen=True)
class Adapter:
    """A fine-tuned adapter over the base weights. A type of its own, so that its name can never pass for a salt.

    Attributes:
        name: which adapter.
    """

    name: str

    def __post_init__(self) -> None:
        _require("Adapter.name", self.name, str)


@dataclass(frozen=True)
class LayoutKey:
    """A KV layout descriptor in hashable form.

    Attributes:
        items: the descriptor's fields and values, sorted by field, each field once.

    Raises:
        ConfigError: there are none, or they are otherwise.
    """

    items: tuple[tuple[str, int | str], ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise ConfigError("a layout descriptor has no fields; pass KVLayout.to_dict() of the pool")
        if not all(isinstance(item, tuple) and len(item) == 2 for item in self.items):
            raise ConfigError("a layout key holds pairs of a field's name and its value; use LayoutKey.of()")
        for name, value in self.items:
            _require("a layout field's name", name, str)
            _require(f"layout field {name}", value, int | str)
        if self.items != tuple(sorted(dict(self.items).items())):
            raise ConfigError(f"layout fields {[name for name, _ in self.items]} must be sorted, each once: use of()")

    @classmethod
    def of(cls, descriptor: Mapping[str, int | str]) -> LayoutKey:
        """Freezes a descriptor, e.g. what ``KVLayout.to_dict`` returns.

        Raises:
            ConfigError: it is empty or no mapping, or a value is neither integer nor string.
        """
        if not isinstance(descriptor, Mapping):
            raise ConfigError(f"a layout is a {type(descriptor).__name__}; pass KVLayout.to_dict() of the pool")
        return cls(tuple(sorted(descriptor.items(), key=lambda item: str(item[0]))))


@dataclass(frozen=True)
class CacheScope:
    """What must be equal, besides the tokens, for cached keys and values to be the right ones.

    Every field is required, because a default could lead to sharing by mistake.

    Attributes:
        model: name of the base weights and of all else that determines results: the model's configuration, the dtype.
            Where pages outlive the process it must depend on every byte of the weights.
        weights_epoch: how often those weights have been replaced, 0 or more.
        adapter: the adapter over these weights; None is the base model alone.
        tenant_salt: separates tenants that must not learn of each other's prompts; all requests with "" share.
        layout: what the bytes of a page mean.

    Raises:
        ConfigError: a field has the wrong type or is no Unicode text, or ``weights_epoch`` is negative.
    """

    model: str
    weights_epoch: int
    adapter: Adapter | None
    tenant_salt: str
    layout: LayoutKey

    def __post_init__(self) -> None:
        _require("model", self.model, str)
        _require("weights_epoch", self.weights_epoch, int)
        _require("adapter", self.adapter, Adapter | None)
        _require("tenant_salt", self.tenant_salt, str)
        _require("layout", self.layout, LayoutKey)
        if self.weights_epoch < 0:
            raise ConfigError(f"weights_epoch is {self.weights_epoch}; it counts replacements, so it is 0 or more")

    def __hash__(self) -> int:
        """A hash of the fields in which scopes of one engine differ: a scope is looked up several times per step."""
        return hash((self.model, self.weights_epoch, self.tenant_salt))

    def key_bytes(self) -> bytes:
        """The scope as bytes that no other scope has: canonical JSON, the same in every process."""
        adapter = None if self.adapter is None else self.adapter.name
        fields = [self.model, self.weights_epoch, adapter, self.tenant_salt, self.layout.items]
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_key_bytes(cls, key: bytes) -> CacheScope:
        """Reads what ``key_bytes`` wrote.

        Raises:
            ConfigError: it did not.
        """
        try:
            model, weights_epoch, adapter, tenant_salt, layout = json.loads(key)
            wrapped = None if adapter is None else Adapter(adapter)
            scope = cls(model, weights_epoch, wrapped, tenant_salt, LayoutKey.of(dict(layout)))
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_key(key) from error
        if scope.key_bytes() != key:  # spelled otherwise: two keys of one scope, or one that says more than we read
            raise _no_key(key)
        return scope


def is_text(value: str) -> bool:
    """Whether a string is Unicode text: halves of surrogate pairs, side by side, are written as the whole character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_key(key: object) -> ConfigError:
    return ConfigError(f"not the key of a scope: {key!r:.80}; pass what CacheScope.key_bytes wrote")


def _require(name: str, value: object, kind: object) -> None:
    # A bool is an int to Python, and to no one else.
    if isinstance(value, bool) or not isinstance(value, kind):  # type: ignore[arg-type]
        expected = getattr(kind, "__name__", kind)
        raise ConfigError(f"{name} is {value!r} of type {type(value).__name__}; it must be {expected}")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ConfigError(f"{name} is a number of {value.bit_length()} bits; it may have {MOST_BITS}")
    if isinstance(value, str) and not is_text(value):
        raise ConfigError(f"{name} is {value!r}, which holds half of a surrogate pair; it must be Unicode text")
