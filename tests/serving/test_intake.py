"""What may be asked of an engine, and one line that says why not; without a model or a device."""

import json
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from engine.distributed.agreement import Agreement
from engine.errors import EngineError, RequestError
from engine.models.model_config import ModelConfig
from engine.serving.intake import Intake
from engine.serving.sampling_params import SamplingParams

VOCAB, CONTEXT = 97, 64


@pytest.fixture
def intake():
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        eos_token_id=(),
    )
    tokenizer = types.SimpleNamespace(encode=lambda text: [ord(letter) % VOCAB for letter in text], eos_token_ids={1})
    return Intake(config, tokenizer, CONTEXT, lambda salt: salt)


def refusal(intake, prompts, params=None):
    with pytest.raises(RequestError) as caught:
        intake.check(prompts, params)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 2], [3, 4]],
        ([1, 2], (3, 4)),
        (ids for ids in ([1, 2], [3, 4])),
        iter([np.array([1, 2], np.uint64), jnp.array([3, 4])]),
        np.array([[1, 2], [3, 4]]),
        jnp.array([[1, 2], [3, 4]], jnp.int32),
        [range(1, 3), np.array([3, 4], np.int8)],
        {"a": [1, 2], "b": [3, 4]}.values(),
    ],
    ids=["lists", "tuple", "generator", "iterator", "2-D array", "2-D jax array", "ranges", "values"],
)
def test_any_iterable_of_prompts_is_taken_in_its_order(intake, prompts):
    checked = intake.check(prompts, None)
    assert [ids.tolist() for ids, _ in checked] == [[1, 2], [3, 4]]
    assert {ids.dtype for ids, _ in checked} == {np.dtype(np.int32)}


@pytest.mark.parametrize("prompts", [[], (), iter([]), np.zeros((0, 3), np.int32)])
def test_no_prompts_are_no_requests(intake, prompts):
    assert intake.check(prompts, SamplingParams()) == []


def test_texts_come_from_a_generator_too(intake):
    texts = ("text " * count for count in (1, 2))
    assert [len(ids) for ids, _ in intake.check(texts, (SamplingParams() for _ in range(2)))] == [5, 10]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("hello", "prompts is one string; give a list of prompts"),
        (None, "prompts is None; give a list of prompts"),
        (b"hello", "prompts is b'hello', a bytes; give a list"),
        (5, "prompts is 5; give a list"),
        ({"prompt": [1]}, "a dict; give a list"),
        ({"one", "two"}, "a set; give a list"),
        ([1, 2, 3], "a prompt is 1; it must be text or a list of token ids"),
        (np.array([1, 2, 3]), r"a prompt is np.int64\(1\); it must be text or a list"),
        (np.array(1), r"prompts is array\(1\); give a list"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(intake, prompts, message):
    assert re.search(message, refusal(intake, prompts))


NESTED = [1]
for _ in range(100):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a prompt is None; it must be text or a list of token ids"),
        (3.5, "a prompt is 3.5"),
        (b"abc", "a prompt is b'abc'"),
        (bytearray(b"abc"), "a prompt is bytearray(b'abc')"),
        ({1, 2}, "a prompt is {1, 2}"),
        ({"ids": [1]}, "a prompt is {'ids': [1]}"),
        ((token for token in [1, 2]), "a prompt is <generator object"),
        ("", "the prompt is empty"),
        ("\ud800", "not valid text"),
        ([], "empty or not a flat list"),
        ([[1, 2]], "not a flat list (shape (1, 2))"),
        ([[1], [2, 3]], "not a flat list"),
        (NESTED, "not a flat list"),
        ([1.0, 2.0], "token ids must be whole numbers from 0 to 96; got [1.0, 2.0]"),
        ([1, float("nan")], "must be whole numbers"),
        ([True, False], "must be whole numbers"),
        (["a", "b"], "must be whole numbers"),
        ([1, None], "must be whole numbers"),
        (np.array([1, 2], "m8[s]"), "must be whole numbers"),
        ([1, 97], "token id 97 is outside the vocabulary"),
        ([-1], "token id -1 is outside"),
        ([2**70], "must be whole numbers from 0 to 96; got [11805"),
        ([2**63, -1], "must be whole numbers from 0 to 96"),
        (np.array([3, 2**64 - 1], np.uint64), "token id 18446744073709551615 is outside"),
        (jnp.array([1, -5]), "token id -5 is outside"),
        (jnp.array([[1.5]]), "not a flat list"),
        ([10**5000], "must be whole numbers"),
        (["x" * 10_000], "must be whole numbers"),
        ([1] * 64, "leaves no room"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_is_no_prompt_is_refused_in_one_line(intake, prompt, message):
    assert message in refusal(intake, [[1, 2], prompt])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("greedy", "sampling_params is one string; give a SamplingParams"),
        ({"temperature": 1}, "sampling_params is {'temperature': 1}, a dict; give a SamplingParams"),
        (5, "sampling_params is 5; give a SamplingParams"),
        ([None], "sampling_params holds None"),
        ([{"seed": 1}], "sampling_params holds {'seed': 1}"),
        ([SamplingParams()] * 2, "2 sampling_params for 1 prompts"),
        (SamplingParams(stop_token_ids=(5, 97)), "stop_token_ids holds 97, which the model cannot choose"),
        (SamplingParams(logit_bias={5: 1, 97: 1}), "logit_bias holds 97, which the model cannot choose"),
        (
            SamplingParams(min_tokens=2, stop_token_ids=[0, *range(2, VOCAB)]),  # 1 ends a text
            "with min_tokens=2 no token could be chosen, because every one of the model's 97 tokens ends answers",
        ),
    ],
    ids=range(9),
)
def test_what_are_no_sampling_params_is_refused(intake, params, message):
    assert message in refusal(intake, [[1]], params)


