import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving_support import VOCAB, make_llama

from engine.models.decoder import Decoder
from engine.models.dense import dense_logits
from engine.models.model_config import ModelConfig
from engine.serving.check import CHECK_BOUND, check_against_dense
from engine.serving.llm import LLM
from engine.serving.request import RequestOutput
from engine.serving.sampling_params import SamplingParams

# What is in question is how large the logits are, not what the engine does: answers are made from the dense ones.
PROMPT, ANSWER = [5, 7, 11], [3, 1, 4, 1]


@pytest.fixture(scope="module", params=[1e-3, 1.0, 41.0, 4000.0], ids=lambda size: f"logits of {size}")
def sized(request):
    """A model whose largest logit is about this, and its dense logits."""
    model = make_llama()
    tokens = np.array([*PROMPT, *ANSWER[:-1]], np.int32)
    forward = jax.jit(dense_logits)
    scale = request.param / float(np.abs(forward(model, tokens)).max())
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * scale
    return model, np.asarray(forward(model, tokens))[len(PROMPT) - 1 :]


def output_with(logits):
    return RequestOutput(PROMPT, ANSWER, "", "length", 0, None, logits)


def test_the_bound_is_a_share_of_the_logits_size(sized):
    model, logits = sized
    size = float(np.abs(logits).max())
    for share, passes in ((0, True), (2.6e-6, True), (1e-4, False), (0.1, False)):
        noise = np.random.default_rng(1).choice([-1.0, 1.0], logits.shape) * share * size
        check = check_against_dense(model, [output_with((logits + noise).astype(np.float32))])
        assert check.passed == passes, check.describe()
        assert check.bound == pytest.approx(CHECK_BOUND["float32"] * size, rel=0.5)
        assert check.tokens == len(ANSWER)


def test_a_16_bit_pool_explains_more_and_not_a_wrong_token(sized):
    model, logits = sized
    size = float(np.abs(logits).max())
    for share, passes in ((0.01, True), (0.2, False)):
        check = check_against_dense(model, [output_with(logits + share * size)], kv_dtype=jnp.bfloat16)
        assert check.passed == passes, check.describe()
    assert not check_against_dense(model, [output_with(np.roll(logits, 1, axis=0))], kv_dtype=jnp.bfloat16).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_and_are_counted(value):
    llama = make_llama()
    logits = np.zeros((len(ANSWER), VOCAB), np.float32)
    logits[1, 3:5] = value
    check = check_against_dense(llama, [output_with(logits)])
    assert (check.passed, check.not_finite) == (False, 2)
    assert "2 logits are not finite" in check.describe()


def test_weights_that_overflow_fail_on_both_sides():
    llama = make_llama()
    llama.lm_head.kernel[...] = llama.lm_head.kernel[...].at[:, 2].set(np.inf)
    logits = np.full((len(ANSWER), VOCAB), np.inf, np.float32)
    assert not check_against_dense(llama, [output_with(logits)]).passed


def test_an_answer_without_tokens_has_nothing_to_compare():
    check = check_against_dense(make_llama(), [RequestOutput(PROMPT, [], "", "abort", 0)])
    assert (check.passed, check.tokens) == (True, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_of_large_logits_passes_its_own_check(dtype):
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=64, eos_token_id=(),
    )  # fmt: skip
    model = Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(2))
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * 300
    llm = LLM(model, max_running_requests=1, chunked_prefill_size=1, max_total_tokens=64)
    outputs = llm.generate([[1, 2, 3]], SamplingParams(max_new_tokens=8), return_logits=True)
    assert np.abs(outputs[0].logits).max() > 30
    check = check_against_dense(llm.model, outputs)
    assert check.passed, check.describe()
