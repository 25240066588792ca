"""The whole engine under random traffic and faults: every answer is right, every request ends, no page is lost."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from serving_support import VOCAB, make_llama

from engine.serving.llm import LLM
from engine.serving.recovery import MAX_TRIES
from engine.serving.sampling_params import SamplingParams
from engine.serving.watch.exporter import EngineCollector

LONGEST_ANSWER = 20
PATIENCE = 3_000  # steps; the longest runs here take a few hundred


class Boom(Exception):
    """What an injected fault raises."""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


def make_prompts():
    """Prompts that begin alike by groups, on page boundaries and between them, one of a single token."""
    rng = np.random.default_rng(77)
    first, second = (rng.integers(0, VOCAB, 40).tolist() for _ in range(2))
    tails = [rng.integers(0, VOCAB, length).tolist() for length in (1, 3, 9)]
    cuts = [(first, 32), (first, 17), (second, 24)]
    return [[5], first[:20], *(whole[:cut] + tail for whole, cut in cuts for tail in tails)]


PROMPTS = make_prompts()


def make_models(windows):
    """Two models of a geometry with other weights."""
    changes = {"num_hidden_layers": len(windows), "layer_windows": windows, "model_type": "mistral"}
    return [make_llama(seed, **changes) for seed in range(2)]


def answers_of(models):
    """Each model's greedy answer to each prompt: alone, cold, in a pool without limit."""
    params = SamplingParams(max_new_tokens=LONGEST_ANSWER)
    found = []
    for model in models:
        alone = LLM(model, page_size=4, max_running_requests=1, chunked_prefill_size=64, disable_radix_cache=True)
        found.append([alone.generate([prompt], params)[0].token_ids for prompt in PROMPTS])
    return found


@pytest.fixture(scope="module")
def one_group():
    models = make_models((None, None))
    return models, answers_of(models)


class EngineMachine(RuleBasedStateMachine):
    llm: LLM
    models: list
    answers: list

    def __init__(self):
        super().__init__()
        for request_id in list(self.llm._groups.unfinished):  # of a run that found a bug
            self.llm.abort(request_id)
        self.llm.cache.reset_prefix_cache()
        self.llm.scheduler.clock = self.clock = Clock()
        self.open: dict[int, tuple[int, SamplingParams]] = {}
        self.weights = self.faults = 0
        self.counted: dict[str, int] = {}
        self.llm.replace_weights(self.models[0])

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        new=st.integers(1, LONGEST_ANSWER),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.integers(-2, 2),
        timeout=st.sampled_from([None, None, 3.0]),
        salt=st.sampled_from(["", "", "other"]),
    )
    def add(self, prompt, new, n, priority, timeout, salt):
        params = SamplingParams(
            max_new_tokens=new, n=n, priority=priority, timeout=timeout, tenant_salt=salt, ignore_eos=True
        )
        self.open[self.llm.add_request(PROMPTS[prompt], params)] = prompt, params

    @rule(steps=st.integers(1, 12))
    def step(self, steps):
        for _ in range(steps):
            self.take(self.llm.step())

    @rule(
        where=st.sampled_from(["step", "copy", "start_reading", "write"]),
        steps=st.integers(1, 6),
        late=st.booleans(),
        loses=st.booleans(),
    )
    def fail(self, where, steps, late, loses):
        """A fault on the device's side, before it did its work or after; what the call would have said comes later."""
        original = getattr(self.llm._runner, where)

        def failing(*args, **kwargs):
            if late and where != "step":
                original(*args, **kwargs)
            if loses:
                self.llm.pool.buffers[-1].delete()
            self.faults += 1
            raise Boom

        setattr(self.llm._runner, where, failing)
        try:
            for _ in range(steps):
                self.take(self.llm.step())
        except Boom:
            pass
        finally:
            delattr(self.llm._runner, where)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        self.llm.abort(request_id)
        del self.open[request_id]

    @rule(seconds=st.floats(0.1, 4))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def reset(self):
        self.llm.cache.reset_prefix_cache()

    @precondition(lambda self: not self.open)
    @rule()
    def replace_weights(self):
        self.weights = 1 - self.weights
        self.llm.replace_weights(self.models[self.weights])

    def take(self, finished):
        for request_id, output in finished.items():
            prompt, params = self.open.pop(request_id)
            right = self.answers[self.weights][prompt]
            for answer in (output, *output.siblings):
                assert answer.token_ids == right[: len(answer.token_ids)]
                if answer.finish_reason == "error":
                    assert self.faults >= MAX_TRIES
                elif params.timeout is None or answer.finish_reason != "timeout":
                    assert (len(answer.token_ids), answer.finish_reason) == (params.max_new_tokens, "length")
            assert len(output.siblings) == params.n - 1

    @invariant()
    def balanced(self):
        self.llm.cache.check_integrity()
        counted = counters(self.llm.metrics())  # refuses parts that do not make up the pool
        assert all(counted.get(name, 0) >= count for name, count in self.counted.items()), "a counter went back"
        self.counted = counted
        if not self.open:
            assert self.llm.cache.held_tokens == 0
            assert not self.llm.scheduler.has_work

    def teardown(self):
        for _ in range(PATIENCE):
            if not self.open:
                break
            self.take(self.llm.step())
        assert not self.open, "requests do not get on"
        self.balanced()


def counters(metrics):
    """Every counter that Prometheus would see, those of histograms too, with its labels."""
    families = EngineCollector(lambda: metrics).collect()
    samples = (sample for family in families if family.type != "gauge" for sample in family.samples)
    return {f"{sample.name}{sample.labels}": sample.value for sample in samples}


OPTIONS = {
    "host tier": {"max_total_tokens": 72, "page_size": 4, "host_tier_bytes": 1 << 18},
    "page 1": {"max_total_tokens": 64, "page_size": 1},
    "small host tier, lfu": {
        "max_total_tokens": 64,
        "page_size": 8,
        "host_tier_bytes": 40_000,
        "eviction_policy": "lfu",
    },
    "no prefix cache": {"max_total_tokens": 96, "page_size": 16, "disable_radix_cache": True},
}


# Windows of the layers, so that these are one, two and three groups.
OF_GROUPS = {
    "a window": ((8, 8), {"max_total_tokens": 64, "page_size": 4}),
    "two groups": ((None, 8), {"max_total_tokens": 128, "page_size": 4, "host_tier_bytes": 1 << 18}),
    "three groups": ((None, 8, 21), {"max_total_tokens": 192, "page_size": 4, "eviction_policy": "lfu"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_answer_is_right_and_every_page_comes_back(one_group, name):
    play(*one_group, OPTIONS[name])


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("a window", "two groups")), "three groups"]
)
def test_the_same_where_layers_are_groups(name):
    windows, options = OF_GROUPS[name]
    models = make_models(windows)
    play(models, answers_of(models), options, examples=5)


def play(models, answers, options, examples=8):
    llm = LLM(models[0], max_running_requests=4, chunked_prefill_size=24, context_length=64, **options)
    compiles = llm.compiles_after_warmup
    machine = type("Machine", (EngineMachine,), {"llm": llm, "models": models, "answers": answers})
    run(machine, max_examples=examples, steps=25)
    assert llm.compiles_after_warmup == compiles


def run(machine, *, max_examples, steps):
    chosen = settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
