"""What the pages teach runs as printed: every block of Python of a page, one after the other."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def run_blocks(page):
    """Runs the blocks of a page in one namespace; returns it."""
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)
    return names


def test_the_readme_runs_as_printed(capsys):
    names = run_blocks("README.md")
    printed = capsys.readouterr().out
    assert printed.count("length") + printed.count("stop") == 2
    assert names["out"].shape == (128, 8, 64)
    assert np.isfinite(jax.device_get(names["out"])).all()
    cache = names["cache"]
    cache.check_integrity()
    assert (cache.held_tokens, cache.prefix.cached_pages) == (0, 6)


def test_what_is_streamed_runs_as_printed():
    names = run_blocks("docs/streaming.md")
    assert all(names["streamed"])
    assert names["llm"].cache.held_tokens == 0


@pytest.mark.parametrize("page", ["docs/embedding.md", "docs/foreign-engines.md"])
def test_a_page_runs_as_printed(page):
    cache = run_blocks(page)["cache"]
    cache.check_integrity()
    assert cache.held_tokens == 0
