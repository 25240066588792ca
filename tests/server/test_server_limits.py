"""What clients cannot do to the server: keys, sizes, numbers, slowness, and what becomes of their requests."""

import json
import logging
import socket
import sys
import threading
import time
from contextlib import suppress

import openai
import pytest
from server_support import (
    SECONDS,
    FakeAnswering,
    client_of,
    connect,
    events,
    exchange,
    faked,
    over,
    parsed,
    read_all,
    request_bytes,
    until,
)

from engine.errors import IntegrityError, QueueFull
from engine.server import endpoints
from engine.server.bodies import parse_body
from engine.server.safe_log import PlaceFormatter

BODY = {"model": "default", "prompt": "hello"}


def never(answering):
    """An answer that does not come."""


def error_of(body):
    return json.loads(body)["error"]


def ends(connection):
    """Waits until the server ends a connection; whether it did without a word."""
    try:
        return not connection.recv(1 << 16)
    except ConnectionResetError:
        return True


# Keys.


@pytest.mark.parametrize(
    "header",
    [None, "Bearer", "Bearer wrong", "Bearer ", "Basic first", "Bearer first2", "Bearer fir", "first", "Bearer é"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/pages", "/pages/state", "/nothing"])
def test_without_a_known_key_nothing_is_answered(keyed, header, path):
    server, engine = keyed
    headers = [] if header is None else [f"Authorization: {header}"]
    status, got, body = exchange(server, "GET" if path != "/v1/completions" else "POST", path, headers=headers)
    assert status == 401
    assert got["www-authenticate"] == "Bearer"
    assert error_of(body)["code"] == "invalid_api_key"
    assert not engine.answerings


@pytest.fixture(scope="module")
def keyed():
    with faked(api_keys=("first", "second")) as made:
        yield made


def test_each_key_is_let_in_and_health_needs_none(keyed):
    server, _ = keyed
    for key in ("first", "second"):
        for scheme in ("Bearer", "bearer"):
            assert exchange(server, body=BODY, headers=[f"Authorization: {scheme} {key}"])[0] == 200
    assert exchange(server, "GET", "/health")[0] == 200
    with client_of(server, api_key="third") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_keys_of_a_file_have_salts_of_their_own(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(
        '[[keys]]\nkey = "a"\ntenant_salt = "one"\n[[keys]]\nkey = "b"\ntenant_salt = "two"\n'
        '[[keys]]\nkey = "c"\nrequire_tenant_salt = true\n[[keys]]\nkey = "d"\n'
    )

    def salt(server, engine, key, *headers):
        status, _, body = exchange(server, body=BODY, headers=[f"Authorization: Bearer {key}", *headers])
        return engine.answerings[-1].params.tenant_salt if status == 200 else error_of(body)["param"]

    with faked(api_key_file=str(path), tenant_header="X-My-Salt") as (server, engine):
        salts = [
            salt(server, engine, key, *headers)
            for key in "abd"
            for headers in ([], ["X-My-Salt: one"], ["X-My-Salt: two"], ['X-My-Salt: ["one", null]'])
        ]
        assert len(set(salts)) == len(salts)  # a header never leads from one tenant to another
        assert salt(server, engine, "d") == ""
        assert salt(server, engine, "c") == "X-My-Salt"
        assert salt(server, engine, "c", "X-My-Salt: one") == salt(server, engine, "d", "X-My-Salt: one")


def test_a_salt_can_be_required():
    with faked(require_tenant_salt=True) as (server, engine):
        status, _, body = exchange(server, body=BODY)
        assert (status, error_of(body)["param"]) == (400, "X-Tenant-Salt")
        assert exchange(server, body=BODY, headers=["X-Tenant-Salt: mine"])[0] == 200
        assert len(engine.answerings) == 1


def test_a_salt_that_is_there_twice_is_refused():
    """A client's own might come before that which a gateway adds."""
    with faked() as (server, engine):
        status, _, body = exchange(server, body=BODY, headers=["X-Tenant-Salt: a", "X-Tenant-Salt: b"])
        assert (status, error_of(body)["param"]) == (400, "X-Tenant-Salt")
        assert not engine.answerings


# Paths, sizes, forms.


def test_unknown_paths_and_wrong_methods_have_the_body_of_an_error():
    with faked() as (server, _):
        for method, path, expected in [("GET", "/", 404), ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/", 404)]:
            status, headers, body = exchange(server, method, path)
            assert (status, error_of(body)["type"]) == (expected, "invalid_request_error")
            assert headers["content-type"] == "application/json"
        status, headers, body = exchange(server, "GET", "/v1/completions")
        assert (status, headers["allow"]) == (405, "POST")
        assert error_of(body)["message"]
        assert exchange(server, "POST", "/v1/models", {})[0] == 405
        assert exchange(server, "GET", "/version")[0] == 200


def test_a_body_that_is_too_large_is_refused_by_its_length_or_as_it_comes():
    with faked(max_body_bytes=2000) as (server, engine):
        large = BODY | {"prompt": "x" * 2000}
        for headers, raw in [(["Content-Length: 99999999999"], False), (["Transfer-Encoding: chunked"], True)]:
            content = json.dumps(large).encode()
            head = ["POST /v1/completions HTTP/1.1", "Host: test", "Content-Type: application/json", *headers, "", ""]
            chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if raw else content
            with connect(server, "\r\n".join(head).encode() + chunk) as connection:
                answer = connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 413 ")
        status, _, body = exchange(server, body=large)
        assert (status, error_of(body)["code"]) == (413, "body_too_large")
        assert exchange(server, body=BODY)[0] == 200
        assert len(engine.answerings) == 1


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", [], 400),
        (b"[]", [], 400),
        (b"{", [], 400),
        (b"nul", [], 400),
        (b'"\xff"', [], 400),
        (b'{"model": "default", "prompt": "\\ud800"}', [], 400),
        (b"[" * 100_000, [], 400),
        (b'{"model": "default", "prompt": "a", "temperature": NaN}', [], 400),
        (b'{"model": "default", "prompt": "a", "temperature": 1e999}', [], 400),
        (b'{"model": "default", "prompt": "a", "seed": ' + b"9" * 6000 + b"}", [], 400),
        (b'{"model": "other", "prompt": "a"}', [], 404),
        (b'{"prompt": "a"}', [], 400),
        (b'{"model": "default"}', [], 400),
        (b"model=default&prompt=a", ["Content-Type: application/x-www-form-urlencoded"], 415),
        (b'{"model": "default", "prompt": "a"}', ["Content-Type: text/plain"], 415),
    ],
)
def test_a_body_that_is_none_is_refused(content, headers, status):
    with faked() as (server, engine):
        got, _, body = exchange(server, body=content, headers=headers)
        assert got == status
        assert error_of(body)["type"] == "invalid_request_error"
        assert not engine.answerings


@pytest.mark.parametrize("raw", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 17_000])
def test_what_is_no_request_or_has_too_large_a_head_is_refused(raw):
    with faked() as (server, _):
        status, headers, body = exchange(server, raw=raw)
        assert (status, headers["connection"]) == (400, "close")
        assert error_of(body)["type"] == "invalid_request_error"


def test_rubbish_behind_an_answer_ends_the_connection_without_a_word(caplog):
    head = b"POST /nothing HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    with faked() as (server, _), connect(server, head) as connection:
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(1 << 16)
        connection.sendall(b"no size\r\n")
        assert ends(connection)
    assert not [record for record in caplog.records if record.name == "asyncio"]


# Numbers.


def test_a_full_queue_is_429_with_the_time_to_wait():
    with faked() as (server, engine):
        engine.refusal = QueueFull("5 requests wait, as many as may", retry_after=2.5)
        status, headers, body = exchange(server, body=BODY)
        assert (status, headers["retry-after"]) == (429, "3")
        assert error_of(body)["code"] == "queue_full"
        with client_of(server) as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="default", prompt="a", stream=True)


