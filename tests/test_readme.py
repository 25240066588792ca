"""What the pages teach runs as printed: every block of Python, page by page, and what a page says that it prints."""

import json
import re
import tomllib

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from page_blocks import PAGES, blocks, blocks_of, name_of, pages_of, run_page

LANGUAGES = ("python", "shell", "text", "toml", "yaml", "json", "jsonl")
MEMORIES = ("cache", "books")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """The pages make engines of the same shapes: the first compiles, the others read what it has compiled."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    set_all(settings)
    yield
    set_all(before)


def set_all(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks for the directory once


@pytest.mark.parametrize("page", pages_of(clients=False), ids=name_of)
def test_the_python_of_a_page_runs_as_printed(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a page writes
    names = run_page(page, capsys)
    for memory in (names[name] for name in MEMORIES if name in names):
        memory.check_integrity()
    if "out" in names:  # of attention over random keys and values
        assert np.isfinite(jax.device_get(names["out"])).all()
    if "llm" in names:
        names["llm"].check_integrity()
        assert names["llm"].metrics().running == 0


def test_blocks_are_found():
    counts = {language: len(blocks(language)) for language in LANGUAGES}
    assert counts["python"] > 15
    assert counts["shell"] > 10
    assert counts["text"] > 5


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is_and_why_it_is_not_run(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block}: fence it and name its language"
        if block.language == "text":
            assert block.note, f"{block}: say why nothing runs it: <!-- not run: … -->, or <!-- prints -->"
            assert re.fullmatch(r"prints|not run: \S.*", block.note), f"{block}: {block.note}"
        else:
            assert block.note is None, f"{block}: only text has a reason not to be run"


PARSERS = {
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
    "json": json.loads,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
}


@pytest.mark.parametrize("block", blocks(*PARSERS), ids=str)
def test_data_can_be_parsed(block):
    assert PARSERS[block.language](block.text)
