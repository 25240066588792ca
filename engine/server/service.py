"""What all requests share: the engine behind them, the name it goes by, its template, and whether it is stopping."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.server.api_keys import KeyRing, read_keys
from engine.server.chat_template import ChatTemplate, find_chat_template
from engine.server.logprob_json import TokenNames
from engine.server.server_options import ServerOptions
from engine.serving.async_llm import AsyncLLM

DEFAULT_NAME = "default"  # of the model that ships


@dataclass(frozen=True)
class Prepared:
    """What can be wrong before a model is loaded, read and checked.

    Attributes:
        options: the options.
        keys: who may call.
        model_name: the name that clients ask for.
        template: makes a prompt of messages; None where neither the checkpoint nor the options have one.
    """

    options: ServerOptions
    keys: KeyRing
    model_name: str
    template: ChatTemplate | None


@dataclass
class Service:
    """What all requests share.

    Attributes:
        llm: the engine.
        prepared: the rest of what was set.
        names: the texts of tokens.
        started: seconds since 1970.
        is_stopping: whether no request is taken any more.
        in_flight: requests of HTTP that are not answered yet.
    """

    llm: AsyncLLM
    prepared: Prepared
    names: TokenNames
    started: int = field(default_factory=lambda: int(time.time()))
    is_stopping: bool = False
    in_flight: int = 0

    @property
    def options(self) -> ServerOptions:
        """The options of the server."""
        return self.prepared.options


def prepare(options: ServerOptions, model: str | None) -> Prepared:
    """Reads what the options name; raises ConfigError or CheckpointError where it is wrong.

    Args:
        options: the options.
        model: the checkpoint's folder; None is the model that ships.
    """
    directory = Path(DEFAULT_MODEL_DIR if model is None else model)
    name = options.served_model_name or (DEFAULT_NAME if model is None else directory.resolve().name)
    return Prepared(options, read_keys(options), name, find_chat_template(directory, options.chat_template))
