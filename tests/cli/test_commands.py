import re
import urllib.request

import jax.numpy as jnp
import pytest
from flax import nnx

from engine.cli import main
from engine.models.checkpoint import save_model
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.serving.check import CHECK_BOUND
from engine.serving.device.runner import ModelRunner
from engine.serving.llm import LLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        eos_token_id=(),
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(1)), directory)
    return directory


# One program for prefill and decode: most tests here are not about speed.
SMALL = ("--max-running-requests", 1, "--chunked-prefill-size", 1)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_prints_what_the_pool_holds_the_answers_and_the_cost(capsys, checkpoint):
    code, out, err = run(
        capsys, "generate", "--model", checkpoint, "--prompt", "1 2 3", "--prompt", "5", "--max-new-tokens", 6,
        "--page-size", 8, "--max-running-requests", 2, "--chunked-prefill-size", 4, "--check",
    )  # fmt: skip
    assert code == 0
    # 2 requests of 64 tokens; a token and layer is 2 x 1 head x 8 x 4 bytes; one more page is the null page.
    assert "KV cache size: 128 tokens in 16 pages of 8, 8.50 KiB per layer, 17.00 KiB in 2 layers" in err
    assert "maximum concurrency for 64 tokens per request: 2.00x" in err
    assert "[0] 3 prompt tokens, ended by length:" in err
    assert re.fullmatch(r"([\d ]+\n){2}", out)
    assert [len(answer.split()) for answer in out.splitlines()] == [6, 6]
    assert re.search(r"prefill +[\d,]+ tokens/s \(4 tokens", err)
    assert re.search(r"decode +[\d,]+ tokens/s \(10 tokens", err)
    assert re.search(r"peak pool use +\d+ of 128 tokens", err)
    assert re.search(r"compiled +\d+ programs ahead, 0 after", err)
    difference = re.search(r"12 tokens, largest logit difference ([\d.e+-]+).*, 0 with another best token: ok", err)
    assert 0 <= float(difference[1]) <= 1e-4


def test_the_logits_may_be_adjusted(capsys, checkpoint):
    flags = ("--logit-bias", "7=100", "--logit-bias", "8=80", "--repetition-penalty", 2, "--min-tokens", 2)
    arguments = ("--prompt", "1", "--max-new-tokens", 2, "--frequency-penalty", 1, "--presence-penalty", 1)
    code, out, _ = run(capsys, "generate", "--model", checkpoint, *SMALL, *arguments, *flags, "--min-p", 0.5)
    assert (code, out) == (0, "7 8\n")


def test_a_failed_check_is_an_exit_code(capsys, checkpoint, monkeypatch):
    monkeypatch.setitem(CHECK_BOUND, "float32", -1.0)
    arguments = ("--model", checkpoint, *SMALL, "--prompt", "1", "--max-new-tokens", 2, "--check")
    code, _, err = run(capsys, "generate", *arguments)
    assert code == 1
    assert "FAILED" in err


def test_a_16_bit_pool_is_checked_against_its_own_bound(capsys, checkpoint):
    arguments = ("--prompt", "1 2", "--max-new-tokens", 3, "--kv-cache-dtype", "bfloat16", "--check")
    code, _, err = run(capsys, "generate", "--model", checkpoint, *SMALL, *arguments)
    assert code == 0
    assert "bound 2e-01" in err  # a sixteenth of the largest logit, about 3


@pytest.mark.parametrize(("prompt", "message"), [("", "prompt is empty"), ("\udcff", "not valid text")])
def test_a_text_that_is_none_is_refused(capsys, prompt, message):
    code, _, err = run(capsys, "generate", *SMALL, "--prompt", prompt)
    assert code == 2
    assert message in err


def test_prefixes_are_saved_and_found_by_the_next_run(capsys, checkpoint, tmp_path):
    arguments = ("--prompt", "1 2 3 4 5 6 7 8 9 10 11 12", "--max-new-tokens", 2, "--page-size", 4)
    tier = ("--host-tier-bytes", 1 << 20, "--prefix-cache-dir", tmp_path / "prefixes")
    for expected in ("0 prompt tokens found", "8 prompt tokens found"):
        code, _, err = run(capsys, "generate", "--model", checkpoint, *SMALL, *arguments, *tier, "--check")
        assert code == 0
        assert expected in err


