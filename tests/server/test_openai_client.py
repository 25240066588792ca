"""The server as the openai package sees it, over the true engine."""

import asyncio
import math
import re

import openai
import pytest
from server_support import client_of, exchange, over, until

from engine.models.default_model import DEFAULT_MODEL_DIR
from engine.server.chat_template import ChatTemplate
from engine.serving.sampling_params import SamplingParams

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank, and"
TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    {},
    "a test",
)
GREEDY = {"model": "default", "temperature": 0}


@pytest.fixture(scope="module")
def server(llm):
    with over(llm, TEMPLATE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with client_of(server, timeout=30) as made:
        yield made


def expected(server, prompt, **params):
    """What ``LLM.generate`` answers, of the engine that is idle between requests."""
    return server.engine.generate([prompt], SamplingParams(**params))[0]


def joined(stream):
    """Texts and finish reasons of a stream of completions by choice, and its usage."""
    texts, reasons, usage = {}, {}, None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return texts, reasons, usage


def test_the_model_is_listed_and_described(client):
    assert [model.id for model in client.models.list()] == ["default"]
    assert client.models.retrieve("default").object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt/4")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}])
def test_a_completion_is_what_the_engine_generates_whole_or_streamed(client, server, sampling):
    answer = expected(server, PROMPT, max_new_tokens=24, **sampling)
    request = {"model": "default", "prompt": PROMPT, "max_tokens": 24, **sampling}
    whole = client.completions.create(**request)
    assert whole.choices[0].text == answer.text
    assert whole.choices[0].finish_reason == answer.finish_reason == "length"
    assert (whole.object, whole.model) == ("text_completion", "default")
    assert whole.id.startswith("cmpl-")
    texts, reasons, usage = joined(
        client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert (texts, reasons) == ({0: answer.text}, {0: "length"})
    tokens = len(answer.prompt_token_ids)
    for counts in (whole.usage, usage):
        assert (counts.prompt_tokens, counts.completion_tokens, counts.total_tokens) == (tokens, 24, tokens + 24)


def test_a_prompt_may_be_token_ids_and_several_prompts_have_several_answers(client, server):
    prompts = ["The Queen", "Alice", "The Rabbit"]
    ids = [server.engine.tokenizer.encode(prompt) for prompt in prompts]
    alone = [client.completions.create(**GREEDY, prompt=prompt).choices[0].text for prompt in prompts]
    for given in (prompts, ids):
        together = client.completions.create(**GREEDY, prompt=given)
        assert [choice.index for choice in together.choices] == [0, 1, 2]
        assert [choice.text for choice in together.choices] == alone
        assert together.usage.prompt_tokens == sum(map(len, ids))
        streamed, _, _ = joined(client.completions.create(**GREEDY, prompt=given, stream=True))
        assert [streamed[index] for index in range(3)] == alone
    assert client.completions.create(**GREEDY, prompt=ids[1]).choices[0].text == alone[1]


def test_n_answers_to_each_of_several_prompts_are_numbered_through(client):
    request = {"model": "default", "prompt": ["Alice", "The Queen"], "n": 2, "seed": 3, "max_tokens": 12}
    whole = client.completions.create(**request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    texts, reasons, usage = joined(
        client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_is_the_answer_to_what_its_template_makes_whole_or_streamed(client, server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    prompt = "system: Be brief.\nuser: Who are you?\nassistant: "
    answer = expected(server, prompt, max_new_tokens=20)
    whole = client.chat.completions.create(**GREEDY, messages=messages, max_completion_tokens=20)
    assert whole.choices[0].message.content == answer.text
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(answer.prompt_token_ids)
    streamed = list(client.chat.completions.create(**GREEDY, messages=messages, max_tokens=20, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in streamed) == answer.text
    assert streamed[-1].choices[0].finish_reason == "length"
    assert {event.object for event in streamed} == {"chat.completion.chunk"}
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, messages[1]]
    again = client.chat.completions.create(**GREEDY, messages=parts, max_tokens=20)
    assert again.choices[0].message.content == answer.text


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client, llm):
    answer = client.chat.completions.create(
        **GREEDY, messages=[{"role": "user", "content": "a" * 900}], extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == llm.plan.context_length


def test_an_answer_can_be_sent_back_as_part_of_the_next_conversation(client):
    messages = [{"role": "user", "content": "Who are you?"}]
    first = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=5)
    messages += [first.choices[0].message, {"role": "user", "content": "Say it again."}]
    assert client.chat.completions.create(**GREEDY, messages=messages, max_tokens=5).choices[0].message.content


def test_the_asynchronous_client_is_served_many_times_at_once(server, client):
    prompts = [f"{count} mice and a cat" for count in range(12)]
    alone = [client.completions.create(**GREEDY, prompt=prompt).choices[0].text for prompt in prompts]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:

            async def one(prompt):
                stream = await many.completions.create(**GREEDY, prompt=prompt, stream=True)
                return "".join([event.choices[0].text async for event in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(ask()) == alone


def test_logprobs_of_completions_are_those_of_the_engine(client, server):
    answer = expected(server, PROMPT, max_new_tokens=6, logprobs=2)
    request = {**GREEDY, "prompt": PROMPT, "max_tokens": 6, "logprobs": 2}
    whole = client.completions.create(**request).choices[0].logprobs
    assert "".join(whole.tokens) == answer.text
    assert whole.text_offset == list(range(6))
    assert whole.token_logprobs == pytest.approx([each.chosen for each in answer.logprobs], rel=1e-4)
    assert all(len(top) in (2, 3) for top in whole.top_logprobs)
    pieces = [event.choices[0].logprobs for event in client.completions.create(**request, stream=True)]
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == whole.text_offset
    none = client.completions.create(**request | {"logprobs": 0}).choices[0].logprobs
    assert none.top_logprobs == [{token: value} for token, value in zip(none.tokens, none.token_logprobs, strict=True)]


def test_logprobs_of_chats_are_those_of_the_engine(client):
    messages = [{"role": "user", "content": "Hello"}]
    request = {**GREEDY, "messages": messages, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**request).choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert math.exp(entry.logprob) <= 1
        assert len(entry.top_logprobs) == 3
    streamed = client.chat.completions.create(**request, stream=True)
    pieces = [event.choices[0].logprobs for event in streamed]
    entries = [each for piece in pieces if piece for each in piece.content]
    assert [entry.token for entry in entries] == [entry.token for entry in content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in content], rel=1e-4)
    assert (
        client.chat.completions.create(**request | {"top_logprobs": 0}).choices[0].logprobs.content[0].top_logprobs
        == []
    )


def test_token_ids_are_returned_where_they_are_asked_for(client, server):
    answer = expected(server, PROMPT, max_new_tokens=7)
    request = {**GREEDY, "prompt": PROMPT, "max_tokens": 7, "extra_body": {"return_token_ids": True}}
    assert client.completions.create(**request).choices[0].token_ids == answer.token_ids
    pieces = [event.choices[0].token_ids for event in client.completions.create(**request, stream=True)]
    assert [token for piece in pieces for token in piece] == answer.token_ids


def test_a_stop_token_ends_an_answer_and_ignoring_the_end_does_not(client, server):
    answer = expected(server, PROMPT, max_new_tokens=12)
    last = answer.token_ids[6]
    extra = {"stop_token_ids": [last], "return_token_ids": True}
    choice = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=12, extra_body=extra).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.token_ids == answer.token_ids[: answer.token_ids.index(last) + 1]


def test_an_answer_ends_before_its_stop_text_whole_or_streamed(client, server):
    text = expected(server, PROMPT, max_new_tokens=60).text
    stop = text[20:24]
    request = {**GREEDY, "prompt": PROMPT, "max_tokens": 60, "stop": ["not there", stop]}
    whole = client.completions.create(**request).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    texts, reasons, _ = joined(client.completions.create(**request, stream=True))
    assert (texts, reasons) == ({0: whole.text}, {0: "stop"})
    messages = [{"role": "user", "content": "Hello"}]
    said = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=30).choices[0].message.content
    stopped = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=30, stop=said[9:12], stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stopped) == said[: said.index(said[9:12])]


def test_a_prompt_that_was_there_before_is_cached_for_its_tenant_alone(client, llm):
    def cached(prompt, salt):
        headers = {} if salt is None else {"X-Tenant-Salt": salt}
        usage = client.completions.create(**GREEDY, prompt=prompt, extra_headers=headers).usage
        return usage.prompt_tokens_details.cached_tokens

    for number, first in enumerate([None, "a", "b"]):
        prompt = f"{number} {PROMPT}"
        assert cached(prompt, first) == 0
        for other in {None, "a", "b", '["a"]'} - {first}:
            assert cached(prompt, other) == 0
        assert cached(prompt, first) > len(prompt) - llm.config.page_size


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_gives_the_pages_back(server, client, llm, streams):
    before = llm.metrics().finished.get("abort", 0)
    request = {**GREEDY, "prompt": PROMPT, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    if streams:
        with client.completions.create(**request, stream=True) as stream:
            next(stream)
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).completions.create(**request)
    until(lambda: llm.metrics().finished.get("abort", 0) == before + 1)
    until(lambda: llm.metrics().pool.private_pages == llm.metrics().pool.locked_pages == 0)


def test_too_long_a_prompt_is_refused_with_the_arithmetic(client, llm):
    length = llm.plan.context_length
    with pytest.raises(openai.BadRequestError, match=rf"prompt of {length + 1} tokens .* context of {length}") as error:
        client.completions.create(**GREEDY, prompt="a" * length)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**GREEDY, messages=[{"role": "user", "content": "a" * length}])
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("n", 0),
        ("n", 129),
        ("max_tokens", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.5),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"99999": 1}),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("logprobs", 21),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [5, 999]),
        ("prompt", ["a", [1]]),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("min_tokens", 17),
        ("stop_token_ids", [999]),
        ("priority", 2**40),
        ("seed", 2**70),
        ("suffix", "x"),
        ("best_of", 2),
        ("echo", True),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("no_such_field", 1),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(client, field, wrong):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="default", prompt=PROMPT, extra_body={field: wrong})
    assert error.value.param == field
    assert error.value.type == "invalid_request_error"
    assert field in error.value.message or field == "prompt"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_wrong_limit_of_a_chat_is_refused_by_the_name_it_was_given_by(client, field):
    with pytest.raises(openai.BadRequestError, match=field) as error:
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": "a"}], **{field: 0})
    assert error.value.param == field


