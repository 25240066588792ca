"""What a user may set of the HTTP server, and the flags of the command line for it."""

from __future__ import annotations

import argparse
import ipaddress
import re
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError, shown

KEY_VARIABLE = "ENGINE_API_KEY"
MAX_PORT = 2**16 - 1
COUNTS = {"port": (0, MAX_PORT), "max_waiting": (1, 2**20), "max_connections": (1, 2**16)}
COUNTS["max_body_bytes"] = (1024, 2**30)
SECONDS = {"client_timeout": (0.1, 3600.0), "stop_timeout": (0.0, 86400.0)}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")  # the name of a header, RFC 9110


@dataclass(frozen=True)
class ServerOptions:
    """The options of the HTTP server; ``docs/options.md`` has a table that is made from this list.

    Attributes:
        host: address of this machine to listen on. One that other machines can reach needs a key, or ``allow_no_key``.
        port: TCP port to listen on; 0 takes a free one.
        api_keys: keys that clients may prove themselves by; the environment variable ``ENGINE_API_KEY`` adds one. A
            flag can be read by every user of the machine, in its list of processes.
        api_key_file: TOML file with a table ``[[keys]]`` for each key; see docs/serving-http.md.
        allow_no_key: whether to listen where other machines can reach the server, without any key.
        served_model_name: the name that clients ask for; None is the name of the checkpoint's folder, and "default" for
            the model that ships.
        tenant_header: header that carries the salt of a client's tenant: prompts share cached prefixes only with
            prompts of the same salt.
        require_tenant_salt: whether a request without that header is refused, unless its key has a salt of its own.
        max_waiting: most answers that wait for a place among those that run; further ones are refused with 429.
        max_connections: most connections at once; further ones are told 503, or cut off.
        max_body_bytes: most bytes of a request's body.
        client_timeout: seconds within which a client must send a request's head, and its body; and seconds without any
            progress after which a client that reads nothing is cut off.
        stop_timeout: seconds that running requests have to finish when the server is stopped.
        chat_template: Jinja file that turns messages into a prompt; None is the checkpoint's own.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    allow_no_key: bool = False
    served_model_name: str | None = None
    tenant_header: str = "X-Tenant-Salt"
    require_tenant_salt: bool = False
    max_waiting: int = 256
    max_connections: int = 512
    max_body_bytes: int = 4 * 2**20
    client_timeout: float = 30.0
    stop_timeout: float = 30.0
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Checks every value; raises ConfigError."""
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"{name}={shown(value)} must be a whole number from {least} to {most}")
        for name, (shortest, longest) in SECONDS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not shortest <= value <= longest:
                raise ConfigError(f"{name}={shown(value)} must be from {shortest:g} to {longest:g} seconds")
        if not _TOKEN.fullmatch(self.tenant_header):
            raise ConfigError(f"tenant_header={shown(self.tenant_header)} is not the name of a header")
        if not all(is_key(key) for key in self.api_keys):
            raise ConfigError("an API key must be of 1 to 512 printable ASCII characters, without blanks")
        if self.served_model_name is not None and not re.fullmatch(r"[\x21-\x7e]{1,256}", self.served_model_name):
            raise ConfigError(
                f"served_model_name={shown(self.served_model_name)} must be printable ASCII without blanks"
            )

    def bind(self, *, has_keys: bool) -> socket.socket:
        """A socket at the host and port, which does not listen yet.

        Args:
            has_keys: whether clients need a key.

        Raises:
            ConfigError: the address cannot be had; or other machines can reach it, and nobody needs a key.
        """
        try:
            (family, kind, protocol, _, place), *_ = socket.getaddrinfo(
                self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            if not (has_keys or self.allow_no_key or _is_loopback(str(place[0]))):
                raise ConfigError(
                    f"other machines can reach host={self.host}, and no API key is set; set {KEY_VARIABLE} or "
                    "api_key_file, or say --allow-no-key"
                )
            with ExitStack() as undo:
                bound = undo.enter_context(socket.socket(family, kind, protocol))
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(place)
                undo.pop_all()
            return bound
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot serve on {self.host}:{self.port}: {error}; name a free port") from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def is_key(text: object) -> bool:
    """Whether a text can be an API key, as a header can carry it."""
    return isinstance(text, str) and re.fullmatch(r"[\x21-\x7e]{1,512}", text) is not None


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Declares a flag for each field of ServerOptions; ``options_from`` reads them."""
    group = parser.add_argument_group("server")

    def add(flag: str, meaning: str, **how: Any) -> None:
        group.add_argument(flag, help=meaning, **how)

    add("--host", "address to listen on; default 127.0.0.1", metavar="ADDRESS")
    add("--port", "port to listen on, 0 for a free one; default 8000", type=int, metavar="N")
    several = f"a key that clients must have, may be given several times; safer: {KEY_VARIABLE} in the environment"
    add("--api-key", several, dest="api_keys", action="append", metavar="KEY")
    add("--api-key-file", "TOML file with a table [[keys]] for each key", metavar="FILE")
    add("--allow-no-key", "need no key even where other machines can reach it", action="store_true", default=None)
    add("--served-model-name", "the name that clients ask for; default: the checkpoint's folder", metavar="NAME")
    add("--tenant-header", "header with the salt of a client's tenant; default X-Tenant-Salt", metavar="NAME")
    add("--require-tenant-salt", "refuse requests without that header", action="store_true", default=None)
    add("--max-waiting", "most answers that wait; default 256", type=int, metavar="N")
    add("--max-connections", "most connections at once; default 512", type=int, metavar="N")
    add("--max-body-bytes", "most bytes of a request's body; default 4 MiB", type=int, metavar="N")
    slow = "time for a client to send a request, or to read something of an answer; default 30"
    add("--client-timeout", slow, type=float, metavar="SECONDS")
    stop = "time for running requests to finish when the server is stopped; default 30"
    add("--stop-timeout", stop, type=float, metavar="SECONDS")
    add("--chat-template", "Jinja template; default: the checkpoint's own", metavar="FILE")


def options_from(args: argparse.Namespace, environment: Mapping[str, str]) -> ServerOptions:
    """The options that a command line gives, with the key of the environment; raises ConfigError for a wrong one."""
    names = ServerOptions.__dataclass_fields__
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    keys = [*given.get("api_keys", ()), *filter(None, [environment.get(KEY_VARIABLE)])]
    return ServerOptions(**given | {"api_keys": tuple(keys)})
