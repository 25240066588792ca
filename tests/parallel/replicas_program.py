"""Serves hard traffic with several replicas and with one device, and reports how they compare: a line of JSON per case.

Little memory, prompts that begin alike, several answers to a prompt, priorities, aborts, time limits, a host tier.
"""

from __future__ import annotations

import json
import sys
import tempfile

import numpy as np
from engine_reports import bytes_on, pointers, unlike
from serving_support import VOCAB, make_llama

from engine import LLM, SamplingParams

OPTIONS = {"page_size": 8, "max_running_requests": 8, "chunked_prefill_size": 16, "context_length": 96}
rng = np.random.default_rng()


def traffic():
    """Prompts and parameters: some greedy, some drawn, some of several answers, with and without log-probabilities."""
    shared = rng.integers(0, VOCAB, size=30).tolist()
    prompts = [rng.integers(0, VOCAB, size=n).tolist() for n in (5, 33, 1, 17, 24, 9, 40, 2)]
    prompts += [shared[:cut] + rng.integers(0, VOCAB, size=n).tolist() for cut, n in ((30, 1), (24, 9), (17, 3))]
    params = [
        SamplingParams(
            max_new_tokens=int(rng.integers(4, 20)),
            temperature=float(rng.choice([0.0, 0.0, 0.8])),
            top_k=int(rng.choice([0, 5])),
            seed=number,
            n=3 if number % 4 == 1 else 1,
            logprobs=2 if number % 3 == 0 else None,
            priority=number % 2,
        )
        for number in range(len(prompts))
    ]
    return prompts, params


def largest_difference(one, many):
    """Of the logits and log-probabilities of answers that are alike."""
    found = [0.0]
    for a, b in zip(one, many, strict=True):
        if a.token_ids == b.token_ids:
            found.append(float(np.abs(a.logits - b.logits).max()))
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                found += [abs(x.chosen - y.chosen), *(abs(p - q) for (_, p), (_, q) in zip(x.top, y.top, strict=True))]
        found.append(largest_difference(a.siblings, b.siblings))
    return max(found)


def fail(*_):
    raise OSError("on purpose")


def come_and_go(llm, prompts, whole):
    """Requests that are aborted or late among some that are not, and two steps that fail: before the device, and after
    one replica has planned; returns how many answers are not as they should.
    """
    now = [0.0]
    clock, llm.scheduler.clock = llm.scheduler.clock, lambda: now[0]
    late = [llm.add_request(prompt, SamplingParams(max_new_tokens=30, timeout=5.0)) for prompt in prompts[1:4]]
    stay = [llm.add_request(prompt, SamplingParams(max_new_tokens=8)) for prompt in prompts]
    gone = [llm.add_request(prompt, SamplingParams(max_new_tokens=30, n=2)) for prompt in prompts[4:8]]
    outputs, steps = {}, 0
    while llm.scheduler.has_work:
        if steps % 3 == 2 and gone:
            llm.abort(gone.pop())
        now[0] += 6.0 * (steps == 9)
        if steps in (4, 6):
            owner, name = (llm._runner, "step") if steps == 4 else (llm.scheduler.replicas[-1], "schedule")
            setattr(owner, name, fail)
            try:
                llm.step()
            except OSError:
                llm.check_integrity()
            finally:
                delattr(owner, name)
        outputs |= llm.step()
        steps += 1
    llm.scheduler.clock = clock
    wrong = sum(outputs[i].finish_reason not in ("timeout", "length") for i in late)
    for request_id, answer in zip(stay, whole, strict=True):
        wrong += outputs[request_id].token_ids != answer.token_ids
    return wrong


def all_pages_come_back(llm):
    llm.check_integrity()
    pool = llm.metrics().pool
    idle = llm.scheduler.held_tokens == 0 and pool.private_pages + pool.locked_pages == 0
    llm.reset_prefix_cache()
    return idle and all(cache.allocator.available_size() == cache.size for cache in llm.caches)


