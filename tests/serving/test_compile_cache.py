import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from engine.serving.compile_cache import MIN_COMPILE_SECONDS, use_compile_cache

CACHE_DIRECTORY = Path("fused-kv-engine", "xla")  # in the user's cache directory
SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A user's empty cache directory, with jax's cache allowed as it is outside these tests."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_cache_lies_in_the_users_directory_for_its_owner_alone(base):
    use_compile_cache()
    directory = base / CACHE_DIRECTORY
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == MIN_COMPILE_SECONDS
    for place in (directory, directory.parent):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_without_a_base_directory_it_lies_in_the_home_directory(base, monkeypatch):
    for value in (None, "", "relative"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(base))
        jax.config.update("jax_compilation_cache_dir", None)
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(base / ".cache" / CACHE_DIRECTORY)


def test_a_directory_that_the_user_has_set_stays(base):
    jax.config.update("jax_compilation_cache_dir", str(base / "own"))
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir == str(base / "own")
    assert list(base.iterdir()) == []


def test_jaxs_own_switch_turns_it_off(base):
    jax.config.update("jax_enable_compilation_cache", False)
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("fault", ["a file", "others may write", "a link", "the parent is a file", "anyone's"])
def test_a_place_that_is_not_ours_alone_is_not_used_and_said(base, fault, caplog):
    directory = base / CACHE_DIRECTORY
    directory.parent.mkdir(mode=0o700)
    if fault == "a file":
        directory.write_bytes(b"")
    elif fault == "others may write":
        directory.mkdir()
        directory.chmod(0o777)
    elif fault == "a link":
        (base / "elsewhere").mkdir()
        directory.symlink_to(base / "elsewhere")
    elif fault == "anyone's":
        base.chmod(0o777)
    else:
        directory.parent.rmdir()
        directory.parent.write_bytes(b"")
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled again at every start" in caplog.text


def test_a_directory_of_another_user_is_not_used(base, caplog, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # another user's is what we make, then
    if os.getuid() == 0:  # root's is not
        os.chown(base, 12346, 12346)
    use_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled again" in caplog.text


def test_a_directory_that_cannot_be_written_to_is_a_line_in_the_log(base, caplog, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with caplog.at_level(logging.WARNING):
        use_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "Permission denied" in caplog.text


PROGRAM = """
import jax, jax.numpy as jnp
from flax import nnx
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.serving.llm import LLM
from engine.serving.sampling_params import SamplingParams

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
config = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, max_position_embeddings=64, eos_token_id=())
model = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(1))
llm = LLM(model, max_running_requests=1, chunked_prefill_size=1)
(answer,) = llm.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
print(len(hits), llm.compiles_after_warmup, *answer.token_ids)
"""


def test_a_second_start_reads_what_the_first_compiled_and_answers_alike(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment["PYTHONPATH"] = os.getcwd()
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200, check=True
        )
        for _ in range(2)
    ]
    (cold, *first), (warm, *second) = (run.stdout.split() for run in runs)
    assert (int(cold), first) == (0, second)
    assert int(warm) > 0
    assert all(run.stderr == "" for run in runs)
    assert len(list((tmp_path / CACHE_DIRECTORY).glob("*-cache"))) >= int(warm)