def test_options_come_from_the_file_and_the_command_line_wins(capsys, checkpoint, tmp_path):
    config = tmp_path / "engine.toml"
    settings = ("page_size = 4", "max_total_tokens = 64", "max_running_requests = 1", "chunked_prefill_size = 1")
    config.write_text("\n".join(("[engine]", *settings)))
    common = ("generate", "--model", checkpoint, "--config", config, "--prompt", "1", "--max-new-tokens", 1)
    assert "64 tokens in 16 pages of 4" in run(capsys, *common)[2]
    assert "64 tokens in 8 pages of 8" in run(capsys, *common, "--page-size", 8)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page-size", "300"], "ConfigError: page_size=300 must be a whole number from 1 to 256"),
        (["--prompt", "words"], "RequestError: the model has no tokenizer.json"),
        (["--prompt", ""], "RequestError: the prompt is empty"),
        (["--prompt", "99"], "RequestError: token id 99 is outside the vocabulary"),
        (["--temperature", "-1"], "RequestError: temperature=-1.0 is not allowed"),
        (["--prompt", "1", "--logit-bias", "99=1"], "RequestError: logit_bias holds 99, which the model cannot choose"),
        (["--config", "absent.toml"], "ConfigError: cannot read the configuration absent.toml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, checkpoint, arguments, message):
    code, _, err = run(capsys, "generate", "--model", checkpoint, *SMALL, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("", "RequestError"), ("99", "RequestError"), (" ".join(["1"] * 64), "PromptTooLong")],
    ids=["empty", "unknown token", "too long"],
)
def test_prompts_are_checked_before_anything_is_compiled(capsys, checkpoint, monkeypatch, prompt, error):
    def compile_all(self, on_compile):
        raise AssertionError("compiled")

    monkeypatch.setattr(ModelRunner, "compile_all", compile_all)
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "1", "--prompt", prompt)
    assert code == 2
    assert error in err


def test_the_dtype_and_its_reason_are_told(capsys, checkpoint):
    arguments = ("--model", checkpoint, *SMALL, "--prompt", "1", "--max-new-tokens", 1)
    _, out, err = run(capsys, "generate", *arguments)
    assert "weights are float32 (dtype='auto'), which a CPU decodes several times faster" in out + err
    _, out, err = run(capsys, "generate", *arguments, "--dtype", "bfloat16")
    assert "weights are bfloat16 (dtype='bfloat16'), which a CPU decodes several times slower" in out + err


def test_an_absent_model_is_one_line_and_exit_code_2(capsys, tmp_path):
    code, _, err = run(capsys, "generate", "--model", tmp_path / "nothing")
    assert code == 2
    assert "CheckpointError" in err


def test_plan_prints_the_bytes_of_known_geometries(capsys, request):
    configs = request.config.rootpath / "configs"
    code, out, _ = run(capsys, "plan", *sorted(configs.glob("*-*.toml")))
    assert code == 0
    lines = {line.split(":")[0].rsplit("/", 1)[-1]: line for line in out.splitlines()}
    # KV heads x 2 x head_dim x 2 bytes x layers
    assert "128.00 KiB per token (bfloat16)" in lines["llama-3-8b.toml"]
    assert "320.00 KiB per token (bfloat16)" in lines["llama-3-70b.toml"]
    assert "56.00 KiB per token (bfloat16)" in lines["qwen2.5-7b.toml"]
    assert "128.00 KiB per token (bfloat16)" in lines["mistral-7b.toml"]
    assert "496.00 KiB per token (bfloat16)" in lines["gemma-3-27b.toml"]
    assert "96.00 KiB per token (bfloat16)" in lines["gpt-oss-20b.toml"]  # heads of 64 are stored as 128
    assert "1 group of 10 full layers, 6 groups of 10 layers with a window of 1,024" in lines["gemma-3-27b.toml"]
    assert "8 of 70 places in the groups have no layer" in lines["gemma-3-27b.toml"]
    assert "1 group of 12 full layers, 1 group of 12 layers with a window of 128" in lines["gpt-oss-20b.toml"]
    assert "group" not in lines["llama-3-8b.toml"]


def test_plan_needs_a_geometry(capsys, tmp_path):
    config = tmp_path / "engine.toml"
    config.write_text("[engine]\n")
    code, _, err = run(capsys, "plan", config)
    assert code == 2
    assert "no [model] table" in err


def test_the_model_that_ships_answers_in_words(capsys):
    arguments = ("--prompt", "Alice was beginning to", "--max-new-tokens", 60, "--check")
    code, out, _ = run(capsys, "generate", *SMALL, *arguments)
    assert code == 0
    assert sum(word in out.lower().split() for word in ("the", "and", "to", "a", "of", "she", "said", "it")) >= 1


def test_texts_that_end_an_answer_may_be_given_several_times(capsys):
    code, out, err = run(capsys, "generate", *SMALL, "--max-new-tokens", 60, "--stop", "never this", "--stop", " same")
    assert code == 0
    assert "ended by stop" in err
    assert " same" not in out


def test_metrics_are_served_while_it_runs(capsys, checkpoint, monkeypatch):
    ports, scraped = [], []
    original = LLM._advance_or_recover

    def advance(self, *arguments, **options):
        result = original(self, *arguments, **options)
        if port := re.search(r"http://127.0.0.1:(\d+)/metrics", capsys.readouterr().err):
            ports.append(port[1])
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=30) as answer:
            scraped.append(answer.read().decode())
        return result

    monkeypatch.setattr(LLM, "_advance_or_recover", advance)
    arguments = ("--prompt", "1", "--max-new-tokens", 4, "--metrics-port", 0)
    code, _, _ = run(capsys, "generate", "--model", checkpoint, *SMALL, *arguments)
    assert code == 0
    assert any("engine_num_requests_running 1.0" in page for page in scraped)
