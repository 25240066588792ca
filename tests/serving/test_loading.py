import json
import logging

import jax.numpy as jnp
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.models.checkpoint import save_model
from engine.models.decoder import Decoder
from engine.models.model_config import ModelConfig
from engine.models.rotary import LinearScaling
from engine.serving.device.runner import ModelRunner
from engine.serving.llm import LLM
from engine.serving.loading import describe_dtype, load_parts, weights_dtype
from engine.serving.sampling_params import SamplingParams

SMALL = {"max_running_requests": 1, "chunked_prefill_size": 1}
WORDS = ("<s>", "</s>", "<end>", *"abcdefgh")


def make_model(dtype="float32", **changes):
    geometry = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    return Decoder(ModelConfig(**geometry | changes), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(4))


@pytest.fixture
def checkpoint(tmp_path):
    """A bfloat16 checkpoint with a tokenizer of eight letters."""
    save_model(make_model(), tmp_path, dtype="bfloat16")
    letters = tokenizers.Tokenizer(models.BPE({word: token for token, word in enumerate(WORDS)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    letters.add_special_tokens(list(WORDS[:3]))
    letters.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_auto_is_float32_on_a_cpu_and_says_why(checkpoint, caplog):
    with caplog.at_level(logging.INFO):
        loaded = load_parts(checkpoint, {})
    assert loaded.model.dtype == jnp.float32 == weights_dtype(EngineConfig())
    assert "weights are float32 (dtype='auto'), which a CPU decodes several times faster than 16 bits" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_on_a_cpu_give_a_warning_in_every_case(checkpoint, caplog, dtype):
    for model, options in ((checkpoint, {"dtype": dtype}), (make_model(dtype), {})):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = load_parts(model, options)
        assert loaded.model.dtype == jnp.dtype(dtype)
        assert "several times slower than float32" in caplog.text
        assert caplog.records[-1].getMessage() == describe_dtype(loaded.config, loaded.model)


def test_end_tokens_of_every_file_end_an_answer(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": 30}))
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [28, 29]}))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    ends = {}

    def stop_ids(llm):
        ends["all"] = llm._intake.make(llm._intake.check([[3]], None)[0]).stop_ids
        raise RequestError("seen")

    with pytest.raises(RequestError, match="seen"):
        LLM(checkpoint, **SMALL, before_compile=stop_ids)
    assert ends["all"] == {30, 28, 29, WORDS.index("<end>")}


def test_special_tokens_of_a_prompt_are_parsed_unless_told(checkpoint):
    for parse, special in ((True, True), (False, False)):
        tokenizer = load_parts(checkpoint, {"parse_special_tokens": parse}).tokenizer
        assert (WORDS.index("<end>") in tokenizer.encode("a<end>b")) == special
    with pytest.raises(ConfigError, match="parse_special_tokens"):
        EngineConfig(parse_special_tokens="no")


def test_requests_are_checked_before_anything_is_compiled(checkpoint, monkeypatch):
    def compile_all(self, on_compile):
        raise AssertionError("compiled")

    monkeypatch.setattr(ModelRunner, "compile_all", compile_all)
    for prompt, params, named in (
        ("", None, "empty"),
        ("a" * 40, None, "40 tokens leaves no room"),
        ([99], None, "99"),
        ("abc", SamplingParams(max_new_tokens=20), "pool"),
    ):
        with pytest.raises(RequestError, match=named):
            LLM(
                checkpoint,
                **SMALL,
                max_total_tokens=16,
                before_compile=lambda llm, prompt=prompt, params=params: llm.check_requests([prompt], params),
            )


def test_a_linearly_scaled_model_serves_its_lengthened_context():
    llm = LLM(make_model(rope_scaling=LinearScaling(2.0)), **SMALL)
    assert llm.plan.context_length == 64
    (output,) = llm.generate([[3] * 40], SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert len(output.token_ids) == 4
    with pytest.raises(ConfigError, match="64 positions"):
        LLM(make_model(rope_scaling=LinearScaling(2.0)), **SMALL, context_length=65)


def test_the_text_of_an_answer_follows_its_prompt(checkpoint):
    """Sentencepiece: of the words of an answer the first has its space too."""
    path = checkpoint / "tokenizer.json"
    words = tokenizers.Tokenizer(models.WordLevel({f"▁w{token}": token for token in range(32)}, "▁w0"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(path))
    (output,) = LLM(checkpoint, **SMALL).generate(["w5 w6"], SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert output.prompt_token_ids == [5, 6]
    assert output.text == "".join(f" w{token}" for token in output.token_ids)
