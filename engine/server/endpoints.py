"""What the server answers at each path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from engine.errors import EngineError, QueueFull, RequestError
from engine.server.answer_json import AnswerFormat, AnswerHead, ChatFormat, CompletionFormat
from engine.server.api_error import ApiError, from_engine, invalid, json_response, stopping
from engine.server.bodies import Body, ChatBody, CompletionBody, SamplingBody, parse_body
from engine.server.choices import Choices
from engine.server.event_stream import EventStream, while_connected
from engine.server.front import Front
from engine.server.live_view import PAGES, STATE, LivePageEndpoints
from engine.server.logprob_json import ChatLogprobs, CompletionLogprobs
from engine.server.safe_log import log_failure
from engine.server.service import Service
from engine.serving.sampling_params import MAX_ANSWERS
from engine.serving.watch.exporter import EngineCollector
from engine.version import NAME, package_version

Answer = Response | EventStream

JSON = "application/json"
LARGE_BODY = 2**16  # bytes, beyond which a body is left to a thread, and takes its turn


def make_app(service: Service) -> ASGIApp:
    """The application of a server."""
    endpoints, pages = Endpoints(service), LivePageEndpoints(service.llm)
    routes = [
        Route("/v1/completions", endpoints.complete, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/models", endpoints.list_models),
        Route("/v1/models/{model:path}", endpoints.show_model),
        Route("/health", endpoints.show_health),
        Route("/metrics", endpoints.show_metrics),
        Route(PAGES, pages.show_page),
        Route(STATE, pages.show_state),
        Route("/version", endpoints.show_version),
    ]
    router = Router(routes, redirect_slashes=False)
    return Front(router, service, [route.path for route in routes if "{" not in route.path])


class Endpoints:
    """The endpoints of a server.

    Args:
        service: the engine and what is set of the server.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._llm = service.llm
        self._turn = asyncio.Lock()  # of large bodies
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(service.llm.metrics))

    async def complete(self, request: Request) -> Answer:
        """``POST /v1/completions``: texts, or lists of token ids, are continued."""
        async with self._read(request, CompletionBody) as body:
            params = body.sampling_params(most=body.max_tokens, tenant_salt=self._salt(request))
            self._require_few(len(body.prompt) * body.n)
            try:
                choices = await Choices.begin(self._llm, body.prompt, params, streams=body.stream)
            except EngineError as error:
                raise self._refusal(error, body, "prompt") from error
        logprobs = CompletionLogprobs(self._service.names) if body.num_logprobs is not None else None
        form = CompletionFormat(self._head(request, "cmpl"), logprobs, **self._told_of(body))
        return await self._answer(request, body, choices, form)

    async def chat(self, request: Request) -> Answer:
        """``POST /v1/chat/completions``: a conversation is continued."""
        async with self._read(request, ChatBody) as body:
            try:
                prompt = await self._prompt_of(body)
                most = self._room_behind(len(prompt)) if body.most_tokens is None else body.most_tokens
                params = body.sampling_params(most=most, tenant_salt=self._salt(request))
                self._require_few(body.n)
                choices = await Choices.begin(self._llm, [prompt], params, streams=body.stream)
            except EngineError as error:
                raise self._refusal(error, body, "messages") from error
        logprobs = ChatLogprobs(self._service.names) if body.num_logprobs is not None else None
        form = ChatFormat(self._head(request, "chatcmpl"), logprobs, **self._told_of(body))
        return await self._answer(request, body, choices, form)

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": [self._model()]})

    async def show_model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        self._require_model(request.path_params["model"])
        return json_response(self._model())

    async def show_health(self, request: Request) -> Response:
        """``GET /health``: whether a balancer should send requests here."""
        if self._service.is_stopping or not self._llm.is_healthy:
            state = "stopping" if self._service.is_stopping else "failed"
            return json_response({"status": state}, status=503)
        return json_response({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """``GET /metrics``, for Prometheus."""
        page = await asyncio.to_thread(generate_latest, self._registry)  # a busy engine's figures are waited for
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def show_version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response({"version": package_version()})

    @asynccontextmanager
    async def _read(self, request: Request, kind: type[Body]) -> AsyncIterator[Body]:
        """The body of a request, in whose context it is made a request of the engine.

        Large ones take turns: several threads at work on them would leave the engine's none of Python's time.
        """
        content = await self._content(request)
        if len(content) <= LARGE_BODY:
            body = parse_body(content, kind)
            self._require_model(body.model)
            yield body
            return
        async with self._turn:
            if await request.is_disconnected():
                raise ClientDisconnect
            body = await asyncio.to_thread(parse_body, content, kind)
            self._require_model(body.model)
            yield body

    async def _content(self, request: Request) -> bytes:
        options = self._service.options
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != JSON:
            raise ApiError(415, f"the body must be JSON, with the header Content-Type: {JSON}")
        try:
            async with asyncio.timeout(options.client_timeout):
                return await _read_bytes(request, options.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {options.client_timeout:g} seconds") from None

    async def _answer(self, request: Request, body: SamplingBody, choices: Choices, form: AnswerFormat) -> Answer:
        if body.stream:
            return EventStream(choices, form)
        try:
            outputs = await while_connected(request.receive, choices.outputs())
        finally:
            choices.abort()
        usage = choices.usage(sum(len(output.token_ids) for output in outputs))
        if body.num_logprobs is None:
            return json_response(form.whole(outputs, usage))
        return await asyncio.to_thread(lambda: json_response(form.whole(outputs, usage)))  # they may be many

    def _refusal(self, error: EngineError, body: SamplingBody, prompt_field: str) -> ApiError:
        if self._service.is_stopping:
            return stopping()
        if not isinstance(error, RequestError | QueueFull):
            log_failure(error)
        return from_engine(error, type(body).model_fields, prompt_field)

    async def _prompt_of(self, body: ChatBody) -> list[int]:
        """The tokens of a conversation."""
        template, tokenizer = self._service.prepared.template, self._llm.tokenizer
        if tokenizer is None:
            raise invalid("this model has no tokenizer.json: send token ids to /v1/completions", "messages")
        if template is None:
            remedy = "start the server with --chat-template FILE, or use /v1/completions"
            raise invalid(f"this model has no chat template, which makes a prompt of messages: {remedy}", "messages")
        return await asyncio.to_thread(lambda: tokenizer.encode(template.render(body.plain_messages())))

    def _room_behind(self, prompt_tokens: int) -> int:
        """Most tokens that an answer can have, in the context and in the pool."""
        plan = self._llm.plan
        fitting = plan.demand.most_tokens(plan.pages // plan.replicas, plan.context_length)
        return max(1, min(plan.context_length, fitting + 1) - prompt_tokens)

    def _require_few(self, answers: int) -> None:
        """Refuses a request for more answers than there can be at once, whatever else there is to do."""
        most = min(MAX_ANSWERS, self._llm.config.max_running_requests + self._service.options.max_waiting)
        if answers > most:
            raise invalid(f"{answers} answers, prompts times n, are more than the {most} that a request may have", "n")

    def _told_of(self, body: SamplingBody) -> dict[str, bool]:
        """What of an answer is written besides its text."""
        token_ids = body.return_token_ids or self._llm.tokenizer is None
        return {"token_ids": token_ids, "counts": body.stream_options.include_usage}

    def _head(self, request: Request, kind: str) -> AnswerHead:
        now = int(time.time())
        return AnswerHead(f"{kind}-{request.state.request_id}", now, self._service.prepared.model_name)

    def _salt(self, request: Request) -> str:
        header = self._service.options.tenant_header
        salt: str = request.state.key.salt(request.headers.getlist(header), header)
        return salt

    def _require_model(self, name: str) -> None:
        served = self._service.prepared.model_name
        if name != served:
            raise ApiError(
                404, f"there is no such model; this server has {served}", param="model", code="model_not_found"
            )

    def _model(self) -> dict[str, str | int]:
        created, name = self._service.started, self._service.prepared.model_name
        return {"id": name, "object": "model", "created": created, "owned_by": NAME}


async def _read_bytes(request: Request, most: int) -> bytes:
    """The body of a request; raises ApiError, 413, where it has more bytes than it may."""
    too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise too_large
    return bytes(content)