def test_the_true_engine_refuses_more_than_may_wait_and_answers_the_others(llm):
    with over(llm, max_waiting=2) as server:
        body = BODY | {"max_tokens": 300, "ignore_eos": True}
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(exchange(server, body=body)[0])) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 2
        assert exchange(server, body=BODY)[0] == 200


def test_of_several_prompts_all_are_queued_or_none():
    def third_is_too_many(answering):
        engine.refusal = QueueFull("full", retry_after=1) if len(engine.answerings) == 2 else None

    with faked(third_is_too_many) as (server, engine):
        assert exchange(server, body=BODY | {"prompt": ["a", "b", "c"]})[0] == 429
        assert [answering.is_aborted for answering in engine.answerings] == [True, True]


def test_a_request_asks_for_a_bounded_number_of_answers():
    with faked() as (server, engine):
        for many in ({"prompt": ["a"] * 129}, {"prompt": ["a"] * 65, "n": 2}, {"prompt": [[1]] * 1000}):
            assert exchange(server, body=BODY | many)[0] == 400
        assert not engine.answerings
    with faked(max_waiting=2) as (server, engine):  # which can never have more than 8 that run and 2 that wait
        status, _, body = exchange(server, body=BODY | {"n": 11})
        assert (status, error_of(body)["param"]) == (400, "n")
        assert exchange(server, body=BODY | {"prompt": ["a"] * 10})[0] == 200


