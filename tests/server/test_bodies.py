"""Whatever JSON a client sends, it is answered or refused: never a fault, and no word of it in the log."""

import json
import logging
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_support import exchange, over

from engine.server.api_error import ApiError
from engine.server.bodies import IGNORED, UNSUPPORTED, ChatBody, CompletionBody, parse_body
from engine.server.chat_template import ChatTemplate

SECRET = "Xyzzy"
ROUTES = {CompletionBody: "/v1/completions", ChatBody: "/v1/chat/completions"}
NEEDED = {
    CompletionBody: {"model": "default", "prompt": SECRET},
    ChatBody: {"model": "default", "messages": [{"role": "user", "content": SECRET}]},
}
numbers = st.one_of(
    st.integers(-5, 200), st.integers(), st.floats(), st.sampled_from([10**30, -(2**63), 2**64, 1e308, -0.0])
)
texts = st.one_of(st.text(max_size=8), st.just(SECRET))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "assistant", "tool"]) | anything,
            "content": texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts})) | anything,
            "name": texts | anything,
        },
    ),
    max_size=3,
)
biases = st.dictionaries(st.integers(-3, 300).map(str) | texts, numbers, max_size=3)
plausible = {"messages": messages, "logit_bias": biases, "prompt": st.lists(st.integers(-2, 300) | texts, max_size=4)}


def bodies(kind):
    fields = sorted({*kind.model_fields, *UNSUPPORTED, *IGNORED, SECRET})
    values = {name: st.one_of(anything, plausible.get(name, numbers)) for name in fields}
    some = st.sets(st.sampled_from(fields), max_size=4)
    changes = some.flatmap(lambda names: st.fixed_dictionaries({name: values[name] for name in names}))
    return changes.map(lambda change: NEEDED[kind] | change)


@pytest.fixture(scope="module")
def server(llm):
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.name }}{% endfor %}", {}, "a test")
    with over(llm, template) as made:
        yield made


def short(body):
    """The same body for an answer that does not take long."""
    if not isinstance(body, dict):
        return body
    most = {"n": 3, "max_tokens": 9, "max_completion_tokens": 9}
    large = {name for name in most if isinstance(body.get(name), int) and body[name] > most[name]}
    return {"max_tokens": 4} | body | {name: most[name] for name in large}


@pytest.mark.parametrize("kind", ROUTES, ids=lambda kind: kind.__name__)
@settings(max_examples=300)
@given(data=st.data())
def test_garbage_in_any_field_is_answered_or_refused_by_the_name_of_a_field(kind, data):
    body = data.draw(bodies(kind))
    refusal = None
    try:
        parsed = parse_body(json.dumps(body).encode(), kind)
        parsed.sampling_params(most=5, tenant_salt="")
    except ApiError as error:
        refusal = error
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.body["error"]["type"] == "invalid_request_error"
        json.dumps(refusal.body)


@pytest.mark.parametrize("kind", ROUTES, ids=lambda kind: kind.__name__)
@settings(max_examples=100)
@given(data=st.data())
def test_the_server_never_fails_over_what_it_is_sent_and_never_logs_it(kind, data, server):
    body = short(data.draw(bodies(kind) | anything))
    records = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: records.append(handler.format(record))
    logging.getLogger().addHandler(handler)
    try:
        status, headers, content = exchange(server, path=ROUTES[kind], body=json.dumps(body).encode())
    finally:
        logging.getLogger().removeHandler(handler)
    assert status in (200, 400, 404), content
    if status != 200:
        assert json.loads(content)["error"]["message"]
        assert headers["content-type"] == "application/json"
    assert not [record for record in records if SECRET in record]


@settings(max_examples=200)
@given(content=st.binary(max_size=40))
def test_bytes_that_are_no_json_are_refused(content):
    with pytest.raises(ApiError) as error:
        parse_body(b"\x00" + content, CompletionBody)
    assert error.value.status == 400


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_not_supported_is_named_and_what_asks_for_nothing_is_not(name):
    for nothing in (None, *UNSUPPORTED[name]):
        parse_body(json.dumps(NEEDED[ChatBody] | {name: nothing}).encode(), ChatBody)
    with pytest.raises(ApiError) as error:
        parse_body(json.dumps(NEEDED[ChatBody] | {name: {"a": 1}}).encode(), ChatBody)
    assert error.value.body["error"]["param"] == name
    assert error.value.body["error"]["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "a"}], "messages.0.role"),
        ([{"role": "tool", "content": "a"}], "messages.0.role"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], "messages.1.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages.0.tool_calls"),
        ("hello", "messages"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages, param):
    with pytest.raises(ApiError) as error:
        parse_body(json.dumps({"model": "m", "messages": messages}).encode(), ChatBody)
    assert error.value.body["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "param", "field"),
    [
        (CompletionBody, "stop", b'"stop": [1' + b",1" * 1_000_000 + b"]"),
        (CompletionBody, "logit_bias", b'"logit_bias": {' + b",".join(b'"%d":{}' % i for i in range(150_000)) + b"}"),
        (CompletionBody, None, b",".join(b'"x%d":1' % i for i in range(150_000))),
        (
            CompletionBody,
            "stream_options",
            b'"stream_options": {' + b",".join(b'"%d":1' % i for i in range(999)) + b"}",
        ),
        (ChatBody, "messages", b'"messages": [{}' + b",{}" * 600_000 + b"]"),
        (ChatBody, "messages.0", b'"messages": [{' + b",".join(b'"x%d":1' % i for i in range(150_000)) + b"}]"),
    ],
    ids=["stop", "logit_bias", "fields", "stream_options", "messages", "message"],
)
def test_what_is_wrong_a_million_times_costs_no_more_than_its_size(kind, param, field):
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as error:
            parse_body(json.dumps(NEEDED[kind]).encode()[:-1] + b"," + field + b"}", kind)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 80 * len(field)
    finally:
        tracemalloc.stop()
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == param


@pytest.mark.parametrize("kind", ROUTES, ids=lambda kind: kind.__name__)
def test_null_is_the_default_of_every_field(kind):
    nulls = dict.fromkeys(kind.model_fields) | {"stream_options": {"include_usage": None}} | NEEDED[kind]
    assert parse_body(json.dumps(nulls).encode(), kind) == parse_body(json.dumps(NEEDED[kind]).encode(), kind)


def test_an_empty_content_and_an_answer_sent_back_are_messages():
    sent_back = {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "audio": None}
    body = parse_body(json.dumps({"model": "m", "messages": [sent_back]}).encode(), ChatBody)
    assert body.messages[0].content == ""


def test_the_defaults_are_those_of_the_api():
    body = parse_body(b'{"model": "m", "prompt": "a"}', CompletionBody)
    params = body.sampling_params(most=body.max_tokens, tenant_salt="")
    assert (params.temperature, params.max_new_tokens, params.n, params.seed, params.logprobs) == (
        1.0,
        16,
        1,
        None,
        None,
    )


@pytest.mark.parametrize(("seed", "expected"), [(0, 0), (2**31, 0), (-1, 2**31 - 1), (2**63, 0), (None, None)])
def test_any_seed_is_one_of_the_engines(seed, expected):
    body = parse_body(json.dumps(NEEDED[CompletionBody] | {"seed": seed}).encode(), CompletionBody)
    assert body.sampling_params(most=1, tenant_salt="").seed == expected