def test_what_asks_for_nothing_or_changes_nothing_is_let_through(client):
    nothing = {"suffix": None, "echo": False, "best_of": 1, "tools": [], "response_format": {"type": "text"}}
    extra = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "top_k": -1, **nothing}
    with_extra = client.completions.create(**GREEDY, prompt=PROMPT, extra_body=extra)
    assert with_extra.choices[0].text == client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text


def test_parameters_reach_the_engine_by_its_own_names(server, client, monkeypatch):
    seen = []
    submit = server.service.llm.submit

    async def noted(prompt, params, **options):
        seen.append(params)
        return await submit(prompt, params, **options)

    monkeypatch.setattr(server.service.llm, "submit", noted)
    given = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "priority": 3}
    client.completions.create(
        model="default", prompt="a", max_tokens=4, temperature=0.5, top_p=0.9, seed=-1, presence_penalty=0.5, n=2,
        frequency_penalty=0.25, logit_bias={"7": 2}, stop=["zz", "yy"], extra_body={**given, "stop_token_ids": [9]},
    )  # fmt: skip
    (params,) = seen
    assert params == SamplingParams(
        max_new_tokens=4, temperature=0.5, top_p=0.9, seed=2**31 - 1, presence_penalty=0.5, n=2,
        frequency_penalty=0.25, logit_bias={7: 2}, stop=("zz", "yy"), stop_token_ids=(9,), **given,
    )  # fmt: skip


def test_the_example_of_the_page_runs_as_printed(server, capsys):
    page = (DEFAULT_MODEL_DIR.parents[2] / "docs" / "serving-http.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(block.replace(":8000", f":{server.port}"), names)
    names["client"].close()
    assert len(capsys.readouterr().out) == 16


def test_metrics_are_those_of_the_engine(server, client):
    client.completions.create(**GREEDY, prompt=PROMPT)
    status, headers, page = exchange(server, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert b"engine_num_requests_running 0.0" in page
    assert b"engine_generation_tokens_total" in page


def test_the_template_of_a_checkpoint_is_not_needed_by_completions(llm):
    assert not (DEFAULT_MODEL_DIR / "chat_template.jinja").exists()
    with over(llm) as server, client_of(server) as client:
        assert client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text
        with pytest.raises(openai.BadRequestError, match="--chat-template FILE") as error:
            client.chat.completions.create(**GREEDY, messages=[{"role": "user", "content": "Hello"}])
        assert error.value.param == "messages"
