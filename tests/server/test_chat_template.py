"""Chat templates: found as transformers finds them, rendered in a sandbox, and never for ever."""

import json
import time

import pytest
from server_support import SECONDS

from engine.errors import CheckpointError, ConfigError, RequestError
from engine.server import chat_template
from engine.server.chat_template import ChatTemplate, find_chat_template

MESSAGES = [{"role": "user", "content": "<b> & 'ü'"}, {"role": "assistant", "content": "no"}]


def rendered(source, messages=MESSAGES, **tokens):
    return ChatTemplate(source, tokens, "a test").render(messages)


def test_a_template_sees_the_messages_the_tokens_and_that_an_answer_follows():
    source = (
        "{{ bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('who?') }}{% endif %}\n"
        "    {{- '[' + message.role + ']' + message.content | trim }}\n"
        "    {%- if loop.last %}{% break %}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}{{ unk_token }}{{ tools is none }}"
    )
    assert rendered(source, bos_token="<s>") == "<s>[user]<b> & 'ü'[assistant]no[assistant]True"


def test_blocks_leave_no_blanks_and_generation_is_its_body():
    assert rendered("a\n  {% if true %}\nb\n  {% endif %}\nc{% generation %}d{% endgeneration %}") == "a\nb\ncd"


def test_json_is_not_escaped_for_html():
    assert rendered("{{ messages[0] | tojson }}") == json.dumps(MESSAGES[0], ensure_ascii=False)
    assert rendered("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert rendered("{{ {'b': 'ü'} | tojson(ensure_ascii=true, separators=(',', ':')) }}") == '{"b":"\\u00fc"}'


def test_products_are_those_of_python():
    assert rendered("{{ 'ab' * 3 }} {{ 1000000 * 1000000 }} {{ 2.5 * 2 }} {{ [1] * 2 }} {{ 3 * '-' }}") == (
        "ababab 1000000000000 5.0 [1, 1] ---"
    )


def test_the_time_can_be_told():
    assert rendered("{{ strftime_now('%Y') }}") in (time.strftime("%Y"), str(int(time.strftime("%Y")) - 1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ range(1000 * 1000 * 1000) | length }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 10000000000 }}", "too large"),
        ("{{ 10000000000 * [1] }}", "too large"),
        ("{{ ('a' * 60000) * (60000 * 60000) }}", "too large"),
        ("{{ 10 ** 9 ** 9 }}", "too large"),
    ],
)
def test_what_a_template_cannot_do_is_the_fault_of_the_request(source, message):
    with pytest.raises(RequestError, match=message):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(source, monkeypatch):
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(RequestError, match=r"longer than 0\.2 seconds"):
        rendered(source)
    assert time.monotonic() - begun < SECONDS


def test_what_becomes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_CHARACTERS", 100)
    with pytest.raises(RequestError, match="101 characters"):
        rendered("{{ 'a' * 60 }}{{ 'a' * 41 }}")


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_a_template_is_found_where_checkpoints_have_it(tmp_path):
    assert find_chat_template(tmp_path) is None
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    write(tmp_path, "tokenizer_config.json", tokens)
    assert find_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named {{ bos_token }}"}]
    write(tmp_path, "tokenizer_config.json", tokens | {"chat_template": named})
    assert find_chat_template(tmp_path).render(MESSAGES) == "named <s>"
    write(tmp_path, "tokenizer_config.json", tokens | {"chat_template": "one {{ eos_token }}{{ add_bos_token }}"})
    assert find_chat_template(tmp_path).render(MESSAGES) == "one </s>"
    write(tmp_path, "chat_template.json", {"chat_template": "of json {{ bos_token }}"})
    assert find_chat_template(tmp_path).render(MESSAGES) == "of json <s>"
    write(tmp_path, "chat_template.jinja", "of jinja {{ bos_token }}")
    assert find_chat_template(tmp_path).render(MESSAGES) == "of jinja <s>"
    write(tmp_path, "mine", "mine {{ bos_token }}")
    assert find_chat_template(tmp_path, str(tmp_path / "mine")).render(MESSAGES) == "mine <s>"


@pytest.mark.parametrize("value", [5, ["a"], {"template": "a"}, [{"name": "default", "template": 5}], "{% if %}", "{{"])
def test_a_template_that_is_none_is_refused_with_the_name_of_its_file(tmp_path, value):
    write(tmp_path, "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        find_chat_template(tmp_path)


def test_several_templates_without_a_default_are_none(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "no"}]})
    assert find_chat_template(tmp_path) is None


def test_a_file_that_cannot_be_read_is_a_wrong_option(tmp_path):
    with pytest.raises(ConfigError, match="absent"):
        find_chat_template(tmp_path, str(tmp_path / "absent"))
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="latin"):
        find_chat_template(tmp_path, str(tmp_path / "latin"))
