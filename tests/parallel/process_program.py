"""One of several processes that are an engine together; prints what it saw as one line of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import jax
from serving_support import make_llama

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.distributed.processes import join_from, leave_at_once
from engine.errors import ConfigError, ProcessLost, RequestError
from engine.models.sharding import shard_model
from engine.serving.build import make_mesh_of, make_pool
from engine.serving.device import device_memory
from engine.serving.device.page_mover import PageMover

SKEW = 1e6  # seconds: what a process that is not the first believes of the time

join_from(os.environ)
index = jax.process_index()


def tokens_of(outputs):
    return [[output.token_ids, *(sibling.token_ids for sibling in output.siblings)] for output in outputs]


def one_by_one(llm, prompts):
    """Adds requests, aborts the second after three steps, and runs to the end."""
    ids = [llm.add_request(prompt, SamplingParams(max_new_tokens=10, timeout=1000.0)) for prompt in prompts]
    seen, steps = {}, 0
    while llm.scheduler.has_work:
        if steps == 3:
            llm.abort(ids[1])
        seen |= llm.step()
        steps += 1
    return [seen[i].token_ids if i in seen else None for i in ids]


def skewed(llm):
    """Everything that process 0 alone may know is otherwise in the others."""
    if index:
        true_time = time.monotonic
        time.monotonic = lambda: true_time() + SKEW * (1 + true_time() % 1)
    return index == 0


def refused(llm):
    try:
        llm.generate([[1] * 10_000] if index == 0 else [[1]], SamplingParams(max_new_tokens=2))
    except RequestError as error:
        return str(error)
    return None


def compare(options, prompts, params):
    params = [SamplingParams(**values) for values in params]
    llm = LLM(make_llama(seed=5, num_attention_heads=8, num_key_value_heads=2), **options)
    first = skewed(llm)
    report = {"index": index, "refused": refused(llm), "size": llm.plan.size_tokens, "devices": jax.device_count()}
    report["answers"] = tokens_of(llm.generate(prompts if first else [[index]], params if first else None))
    report["stepped"] = one_by_one(llm, prompts[:3])
    report["compiles"] = llm.compiles_after_warmup
    llm.check_integrity()
    report["parcels"], report["weights"] = llm._runner.parcels, llm._identity
    print(json.dumps(report), flush=True)


def die(options, prompts, how):
    """The last process ends in mid-run; the others must notice."""
    llm = LLM(make_llama(seed=5, num_attention_heads=8, num_key_value_heads=2), **options)
    for prompt in prompts:
        llm.add_request(prompt, SamplingParams(max_new_tokens=120))
    print(json.dumps({"index": index, "pid": os.getpid()}), flush=True)
    try:
        for step in range(1000):
            if step == 5 and index == jax.process_count() - 1:
                print(json.dumps({"dies": time.time()}), flush=True)
                os.kill(os.getpid(), getattr(signal, how))
            llm.step()
    except ProcessLost as error:
        print(json.dumps({"lost": str(error)}), flush=True)
        leave_at_once(3)


def size(reports, options):
    """Devices that say different things about their memory must lead to one pool."""
    mine = reports[index]
    device_memory.report_of = lambda device: mine
    config = EngineConfig(**options)
    mesh = make_mesh_of(config)
    _, pool = make_pool(config, shard_model(make_llama(seed=5), mesh), mesh)
    print(json.dumps({"index": index, "size": pool.size}), flush=True)


def keep(options, prompts):
    """Prompts one by one, in a pool that holds two of them, and then the first again; what is cached is saved."""
    llm = LLM(**options)  # the model that ships: prefixes are saved for weights that have a name
    skewed(llm)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    answers = [llm.generate([prompt], params)[0] for prompt in [*prompts, prompts[0]]]
    report = {"index": index, "answers": [answer.token_ids for answer in answers]}
    report |= {"cached": [answer.cached_tokens for answer in answers], "loaded": llm.metrics().host_tier.loaded_pages}
    report["compiles"] = llm.compiles_after_warmup
    report["saved"] = llm.save_prefix_cache() if llm.config.prefix_cache_dir else None
    report["there"] = len(os.listdir(llm.config.prefix_cache_dir)) if report["saved"] else 0
    llm.check_integrity()
    print(json.dumps(report), flush=True)


def late(call):
    """The same call, a while later."""

    def calls(*arguments):
        time.sleep(0.05)
        return call(*arguments)

    return calls


def keep_with_late_copies(options, prompts):
    """As ``keep``; the last process makes its page moves late, and what they saved arrives late."""
    if index == jax.process_count() - 1:
        PageMover.make, PageMover.land = late(PageMover.make), late(PageMover.land)
    keep(options, prompts)


def open_directories(options, directories):
    """Each process is told of another directory of saved prefixes."""
    try:
        LLM(**options | {"prefix_cache_dir": directories[index]})
    except ConfigError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
        leave_at_once(2)
    leave_at_once(0)


mode, *arguments = (json.loads(argument) for argument in sys.argv[1:])
modes = compare, die, size, keep, keep_with_late_copies, open_directories
{each.__name__: each for each in modes}[mode](*arguments)
