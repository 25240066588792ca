"""Step time and host time of the engine by number of devices: decode over meshes of virtual or real devices.

Each number of devices runs in a process of its own, because virtual devices are fixed when jax starts. Virtual devices
share the cores of this machine, so more of them can only show what splitting costs, never what it gains.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from rich.table import Table

from engine.errors import EngineError
from engine.terminal import INTERRUPTED, count, leave, plain_console, run_command

SPLITS = ("tp", "cp", "dp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the benchmark."""
    parser.add_argument(
        "--devices", type=count, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of devices"
    )
    parser.add_argument("--split", choices=SPLITS, default="tp", help="what is split: heads, tokens or requests")
    parser.add_argument("--requests", type=count, default=8, metavar="N", help="rows of the batch (default: 8)")
    parser.add_argument("--context", type=count, default=512, metavar="N", help="tokens of each prompt (default: 512)")
    parser.add_argument("--steps", type=count, default=60, metavar="N", help="decode steps measured (default: 60)")
    parser.add_argument("--virtual", action=argparse.BooleanOptionalAction, default=True, help="virtual CPU devices")


def run(args: argparse.Namespace) -> None:
    """Prints one row for each number of devices."""
    table = Table(title=f"decode, {args.requests} requests of {args.context} tokens, split by {args.split}")
    for column in ("devices", "step ms", "host ms", "pool bytes per device", "against one device"):
        table.add_column(column, justify="right")
    first = None
    for devices in args.devices:
        result = _in_own_process(args, devices)
        first = first or result["step"]
        table.add_row(
            str(devices),
            f"{result['step'] * 1e3:.2f}",
            f"{result['host'] * 1e3:.2f}",
            f"{result['bytes']:,}",
            f"{first / result['step']:.2f}x",
        )
    console = plain_console()
    console.print(table)
    if args.virtual:
        console.print(f"The devices are virtual and share {os.cpu_count()} cores: more of them cannot be faster.")


def _in_own_process(args: argparse.Namespace, devices: int) -> dict[str, Any]:
    environment = dict(os.environ)
    if args.virtual:
        flags = environment.get("XLA_FLAGS", "")
        environment |= {
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
    words = [str(getattr(args, name)) for name in ("split", "requests", "context", "steps")]
    command = [sys.executable, "-m", "engine.bench.scaling", str(devices), *words]
    # In a process group of its own, so that only this process gets Ctrl-C; `subprocess.run` then ends the child.
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, process_group=0)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        raise EngineError(f"the run on {devices} devices ended with exit code {done.returncode}; it says why above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(devices: int, split: str, requests: int, context: int, steps: int) -> dict[str, float]:
    """Medians over decode steps: seconds of a step, and processor seconds of the thread that plans and dispatches it.

    Args:
        devices: number of devices.
        split: "tp", "cp" or "dp".
        requests: rows of the batch.
        context: tokens of each prompt.
        steps: number of decode steps.
    """
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from engine.models.decoder import Decoder
    from engine.models.model_config import ModelConfig
    from engine.serving.llm import LLM
    from engine.serving.sampling_params import SamplingParams

    geometry = ModelConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=context + steps + 16,
    )
    options: dict[str, Any] = {split: devices}
    llm = LLM(
        Decoder(geometry, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        page_size=32,
        max_running_requests=requests,
        chunked_prefill_size=max(requests, 128),
        context_length=context + steps + 16,
        **options,
    )
    rng = np.random.default_rng(0)
    for _ in range(requests):
        llm.add_request(rng.integers(0, 4096, context).tolist(), SamplingParams(max_new_tokens=steps + 8))
    while not all(request.output for request in (*llm.scheduler.waiting, *llm.scheduler.running)):
        llm.step()
    seconds, host_seconds = [], []
    for _ in range(steps):
        start, start_host = time.perf_counter(), time.thread_time()
        llm.step()
        seconds.append(time.perf_counter() - start)
        host_seconds.append(time.thread_time() - start_host)
    return {"step": median(seconds), "host": median(host_seconds), "bytes": llm.plan.device_bytes}


if __name__ == "__main__":
    leave(run_command(lambda: print(json.dumps(measure(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]))))))