def test_connections_beyond_the_bound_are_told_and_those_beyond_the_spare_ones_are_cut_off():
    with faked(max_connections=3) as (server, _):
        held = [connect(server) for _ in range(3)]
        try:
            until(lambda: len(server.connections()) == 3)
            status, headers, body = exchange(server, "GET", "/health")
            assert (status, headers["retry-after"]) == (503, "1")
            assert error_of(body)["code"] == "too_many_connections"
            held += [connect(server) for _ in range(64)]
            with connect(server) as one_more:
                assert ends(one_more)
        finally:
            for connection in held:
                connection.close()
        until(lambda: not server.connections())
        assert exchange(server, "GET", "/health")[0] == 200


def test_large_bodies_are_read_one_at_a_time_and_small_ones_meanwhile(monkeypatch):
    reading, free = [], threading.Event()

    def slowly(content, kind):
        if len(content) > endpoints.LARGE_BODY:
            reading.append(len(content))
            assert free.wait(SECONDS)
        return parse_body(content, kind)

    monkeypatch.setattr(endpoints, "parse_body", slowly)
    large = request_bytes(body=BODY | {"prompt": "x" * endpoints.LARGE_BODY})
    with faked() as (server, engine), connect(server, large) as first, connect(server, large) as second:
        until(lambda: reading)
        with connect(server, large):
            until(lambda: server.service.in_flight == 3)
        assert exchange(server, body=BODY)[0] == 200
        assert len(reading) == 1
        free.set()
        for connection in (first, second):
            assert parsed(read_all(connection))[0] == 200
        until(lambda: server.service.in_flight == 0)
        assert len(reading) == 2  # the third has gone
        assert len(engine.answerings) == 3


# Slowness.


@pytest.mark.parametrize("head", [b"", b"POST /v1/comp", request_bytes(body=BODY)[:-40]])
def test_a_client_that_does_not_finish_its_request_is_cut_off(head):
    with faked(client_timeout=0.2) as (server, engine):
        with connect(server, head) as connection:
            begun = time.monotonic()
            answer = connection.recv(1 << 16) if head.startswith(b"POST /v1/completions") else b""
            assert not answer or answer.startswith(b"HTTP/1.1 408 ")
            assert ends(connection)
            assert time.monotonic() - begun < 5
        assert not engine.answerings


def test_a_second_request_that_does_not_come_to_an_end_is_cut_off_too():
    first = request_bytes(body=BODY, close=False)
    with faked(client_timeout=0.2) as (server, _), connect(server, first) as connection:
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 16)
        connection.sendall(b"POST /v1/comp")
        assert ends(connection)


def test_a_drip_of_bytes_does_not_keep_a_connection_open():
    def drip(connection):
        for byte in request_bytes(body=BODY) * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    with faked(client_timeout=0.3) as (server, _), connect(server) as connection, pytest.raises(ConnectionError):
        drip(connection)


def test_a_reader_that_stands_still_is_cut_off_and_stalls_nobody():
    def flood(answering):
        if answering.params.max_new_tokens == 16:
            answering.give("done", (1,), "stop")

    with faked(flood, client_timeout=0.5) as (server, engine):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        with connection:
            connection.sendall(request_bytes(body=BODY | {"stream": True, "max_tokens": 50}))
            until(lambda: engine.answerings)
            stuck = engine.answerings[0]
            end = time.monotonic() + SECONDS
            while not stuck.is_aborted and time.monotonic() < end:
                server.call(stuck.give, "x" * 100_000, (1,))
                assert exchange(server, body=BODY)[0] == 200
            assert stuck.is_aborted
            assert server.service.in_flight == 0


def test_a_slow_reader_that_goes_on_reading_gets_all():
    text = "x" * 1_000_000
    with faked(lambda answering: answering.give(text, (1,), "stop"), client_timeout=0.6) as (server, _):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        connection.connect(("127.0.0.1", server.port))
        with connection:
            connection.sendall(request_bytes(body=BODY))
            answer = b""
            begun = time.monotonic()
            while part := connection.recv(16384):
                answer += part
                time.sleep(0.02)
            assert time.monotonic() - begun > 0.8
        assert json.loads(parsed(answer)[2])["choices"][0]["text"] == text


# Ends.


