"""The bodies of requests: which fields there are, and what they are to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from engine.errors import RequestError
from engine.server.api_error import ApiError, from_engine, invalid
from engine.serving.sampling_params import MAX_ANSWERS, MAX_BIASES, MAX_LOGPROBS, MAX_STOPS, SEEDS, SamplingParams

# Fields of OpenAI's API that change nothing here, whatever they say.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Fields of it that would change the answer and are not supported: with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (),  # other than n
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
MAX_STOP_IDS = 1024
# Everything that can be wrong is bounded in number: pydantic makes an error of each, a hundred times as large.
MAX_MESSAGES = 10_000
MAX_FIELDS = 128  # of one object
MAX_NAME = 64  # characters of a name in an error


class Checked(BaseModel):
    """An object with the fields of its class, and no others; a field that is null has its default."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MAX_FIELDS:
            raise PydanticCustomError("fields", "must have {most} fields at most", {"most": MAX_FIELDS})
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Checked):
    """How an answer is streamed."""

    model_config = ConfigDict(frozen=True)  # else its default would be copied for each request

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against readers of sizes, which is not added


def _by_token(value: Any) -> Any:
    """Biases by token id: JSON has texts for keys."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("tokens", "must have {most} token ids at most", {"most": MAX_BIASES})
    if not all(token.isascii() and token.isdigit() and len(token) < MAX_NAME for token in value):
        raise PydanticCustomError("token", "its keys must be token ids, as texts of digits")
    return {int(token): bias for token, bias in value.items()}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingBody(Checked):
    """The fields that both endpoints have; values are checked by ``SamplingParams``."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_by_token)] = Field(default_factory=dict)
    stop: Annotated[list[str], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # What OpenAI's API lacks, by the names that other servers have for it.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS)] = Field(default_factory=list)
    priority: int = 0
    return_token_ids: bool = False

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to report at each position; None reports nothing."""
        raise NotImplementedError

    def sampling_params(self, *, most: int, tenant_salt: str) -> SamplingParams:
        """What the engine gets.

        Args:
            most: most tokens of an answer.
            tenant_salt: salt of the client's tenant.

        Raises:
            ApiError: a value is not allowed.
        """
        try:
            return SamplingParams(
                max_new_tokens=most,
                temperature=self.temperature,
                top_k=max(self.top_k, 0) if self.top_k >= -1 else self.top_k,  # -1 is "all" elsewhere
                top_p=self.top_p,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                seed=None if self.seed is None else self.seed % SEEDS,
                stop=self.stop,
                min_tokens=self.min_tokens,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                logprobs=self.num_logprobs,
                n=self.n,
                priority=self.priority,
                tenant_salt=tenant_salt,
            )
        except RequestError as error:
            raise from_engine(error, type(self).model_fields, "model") from error


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt as a list of prompts, all of them text or all of them token ids."""
    single = [value] if isinstance(value, str) or _is_list_of(value, int) else value
    if isinstance(single, list) and single:
        if len(single) > MAX_ANSWERS:
            raise PydanticCustomError("prompts", "a request may have {most} prompts at most", {"most": MAX_ANSWERS})
        if _is_list_of(single, str) or all(_is_list_of(prompt, int) for prompt in single):
            return single
    raise PydanticCustomError(
        "prompts", "must be a text, a list of texts, a list of token ids, or a list of such lists"
    )


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is kind for each in value)


class CompletionBody(SamplingBody):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    @property
    def num_logprobs(self) -> int | None:
        """As ``logprobs`` says."""
        return self.logprobs


def _content(value: Any) -> str:
    """The content of a message as one text; its parts are lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(map(_is_text_part, value)):
        return "\n".join(part["text"] for part in value)
    raise PydanticCustomError("content", "must be a text, or a list of parts, each of the type text with its text")


def _is_text_part(part: Any) -> bool:
    has_both = isinstance(part, dict) and part.keys() == {"type", "text"}
    return has_both and part["type"] == "text" and isinstance(part["text"], str)


class Message(Checked):
    """A message of a conversation; an answer that is sent back names, as null, all that it does not have."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]
    name: str | None = None


class ChatBody(SamplingBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    @property
    def num_logprobs(self) -> int | None:
        """``top_logprobs``, where ``logprobs`` asks for any."""
        if not self.logprobs and self.top_logprobs is not None:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def plain_messages(self) -> list[dict[str, str]]:
        """The messages as templates see them."""
        return [message.model_dump(exclude_none=True) for message in self.messages]

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer by its newer or its older name; None is what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Body = TypeVar("Body", bound=SamplingBody)


def parse_body(content: bytes, kind: type[Body]) -> Body:
    """A request's body; raises ApiError, which names the field that is wrong and quotes nothing of its value."""
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:  # its message has a place, and no content
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid("the body must be a JSON object")
    if len(values) > MAX_FIELDS:
        raise invalid(f"the body must have {MAX_FIELDS} fields at most")
    kept = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
    for name in [name for name in kept if name in UNSUPPORTED]:
        if not _asks_for_nothing(name, kept.pop(name), kept):
            raise invalid(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _first_of(error) from None


def _asks_for_nothing(name: str, value: Any, values: Mapping[str, Any]) -> bool:
    if name == "best_of":
        return bool(value == values.get("n", 1))
    return any(type(value) is type(off) and value == off for off in UNSUPPORTED[name])


def _first_of(error: ValidationError) -> ApiError:
    """The first thing that is wrong in a body."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    first = details[0]
    place = ".".join(str(part)[:MAX_NAME] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(f"{place} is not a field that this server knows", place, "unknown_parameter")
    code = "missing_required_parameter" if first["type"] == "missing" else None
    return invalid(f"{place}: {first['msg']}", place, code)
