"""What the pages tell a client to send is answered by a server."""

import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from page_blocks import ROOT, SERVER, blocks, commands_in, name_of, pages_of, run_page
from server_support import over


@pytest.fixture
def server(llm):
    with over(llm) as running:
        yield running


@pytest.mark.parametrize("page", pages_of(clients=True), ids=name_of)
def test_the_clients_of_a_page_get_answers(page, server, capsys):
    names = run_page(page, capsys, change=lambda text: text.replace(SERVER, server.url))
    names["client"].close()


CURLS = [
    pytest.param(words, id=str(block))
    for block in blocks("shell")
    for words in commands_in(block.text)
    if words[0] == "curl"
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("words", CURLS)
def test_what_a_page_sends_by_curl_is_answered(words, server):
    command = [word.replace(SERVER, server.url) for word in words]
    done = subprocess.run([*command, "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def test_the_example_of_a_client_gets_its_answers(server, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["openai_client.py", f"{server.url}/v1"])
    runpy.run_path(str(ROOT / "docs" / "examples" / "openai_client.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("ended by length")
    assert lines[1] != lines[2]
    assert lines[3].startswith("best first tokens: {")
    assert lines[4].startswith("refused, context_length_exceeded: ")
