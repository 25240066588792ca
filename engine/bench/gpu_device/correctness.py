"""Section ``correctness``: outputs, log-sum-exps and the whole written pool, checked with float64 attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from engine.attention import ragged_paged_attention
from engine.bench.gpu_device.cases import Case, Inputs, all_cases, expected_attention, make_inputs, small_cases
from engine.bench.gpu_device.oracle import Attended, Float64

POISON_BYTES = 1 << 30
POOL = 3  # its place among the arguments


def tasks(impl: str, *, small: bool) -> list[dict[str, Any]]:
    """One task per case."""
    cases = small_cases() if small else all_cases()
    return [{"case": case.values(), "impl": impl, "seed": seed} for seed, case in enumerate(cases)]


def tolerance(case: Case, expected: Attended) -> Float64:
    """``[T, Hq, D]`` largest difference that rounding explains.

    The result is rounded to the dtype, and before that each weight, with a root mean square error of a sixth of eps.
    The bound is six times the sum of such errors if they are independent, which chance does not reach. Scales are
    multiplied into q, which is rounded again: this changes each logit (here of order 4) by as much for each unit of it.
    """
    eps = _eps(case)
    return eps * (0.55 * np.abs(expected.out) + (6 if case.scales else 1.25) * expected.spread) + 2e-5


def lse_tolerance(case: Case) -> float:
    """Bound for log-sum-exps: logits are float32 sums of products of the dtype.

    Scales add one more rounding of q to the dtype, and a hardware tanh is accurate to 11 bits.
    """
    return 1e-3 + (4 * _eps(case) if case.scales else 0.0) + (case.soft_cap or 0.0) * 2**-11


def _eps(case: Case) -> float:
    """Distance from 1 to the next number of the case's dtype."""
    return float(ml_dtypes.finfo(getattr(ml_dtypes, case.shape.dtype, case.shape.dtype)).eps)


def prepare(task: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Makes the inputs and expected results, and compiles the call with the pool donated."""
    case = Case.of(task["case"])
    inputs = make_inputs(case, task["seed"])
    expected = expected_attention(case, inputs)
    arguments = arguments_of(inputs)
    compiled = jax.jit(program(case, task["impl"]), donate_argnums=POOL).lower(*arguments).compile()

    def run() -> dict[str, Any]:
        poison_memory()
        on_device = jax.tree.map(jnp.array, arguments)
        address = on_device[POOL].unsafe_buffer_pointer()
        results = compiled(*on_device)
        in_place = results[1].unsafe_buffer_pointer() == address
        return judge(case, inputs, expected, [np.asarray(result) for result in results]) | {"in_place": in_place}

    return run


def program(case: Case, impl: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The call of a case; its arguments are ``arguments_of`` the inputs."""

    def call(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pool: jax.Array,
        metadata: dict[str, jax.Array],
        heads: dict[str, jax.Array | None],
    ) -> tuple[jax.Array, ...]:
        return ragged_paged_attention(
            q,
            k,
            v,
            pool,
            page_size=case.shape.page_size,
            sliding_window=case.window,
            soft_cap=case.soft_cap,
            return_lse=case.lse,
            impl=impl,
            page_table=metadata["page_table"],
            cu_q_lens=metadata["cu_q_lens"],
            kv_lens=metadata["kv_lens"],
            sinks=heads["sinks"],
            k_scale=heads["k_scale"],
            v_scale=heads["v_scale"],
        )

    return call


def arguments_of(inputs: Inputs) -> tuple[Any, ...]:
    """The arguments of the call, with the pool at index ``POOL``."""
    metadata = {"page_table": inputs.page_table, "cu_q_lens": inputs.cu_q_lens, "kv_lens": inputs.kv_lens}
    heads = {"sinks": inputs.sinks, "k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
    return inputs.q, inputs.k, inputs.v, inputs.pool, metadata, heads


def poison_memory() -> None:
    """Fills the memory of the next results with NaN, so that an element that no kernel writes is detected."""
    size = POISON_BYTES if jax.default_backend() == "gpu" else 1 << 20
    jnp.full(size // 4, jnp.nan, jnp.float32).block_until_ready().delete()


def judge(case: Case, inputs: Inputs, expected: Attended, results: list[Any]) -> dict[str, Any]:
    """Compares the results of one call with the expected ones.

    Returns:
        ``ok``; ``error``, the largest difference of out, and ``of_bound``, the largest ratio of a difference to its
        bound; the same for the log-sum-exps where they are requested; ``pool_slots``, the number of slots whose bits
        are wrong; and where something is wrong, ``where``: the rows and slots, as text.
    """
    out, pool, *lse = results
    live = int(inputs.cu_q_lens[-1])
    difference = _difference(out, expected.out)
    of_bound = (difference / tolerance(case, expected)).max(-1)
    found: dict[str, Any] = {"error": float(difference.max(initial=0.0)), "of_bound": float(of_bound.max(initial=0.0))}
    where = _bad_rows(inputs, "out", of_bound)
    if case.lse:
        difference = _difference(lse[0], expected.lse)
        of_bound = difference / lse_tolerance(case)
        found |= {"lse_error": float(difference.max(initial=0.0)), "lse_of_bound": float(of_bound.max(initial=0.0))}
        where += _bad_rows(inputs, "lse", of_bound)
    if np.any(out[live:] != 0):
        where.append(f"out of {len(out) - live} padding tokens is not all 0")
    differ = np.flatnonzero((_bits(pool) != _bits(inputs.expected_pool)).any(axis=(1, 2)))
    found["pool_slots"] = len(differ)
    if len(differ):
        new = np.isin(differ, inputs.written).sum()
        where.append(f"pool: {new} new and {len(differ) - new} other slots are wrong, first {differ[:6].tolist()}")
    return found | {"ok": not where, "where": "; ".join(where)}


def _difference(got: Any, expected: Float64) -> Float64:
    """Absolute differences; infinite for an unexpected NaN, 0 for equal infinities."""
    got = np.asarray(got, np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(got == expected, 0.0, np.abs(got - expected))
    return np.nan_to_num(difference, nan=np.inf)


def _bad_rows(inputs: Inputs, name: str, of_bound: Float64) -> list[str]:
    """As text, at most six sequences with an ``of_bound[T, Hq]`` above 1."""
    lines = []
    for row, (first, last) in enumerate(zip(inputs.cu_q_lens[:-1], inputs.cu_q_lens[1:], strict=True)):
        bad = np.argwhere(of_bound[first:last] > 1)
        if len(bad):
            (token, head), share = bad[0], f"{len(bad)} of {of_bound[first:last].size}"
            lines.append(
                f"{name} row {row} ({last - first} new of {inputs.kv_lens[row]}): {share} (token, head) wrong, first "
                f"({token}, {head}) by {of_bound[first + token, head]:.3g} times the bound"
            )
    return lines[:6] + ([f"and {len(lines) - 6} more rows"] if len(lines) > 6 else [])


def _bits(array: Any) -> Any:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def line(task: dict[str, Any], result: dict[str, Any]) -> str:
    """The result of one case, as a line."""
    told = f"{'ok  ' if result['ok'] else 'FAIL'} {task['case']['name']}: "
    told += f"out off by {result['error']:.1e}, {result['of_bound']:.2f} of the bound"
    if "lse_error" in result:
        told += f"; lse {result['lse_error']:.1e}, {result['lse_of_bound']:.2f}"
    notes = [] if result["in_place"] else ["the pool was copied"]
    return "; ".join([told, *notes, *([result["where"]] if result["where"] else [])])
