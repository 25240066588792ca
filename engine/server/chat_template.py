"""A checkpoint's chat template, in Jinja as transformers reads it: the messages of a conversation become one text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence, Sized
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, ConfigError, RequestError, shown
from engine.models.tensor_files import read_json
from engine.models.text import TOKENIZER_CONFIG_FILE

TEMPLATE_FILE, TEMPLATE_TABLE = "chat_template.jinja", "chat_template.json"
RENDER_SECONDS = 5.0
MOST_CHARACTERS = 2**26  # of a rendered text; what a body may have becomes longer only by the template's own words
MOST_BITS = 1024  # of a number that a template computes
_NAMED = "<template>"  # the file name that Jinja gives to the code of a template


class ChatTemplate:
    """A template, ready to render.

    Args:
        source: its text.
        tokens: names that it may use, as ``bos_token``, with the texts of those tokens.
        origin: where it was read, for messages.

    Raises:
        CheckpointError: it is not a Jinja template.
    """

    def __init__(self, source: str, tokens: dict[str, str], origin: str) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template of {origin} is not valid Jinja: {error}") from error
        self._tokens = tokens

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation, up to where the model's answer begins.

        Raises:
            RequestError: the template refuses the messages or fails, or takes longer than ``RENDER_SECONDS``.
        """
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = _within(RENDER_SECONDS, lambda: self._template.render(self._tokens | given))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a template is code of the checkpoint, which may fail in any way
            what = str(error) or type(error).__name__
            raise RequestError(f"the chat template cannot render the messages: {what}") from error
        if len(text) > MOST_CHARACTERS:
            raise RequestError(f"the chat template made {len(text)} characters of the messages, which is too long")
        return text


def find_chat_template(directory: Path, file: str | None = None) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, as transformers finds it, or of a file; None where there is none.

    Raises:
        ConfigError: the file cannot be read.
        CheckpointError: the template is not one.
    """
    tokens, listed = _from_tokenizer(directory)
    path = Path(file) if file is not None else directory / TEMPLATE_FILE
    if file is not None or path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), tokens, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {path}: {error}; check the path") from error
    table = directory / TEMPLATE_TABLE
    origin = table if table.is_file() else directory / TOKENIZER_CONFIG_FILE
    source = _chosen(read_json(table).get("chat_template") if table.is_file() else listed, origin)
    return None if source is None else ChatTemplate(source, tokens, str(origin))


def _from_tokenizer(directory: Path) -> tuple[dict[str, str], Any]:
    """The texts of the tokens that ``tokenizer_config.json`` names, and its chat template, unchecked."""
    path = directory / TOKENIZER_CONFIG_FILE
    values = read_json(path) if path.is_file() else {}
    named = {key: value for key, value in values.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}, values.get("chat_template")


def _chosen(value: Any, origin: Path) -> str | None:
    """The template of that name, or the one called "default" of several."""
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = next((each.get("template") for each in value if each.get("name") == "default"), None)
    if not isinstance(value, str | None):
        raise CheckpointError(f"{origin} has chat_template={shown(value)}, which must be a text; restore the file")
    return value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product is no larger than a prompt may be: no other operator makes much at once."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """What an operator makes of two values."""
        if operator == "**" or not _is_small_product(left, right):
            raise TemplateError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _is_small_product(left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() <= MOST_BITS
    sizes = [
        abs(value) if isinstance(value, int) else len(value) if isinstance(value, Sized) else 1
        for value in (left, right)
    ]
    return sizes[0] * sizes[1] <= MOST_CHARACTERS


class _Generation(Extension):
    """The tag ``generation``, which marks a model's words for training; here its body is all that it is."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: Jinja's own filter would escape what is special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _within(seconds: float, render: Callable[[], str]) -> str:
    """What ``render`` returns; raises TimeoutError in a template's code after ``seconds``, even in a loop.

    Nothing else can stop a thread. Only the lines of a template are watched, not those of Jinja.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != _NAMED:
            return None
        if time.monotonic() > end:
            raise TimeoutError(f"it took longer than {seconds:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        return render()
    finally:
        sys.settrace(before)