@pytest.mark.parametrize("streams", [True, False])
def test_a_hang_up_aborts_every_prompt_of_the_request(streams):
    with faked(never) as (server, engine):
        with connect(server, request_bytes(body=BODY | {"prompt": ["a", "b"], "stream": streams})):
            until(lambda: len(engine.answerings) == 2)
            assert not any(answering.is_aborted for answering in engine.answerings)
        until(lambda: all(answering.is_aborted for answering in engine.answerings))
        until(lambda: server.service.in_flight == 0)


@pytest.mark.parametrize("behind", [b"\r\n", request_bytes(body=BODY), b"x" * 9000])
def test_a_hang_up_is_noticed_behind_whatever_else_was_sent(behind):
    with faked(never) as (server, engine):
        with connect(server, request_bytes(body=BODY, close=False)) as connection:
            until(lambda: engine.answerings)
            connection.sendall(behind)
            time.sleep(0.05)
        until(lambda: engine.answerings[0].is_aborted)
        assert len(engine.answerings) == 1


NEXT = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n"


@pytest.mark.parametrize(
    ("behind", "is_waited_for"),
    [
        (NEXT + b"Content-Length: 67108864\r\n\r\n" + b"x" * 2**26, True),
        ((NEXT + b"Content-Length: 1\r\n\r\nx") * 1000, False),
        (b"x" * 2**26, False),
    ],
)
def test_what_is_sent_behind_a_request_is_not_kept_without_bound(behind, is_waited_for):
    with (
        faked(never, stop_timeout=0) as (server, _),
        connect(server, request_bytes(body=BODY, close=False)) as connection,
    ):
        connection.settimeout(0.5)
        if is_waited_for:
            with pytest.raises(TimeoutError):
                connection.sendall(behind)
        else:
            with suppress(ConnectionError):
                connection.sendall(behind)
            assert ends(connection)


def test_requests_sent_at_once_are_answered_in_turn():
    with (
        faked(lambda answering: answering.give("a", (1,), "stop")) as (server, engine),
        connect(server, request_bytes(body=BODY, close=False) * 3) as connection,
    ):
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 3 or not answers.endswith(b"}"):
            answers += connection.recv(1 << 16)
        assert len(engine.answerings) == 3


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("reason", ["error", "non_finite", "timeout", "abort"])
def test_an_answer_that_the_engine_could_not_complete_is_an_error(streams, reason):
    def fail(answering):
        answering.give("some", (1,))
        answering.give(" more", (2,), reason)

    with faked(fail) as (server, _):
        status, _, body = exchange(server, body=BODY | {"stream": streams})
        error = events(body)[-1]["error"] if streams else error_of(body)
        assert error["type"] == "server_error"
        assert error["code"] == ("server_stopping" if reason == "abort" else "engine_error")
        if streams:
            assert "".join(event["choices"][0]["text"] for event in events(body)[:-1]) == "some more"
            assert all(event["choices"][0]["finish_reason"] is None for event in events(body)[:-1])
            with client_of(server) as client, pytest.raises(openai.APIError):
                list(client.completions.create(model="default", prompt="a", stream=True))
        else:
            assert status == (503 if reason == "abort" else 500)


@pytest.mark.parametrize("streams", [True, False])
def test_a_fault_of_the_server_is_an_error_and_its_message_stays_within(streams, caplog):
    def fail(answering):
        answering.give("some", (1,))
        answering.fail(IntegrityError("the secret prompt is in this message"))

    with faked(fail) as (server, engine):
        status, _, body = exchange(server, body=BODY | {"stream": streams})
        assert status == (200 if streams else 500)
        assert b"secret" not in body
        assert b"engine_error" in body
        engine.refusal = IntegrityError("the secret prompt is in this message")
        assert exchange(server, body=BODY)[0] == 500
    assert "secret" not in caplog.text
    assert caplog.text.count("a request failed by IntegrityError") == 2


