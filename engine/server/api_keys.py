"""Who may call, and with whom a caller shares cached prefixes."""

from __future__ import annotations

import hashlib
import hmac
import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import refuse_unknown_keys
from engine.errors import ConfigError
from engine.server.api_error import ApiError, invalid
from engine.server.server_options import ServerOptions, is_key

_BEARER = "bearer "


@dataclass(frozen=True)
class ApiKey:
    """A key, and the tenant that it stands for.

    Attributes:
        key: what a client proves itself by; empty where the server asks for none.
        tenant_salt: the tenant's salt; None leaves it to the header alone.
        require_salt: whether the header with a salt must be there.
    """

    key: str = field(repr=False)
    tenant_salt: str | None = None
    require_salt: bool = False

    def salt(self, values: Sequence[str], header: str) -> str:
        """The salt of a request, in which no tenant can meet another: what a header says only divides a key's own.

        Args:
            values: the values of the header, of which a request may have several.
            header: its name.

        Raises:
            ApiError: there are several values, such as a client's own before that which a gateway adds; or the key
                needs the header, and it is absent or empty.
        """
        if len(values) > 1:
            raise invalid(f"the header {header} is there {len(values)} times: it must be there once", header)
        given = values[0] if values else None
        if self.require_salt and not given:
            raise invalid(f"the header {header} is missing: it must have the salt of your tenant", header)
        return json.dumps([self.tenant_salt, given or None]) if given or self.tenant_salt is not None else ""


class KeyRing:
    """The keys of a server.

    Args:
        keys: the keys; none lets everybody call.
        require_salt: whether those without a salt of their own must give one.
    """

    def __init__(self, keys: Iterable[ApiKey], *, require_salt: bool = False) -> None:
        self._keys = [(_digest(key.key), key) for key in keys]
        self._anybody = ApiKey("", None, require_salt)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, authorization: str | None) -> ApiKey:
        """The key of a request; raises ApiError, 401, where it has none that is known.

        Args:
            authorization: the header of this name, "Bearer KEY".
        """
        if not self._keys:
            return self._anybody
        given = authorization or ""
        if given[: len(_BEARER)].lower() != _BEARER:
            raise _refused("no API key: send the header Authorization: Bearer KEY")
        digest, found = _digest(given[len(_BEARER) :].strip()), None
        for known, key in self._keys:  # all of them, so that the time says nothing of which one was near
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise _refused("the API key is not known to this server")
        return found


def read_keys(options: ServerOptions) -> KeyRing:
    """The keys that the options name; raises ConfigError where the file of keys is wrong."""
    named = [ApiKey(key, None, options.require_tenant_salt) for key in options.api_keys]
    filed = _read_file(Path(options.api_key_file), options) if options.api_key_file is not None else []
    known = {key.key for key in named}
    for number, key in enumerate(filed, 1):
        if key.key in known:
            raise ConfigError(
                f"key {number} in {options.api_key_file} was given before; a key has one tenant: give others"
            )
        known.add(key.key)
    return KeyRing([*named, *filed], require_salt=options.require_tenant_salt)


def _read_file(path: Path, options: ServerOptions) -> list[ApiKey]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the keys in {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError):  # whose message may quote a key
        raise ConfigError(f"the keys in {path} are not valid TOML; write a table [[keys]] for each") from None
    refuse_unknown_keys(content, ("keys",), f"keys in {path}")
    tables = content.get("keys")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path} has no table [[keys]]; write one for each key")
    return [_from_table(table, f"key {number} in {path}", options) for number, table in enumerate(tables, 1)]


def _from_table(table: dict[str, Any], what: str, options: ServerOptions) -> ApiKey:
    refuse_unknown_keys(table, ("key", "tenant_salt", "require_tenant_salt"), what)
    key, salt = table.get("key"), table.get("tenant_salt")
    required = table.get("require_tenant_salt", options.require_tenant_salt and salt is None)
    if not isinstance(key, str) or not is_key(key):
        raise ConfigError(f"{what}: key must be 1 to 512 printable ASCII characters, without blanks")
    if not isinstance(salt, str | None) or salt == "":
        raise ConfigError(f"{what}: tenant_salt must be a text that is not empty")
    if not isinstance(required, bool):
        raise ConfigError(f"{what}: require_tenant_salt must be true or false")
    return ApiKey(key, salt, required)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
