"""``python -m engine serve``: its options, its one line, and its end by a signal."""

import argparse
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server_support import SECONDS, connect, events, exchange, parsed, read_all, request_bytes

from engine import cli
from engine.errors import ConfigError
from engine.server.api_keys import read_keys
from engine.server.server_options import COUNTS, ServerOptions, add_server_options, options_from
from engine.server.server_options import SECONDS as BOUNDS
from engine.server.service import prepare

ROOT = Path(__file__).parents[2]
SMALL = ("--max-running-requests", "1", "--chunked-prefill-size", "1")
KEY = "sk-the-key"


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_server_options(parser)
    return parser.parse_args(arguments)


def test_every_option_has_a_flag_whose_default_is_the_options_own():
    given = vars(parse())
    assert given.keys() == {field.name for field in dataclasses.fields(ServerOptions)}
    assert set(given.values()) == {None}
    assert options_from(parse(), {}) == ServerOptions()


def test_the_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("host", "port", "max_waiting", "max_connections", "tenant_header"):
        assert f"default {getattr(ServerOptions, name)}" in text
    for name in BOUNDS:
        assert f"default {getattr(ServerOptions, name):g}" in text
    assert "--model MODEL" in text


def test_flags_and_the_environment_make_the_options():
    arguments = ("--api-key", "a", "--api-key", "b", "--port", "5", "--stop-timeout", "2.5", "--allow-no-key")
    options = options_from(parse(*arguments), {"ENGINE_API_KEY": "c"})
    assert options == ServerOptions(port=5, api_keys=("a", "b", "c"), stop_timeout=2.5, allow_no_key=True)
    assert "'a'" not in repr(options)


@pytest.mark.parametrize("name", [*COUNTS, *BOUNDS])
@pytest.mark.parametrize("value", [-1, True, None, "5", 2**40, float("nan")])
def test_a_number_out_of_its_bounds_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError, match=name):
        ServerOptions(**{name: value})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tenant_header": "X Salt"}, "tenant_header"),
        ({"tenant_header": ""}, "tenant_header"),
        ({"api_keys": ("a b",)}, "API key"),
        ({"api_keys": ("",)}, "API key"),
        ({"served_model_name": "a b"}, "served_model_name"),
    ],
)
def test_a_text_that_cannot_be_sent_is_refused(option, message):
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**option)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"no table \[\[keys\]\]"),
        ("keys = []", r"no table \[\[keys\]\]"),
        ("key = 'secret'", "unknown key"),
        ("[[keys]]\nkey = 'secret'\n[[keys]]\nkey = 5", "key 2 in"),
        ("[[keys]]\nkey = 'secret'\n[[keys]]\nkey = 'secret'\ntenant_salt = 'a'", "key 2 in .* was given before"),
        ("[[keys]]\nkey = 'secret'\nsalt = 'a'", "tenant_salt"),
        ("[[keys]]\nkey = 'secret'\ntenant_salt = ''", "tenant_salt"),
        ("[[keys]]\nkey = 'secret'\nrequire_tenant_salt = 1", "true or false"),
        ("[[keys]]\nkey = 'secret", "not valid TOML"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused_without_a_key_in_the_message(tmp_path, content, message):
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_keys(ServerOptions(api_key_file=str(path)))
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="absent"):
        read_keys(ServerOptions(api_key_file=str(tmp_path / "absent")))


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_where_others_can_reach_it_there_must_be_a_key_or_the_wish_for_none(host):
    with pytest.raises(ConfigError, match="no API key is set"):
        ServerOptions(host=host, port=0).bind(has_keys=False)
    ServerOptions(host=host, port=0).bind(has_keys=True).close()
    ServerOptions(host=host, port=0, allow_no_key=True).bind(has_keys=False).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_where_nobody_else_can_reach_it_no_key_is_needed(host):
    ServerOptions(host=host, port=0).bind(has_keys=False).close()


def test_an_address_that_cannot_be_had_is_refused_before_a_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments in (["--port", str(taken.getsockname()[1])], ["--host", "no.such.host.invalid"]):
            assert cli.main(["serve", *arguments]) == 2
            assert "ConfigError: cannot serve on" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    for arguments, message in [
        (["--port", "70000"], "ConfigError: port=70000"),
        (["--host", "0.0.0.0"], "ConfigError: other machines can reach host=0.0.0.0"),
        (["--chat-template", str(tmp_path / "absent")], "ConfigError: cannot read the chat template"),
        (["--page-size", "300"], "ConfigError: page_size=300"),
    ]:
        assert cli.main(["serve", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    monkeypatch.setattr(cli, "SERVE_PACKAGES", ("no_such_package",))
    assert cli.main(["serve"]) == 2
    assert "serve needs no_such_package; install this package with [serve]" in capsys.readouterr().err


def test_the_name_of_a_model_is_its_folders_or_what_is_said(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert prepare(ServerOptions(), None).model_name == "default"
    assert prepare(ServerOptions(), str(tmp_path / "my-model")).model_name == "my-model"
    assert prepare(ServerOptions(served_model_name="gpt"), str(tmp_path)).model_name == "gpt"


class Served:
    """A server in a process of its own, and what it has printed."""

    def __init__(self, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "ENGINE_API_KEY": KEY}
        command = [sys.executable, "-m", "engine", "serve", *SMALL, "--port", "0", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self.err = ""

    def __enter__(self):
        for line in self.process.stderr:
            self.err += line
            if found := re.match(r"serving default at http://127\.0\.0\.1:(\d+)/v1; ", line):
                self.port = int(found[1])
                return self
        raise AssertionError(self.err)

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def ended(self):
        out, err = self.process.communicate(timeout=SECONDS)
        self.err += err
        return self.process.returncode, out


def long_request(**changes):
    body = {"model": "default", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True} | changes
    return request_bytes(body=body, headers=[f"Authorization: Bearer {KEY}"])


def test_a_signal_lets_running_answers_finish_and_the_log_has_no_word_of_them(tmp_path):
    tier = ("--host-tier-bytes", str(1 << 20), "--prefix-cache-dir", str(tmp_path / "prefixes"))
    with Served("--stop-timeout", "30", *tier) as served:
        assert exchange(served, body={"model": "default", "prompt": "Once"})[0] == 401
        with connect(served, long_request(max_tokens=200, echo=False, user="Somebody")) as running:
            started = running.recv(1 << 16)
            served.process.send_signal(signal.SIGTERM)
            answer = parsed(started + read_all(running))
        *_, event, last = events(answer[2])
        assert (event["choices"][0]["finish_reason"], last) == ("length", "[DONE]")
        code, out = served.ended()
        assert (code, out) == (0, "")
        assert list((tmp_path / "prefixes").iterdir())
        assert re.search(r"POST /v1/completions 200 \d+\.\d{3}s [0-9a-f]{24}\n", served.err)
        for secret in (KEY, "Once", "Somebody", "Traceback"):
            assert secret not in served.err


def test_a_second_signal_waits_for_nothing():
    with Served("--stop-timeout", "600") as served, connect(served, long_request(n=64)) as running:
        running.recv(1 << 16)
        served.process.send_signal(signal.SIGINT)
        until_stopping(served)
        served.process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        assert served.ended() == (130, "")
        assert time.monotonic() - begun < 5


def until_stopping(served):
    while exchange(served, "GET", "/health")[0] != 503:
        time.sleep(0.01)
    body = exchange(served, "GET", "/health")[2]
    assert json.loads(body) == {"status": "stopping"}