def test_the_log_has_the_kind_and_place_of_an_exception_whoever_logs_it():
    try:
        try:
            raise ValueError("a secret prompt")
        except ValueError as error:
            raise IntegrityError("a secret answer") from error
    except IntegrityError:
        record = logging.LogRecord("any", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
    text = PlaceFormatter("%(message)s").format(record)
    assert text.startswith("it failed\nIntegrityError:\n")
    assert "\nValueError:\n" in text
    assert text.count("in test_the_log_has_the_kind_and_place") == 2
    assert "a secret" not in "\n".join(line for line in text.splitlines() if "raise " not in line)


def test_a_request_for_another_protocol_is_answered_in_this_one_without_a_warning(caplog):
    with faked() as (server, _):
        for protocol in ("websocket", "h2c"):
            headers = [f"Upgrade: {protocol}", "Connection: upgrade, close"]
            raw = request_bytes("GET", "/health", headers=headers, close=False)
            with connect(server, raw) as connection:
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_without_texts_is_served_by_token_ids():
    with faked(lambda answering: answering.give("", (5, 6, 7), "length")) as (server, engine):
        engine.tokenizer = None
        for streams in (True, False):
            _, _, body = exchange(server, body=BODY | {"prompt": [1, 2], "stream": streams})
            (choice,) = events(body)[0]["choices"] if streams else json.loads(body)["choices"]
            assert (choice["text"], choice["token_ids"]) == ("", [5, 6, 7])
        chat = {"model": "default", "messages": [{"role": "user", "content": "a"}]}
        status, _, body = exchange(server, path="/v1/chat/completions", body=chat)
        assert (status, error_of(body)["param"]) == (400, "messages")
        assert "token ids" in error_of(body)["message"]


def test_health_says_whether_the_engine_lives():
    with faked() as (server, engine):
        assert exchange(server, "GET", "/health")[0] == 200
        engine.is_healthy = False
        status, _, body = exchange(server, "GET", "/health")
        assert (status, json.loads(body)) == (503, {"status": "failed"})


def test_a_stop_lets_running_requests_finish_and_takes_no_other():
    with faked(never, stop_timeout=SECONDS) as (server, engine):
        with connect(server, request_bytes(body=BODY | {"stream": True})) as running:
            until(lambda: engine.answerings)
            with connect(server, request_bytes("GET", "/health", close=False)) as other:
                assert other.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
                server.stop()
                status, _, body = exchange(server, body=BODY)
                assert (status, error_of(body)["code"]) == (503, "server_stopping")
                assert exchange(server, "GET", "/health")[0] == 503
            server.call(engine.answerings[0].give, "whole", (1,), "stop")
            *pieces, last = events(parsed(read_all(running))[2])
        assert (pieces[-1]["choices"][0]["text"], last) == ("whole", "[DONE]")
    assert server.code == 0


@pytest.mark.parametrize("streams", [True, False])
def test_a_stop_ends_what_takes_too_long_and_says_so(streams):
    with faked(never, stop_timeout=0.1) as (server, engine):
        with connect(server, request_bytes(body=BODY | {"stream": streams})) as running:
            until(lambda: engine.answerings)
            server.stop()
            status, _, body = parsed(read_all(running))
        error = events(body)[-1]["error"] if streams else error_of(body)
        assert error["code"] == "server_stopping"
        assert status == (200 if streams else 503)
    assert server.code == 1


def test_the_log_has_a_line_for_each_request_and_no_word_of_it(caplog):
    caplog.set_level(logging.DEBUG)
    secret = "Xyzzy"
    template_error = {"model": "default", "messages": [{"role": "user", "content": secret}]}
    with faked(lambda answering: answering.give(secret, (1,), "stop"), api_keys=(f"key{secret}",)) as (server, _):
        known = [f"Authorization: Bearer key{secret}", f"X-Tenant-Salt: {secret}"]
        for body in (
            BODY | {"prompt": secret},
            BODY | {"prompt": secret, "stream": True},
            BODY | {"prompt": [secret, 1]},
            BODY | {"stop": [secret, 1]},
            BODY | {secret: secret},
            BODY | {"model": secret},
            BODY | {"logit_bias": {secret: 1}},
            BODY | {"tools": [secret]},
            secret.encode(),
        ):
            exchange(server, body=body, headers=known)
        exchange(server, path="/v1/chat/completions", body=template_error, headers=known)
        exchange(server, body=BODY, headers=[f"Authorization: Bearer {secret}"])
        for path in (f"/{secret}", f"/v1/models/{secret}", f"/v1/models?{secret}"):
            exchange(server, "GET", path, headers=known)
        exchange(server, secret.upper(), "/v1/models", headers=known)
        exchange(server, raw=f"{secret}\r\n\r\n".encode())
    lines = [record for record in caplog.records if record.name == "engine.server.access"]
    assert len(lines) == 14  # a method that HTTP does not have is refused before
    assert "POST /v1/completions 200 " in lines[0].getMessage()
    assert secret not in caplog.text
    assert secret.upper() not in caplog.text


def test_the_fake_is_what_the_server_needs_of_the_true_one(llm):
    """The names that the fake has, the true ones have too."""
    from server_support import FakeEngine

    from engine.serving.answering import Answering
    from engine.serving.async_llm import AsyncLLM

    for fake, true in ((FakeEngine, AsyncLLM), (FakeAnswering, Answering)):
        names = {name for name in vars(fake) if not name.startswith("_")} - {"give", "fail"}
        assert not [name for name in names if not hasattr(true, name)]