def growing(llm):
    """Answers of eight requests that no pool of ten pages a replica can hold to their ends, two by two."""
    short = np.random.default_rng(5).integers(0, VOCAB, size=(8, 6)).tolist()
    return llm.generate(short, SamplingParams(max_new_tokens=60, ignore_eos=True), return_logits=True)


def run(axes, options, model, prompts, params, one, greedy, grown):
    llm = LLM(model, **OPTIONS, **axes, **options)
    before, shardings = pointers(llm.pool), [buffer.sharding for buffer in llm.pool.buffers]
    cold = llm.generate(prompts, params, return_logits=True)
    seen = {"cached": llm.metrics().prefix_cache.hit_tokens if llm.metrics().prefix_cache else 0}
    warm = llm.generate(prompts, params, return_logits=True)
    metrics = llm.metrics()
    seen["hits"] = metrics.prefix_cache.hit_tokens - seen["cached"] if metrics.prefix_cache else 0
    seen["loaded"] = metrics.host_tier.loaded_pages if metrics.host_tier else 0
    return seen | {
        "unlike": unlike(one, cold) + unlike(one, warm) + unlike(grown, growing(llm)),
        "difference": max(largest_difference(one, cold), largest_difference(one, warm)),
        "wrong": come_and_go(llm, prompts, greedy),
        "retractions": llm.scheduler.retractions,
        "used": [replica.cache.prefix.query_tokens > 0 for replica in llm.scheduler.replicas if replica.cache.prefix],
        "back": all_pages_come_back(llm),
        "moved": pointers(llm.pool) != before,
        "resharded": [buffer.sharding for buffer in llm.pool.buffers] != shardings,
        "compiles": llm.compiles_after_warmup,
        "planned": llm.plan.device_bytes,
        "measured": [bytes_on(device, llm.pool.buffers) for device in llm.pool.mesh.devices.flat],
    }


def restored(axes, model, prompts, params, one):
    """Prefixes that one engine saves and others load: another of as many replicas, and one device."""
    with tempfile.TemporaryDirectory() as directory:
        options = {**OPTIONS, "host_tier_bytes": 1 << 22, "prefix_cache_dir": directory}
        llm = LLM(model, **options, **axes)
        llm.generate(prompts, params)
        files = llm.save_prefix_cache()
        reports = []
        for again in (LLM(model, **options, **axes), LLM(model, **options)):
            answers = again.generate(prompts, params, return_logits=True)
            reports.append({"unlike": unlike(one, answers), "loaded": again.metrics().host_tier.loaded_pages})
        return {"files": files, "restored": reports}


def moved_leader():
    """A leader of three that one replica retracts in the plan that books its first token, and the other lets in."""
    llm = LLM(make_llama(), dp=2, page_size=4, max_total_tokens=192, max_running_requests=4, chunked_prefill_size=16)
    drawn = np.random.default_rng(0)
    lengths, news, counts = (37, 4, 4, 48), (40, 4, 4, 20), (1, 1, 1, 3)
    prompts = [drawn.integers(0, VOCAB, size=length).tolist() for length in lengths]
    params = [SamplingParams(max_new_tokens=new, n=n) for new, n in zip(news, counts, strict=True)]
    ids = [llm.add_request(*each) for each in zip(prompts, params, strict=True)]
    outputs = {}
    for _ in range(200):
        outputs |= llm.step()
    return {"answers": [[len(each.token_ids) for each in (outputs[i], *outputs[i].siblings)] for i in ids]}


def main(cases, saves):
    model = make_llama(seed=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    prompts, params = traffic()
    llm = LLM(model, **OPTIONS)
    one = llm.generate(prompts, params, return_logits=True)
    greedy, grown = llm.generate(prompts, SamplingParams(max_new_tokens=8)), growing(llm)
    for axes, options in cases:
        report = run(axes, options, model, prompts, params, one, greedy, grown)
        print(json.dumps({"case": [axes, options], **report}), flush=True)
    for axes in saves:
        print(json.dumps({"case": axes, **restored(axes, model, prompts, params, one)}), flush=True)
    print(json.dumps(moved_leader()), flush=True)


main(*(json.loads(argument) for argument in sys.argv[1:]))