def test_a_stop_text_needs_a_tokenizer(intake):
    intake._tokenizer = None
    assert "stop has texts, but the model has no tokenizer.json" in refusal(intake, [[1]], SamplingParams(stop="a"))


def test_all_tokens_but_one_may_end_an_answer_and_all_where_it_may_be_short(intake):
    most = [0, *range(3, VOCAB)]
    assert intake.check([[1]], SamplingParams(min_tokens=2, stop_token_ids=most))
    assert intake.check([[1]], SamplingParams(stop_token_ids=[*most, 2]))


def test_each_prompt_without_a_seed_draws_its_own(intake):
    params = SamplingParams(temperature=1.0)
    states = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 -- what a caller does to NumPy's generator must not matter
        states.append([checked[1].seed for checked in intake.check([[1]] * 50, params)])
    seeds = states[0] + states[1]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert params.seed is None
    assert len({seed >> 27 for seed in seeds}) > 8  # of the whole range


def test_a_seed_that_is_given_stays_and_answers_count_on_from_it(intake):
    (checked,) = intake.check([[1]], SamplingParams(temperature=1.0, seed=2**31 - 2, n=4))
    request = intake.make(checked)
    assert [member.seed for member in (request, *request.siblings)] == [2**31 - 2, 2**31 - 1, 0, 1]
    (checked,) = intake.check([[1]], SamplingParams(temperature=1.0, n=3))
    request = intake.make(checked)
    first = request.seed
    assert [member.seed for member in request.siblings] == [(first + 1) % 2**31, (first + 2) % 2**31]


def test_a_greedy_request_draws_no_seed(intake):
    given, not_given = (intake.make(*intake.check([[1]], SamplingParams(seed=seed))) for seed in (7, None))
    assert (given.seed, not_given.seed) == (7, 0)


class End:
    """One process's end of a plan over JSON, as ``SharedPlan`` carries it."""

    is_shared = True

    def __init__(self, leads, sent):
        self.leads, self.sent = leads, sent

    def agree(self, value):
        if self.leads:
            self.sent.append(json.dumps(value))
        return json.loads(self.sent[-1])


def test_processes_draw_with_the_seeds_of_process_0(intake):
    sent = []
    first, other = (Agreement(End(leads, sent)) for leads in (True, False))
    params = SamplingParams(temperature=1.0, stop_token_ids=np.array([3, 4]), n=2, logit_bias={3: 0.1}, min_p=0.1)
    ours = intake.check_in_all(first, ([token] for token in range(5)), params)
    theirs = intake.check_in_all(other, None, None)  # which process 0's check would refuse
    assert [ids.tolist() for ids, _ in theirs] == [[token] for token in range(5)]
    assert [params for _, params in theirs] == [params for _, params in ours]
    assert len({params.seed for _, params in theirs}) == 5


def test_whatever_stops_the_check_in_process_0_stops_all(intake):
    def prompts():
        yield [1]
        raise OSError("the file of prompts is gone")

    sent = []
    first, other = (Agreement(End(leads, sent)) for leads in (True, False))
    with pytest.raises(OSError, match="the file of prompts is gone"):
        intake.check_in_all(first, prompts(), None)
    with pytest.raises(EngineError, match="the file of prompts is gone"):
        intake.check_in_all(other, [], None)
