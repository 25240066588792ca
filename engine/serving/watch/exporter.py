"""Serves an engine's metrics over HTTP for Prometheus; reads a snapshot when it is scraped, and never in between.

Where vLLM exports a figure its name is kept, under another prefix: hence "preemptions" for what is called a retraction
everywhere else. Hits and queries are counters of tokens, of which the reader takes the rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.serving.watch.bounded_server import BoundedServer
from engine.serving.watch.histogram import HistogramSnapshot
from engine.serving.watch.metrics import EngineMetrics

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "engine_"
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token",
    "inter_token_latency_seconds": "From a token to the next of the same request",
    "e2e_request_latency_seconds": "From a request's arrival to the end of its complete answer",
    "request_queue_time_seconds": "From a request's arrival until it first had pages",
    "request_prefill_time_seconds": "From the first pages of a request to its first token",
    "request_decode_time_seconds": "From the first token of a complete answer to its last",
    "request_time_per_output_token_seconds": "Mean time between the tokens of a complete answer",
    "request_prompt_tokens": "Tokens of the prompts of complete answers",
    "request_generation_tokens": "Tokens of complete answers",
    "iteration_tokens_total": "Tokens fed by a step",
    "step_time_seconds": "Time of a step",
}


class EngineCollector:
    """A collector in the sense of prometheus_client.

    Args:
        read: returns a snapshot; called by the scraping thread.
    """

    def __init__(self, read: Callable[[], EngineMetrics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Every metric of one snapshot."""
        metrics = self._read()
        yield from _pool(metrics)
        yield from _traffic(metrics)
        yield from _latency(metrics)
        yield from _prefix_cache(metrics)
        yield from _host_tier(metrics)


@contextmanager
def serve_metrics(read: Callable[[], EngineMetrics], port: int, address: str = "127.0.0.1") -> Iterator[int]:
    """Runs a thread that answers scrapes while the context lasts; see ``BoundedServer`` for its bounds.

    Args:
        read: returns a snapshot.
        port: TCP port to listen on; 0 takes a free one.
        address: address of this machine to listen on.

    Yields:
        The port.

    Raises:
        ConfigError: prometheus-client is not installed, or the port cannot be used.
    """
    try:
        from prometheus_client import CollectorRegistry, make_wsgi_app
    except ImportError as error:
        raise ConfigError("metrics need prometheus-client; install it, or this package with [metrics]") from error
    registry = CollectorRegistry()
    registry.register(EngineCollector(read))
    try:
        server = BoundedServer(address, port, make_wsgi_app(registry))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve metrics on {address}:{port}: {error}; name a free port") from error
    with server.running():
        yield server.server_port


def _pool(metrics: EngineMetrics) -> Iterator[Metric]:
    pool = metrics.pool
    yield _gauge("kv_cache_usage_perc", "Fraction of the pool that cannot be allocated now, 0 to 1", pool.usage)
    states = {
        "free": pool.free_pages,
        "held": pool.private_pages,
        "cached_locked": pool.locked_pages,
        "cached_evictable": pool.evictable_pages,
    }
    yield _gauge("kv_pages", "Pages by state; all states together are the pool", states, label="state")
    yield _gauge("kv_pages_total_size", "Pages of the pool", pool.total_pages)
    if metrics.kv_token_bytes:
        text = "Bytes of a token in all layers, scales and padding included, by dtype of the pool"
        yield _gauge("kv_token_bytes", text, dict(metrics.kv_token_bytes), label="dtype")
    yield _gauge("kv_page_size_tokens", "Tokens per page", pool.page_size)
    yield _gauge("kv_tail_waste_tokens", "Slots of last pages that hold no token yet", pool.tail_waste_tokens)
    yield _gauge("kv_free_runs", "Runs of consecutive free pages", pool.free_runs)
    yield _gauge("kv_largest_free_run_pages", "Pages in the longest run of free pages", pool.largest_free_run_pages)
    if pool.replicas:
        usage = {str(index): replica.usage for index, replica in enumerate(pool.replicas)}
        yield _gauge(
            "kv_cache_replica_usage_perc",
            "The same fraction by replica",
            usage,
            label="replica",
        )
    locking = sum(request.locked_pages > 0 for request in metrics.requests)
    yield _gauge("num_requests_locking", "Running requests that keep cached pages from eviction", locking)


def _traffic(metrics: EngineMetrics) -> Iterator[Metric]:
    yield _gauge("num_requests_running", "Requests that hold pages", metrics.running)
    if metrics.pool.replicas:
        running = Counter(str(request.replica) for request in metrics.requests)
        by_replica = {str(index): running[str(index)] for index in range(len(metrics.pool.replicas))}
        yield _gauge("num_requests_replica_running", "The same by replica", by_replica, label="replica")
    yield _gauge("num_requests_waiting", "Requests that wait for pages or a slot", metrics.waiting)
    yield _counter("num_preemptions", "Retractions: a running request lost its pages", metrics.retractions)
    yield _counter("prompt_tokens", "Tokens fed by prefill", metrics.prompt_tokens)
    yield _counter("generation_tokens", "Tokens fed by decode", metrics.generation_tokens)
    yield _counter("steps", "Steps run", metrics.steps)
    yield _counter("request_success", "Answers by finish reason", metrics.finished, label="finished_reason")


def _latency(metrics: EngineMetrics) -> Iterator[Metric]:
    for each in fields(metrics.latency):
        yield _histogram(each.name, HISTOGRAMS[each.name], getattr(metrics.latency, each.name))


def _prefix_cache(metrics: EngineMetrics) -> Iterator[Metric]:
    if metrics.prefix_cache:
        prefix = metrics.prefix_cache
        yield _counter("prefix_cache_queries", "Known tokens of admitted requests", prefix.queried_tokens)
        yield _counter("prefix_cache_hits", "Known tokens of admitted requests found on the device", prefix.hit_tokens)
        yield _counter("prefix_cache_evicted_pages", "Cached pages given up to make room", prefix.evicted_pages)


def _host_tier(metrics: EngineMetrics) -> Iterator[Metric]:
    if metrics.host_tier:
        tier = metrics.host_tier
        yield _gauge("host_tier_bytes", "Bytes of the pages held by the host tier", tier.held_bytes)
        yield _gauge("host_tier_capacity_bytes", "Most bytes that the host tier may hold", tier.capacity_bytes)
        yield _counter("host_tier_queried_pages", "Pages looked up when requests were admitted", tier.queried_pages)
        yield _counter("host_tier_loaded_pages", "Pages brought back to the device", tier.loaded_pages)
        yield _counter("host_tier_stored_pages", "Pages taken in", tier.stored_pages)
        yield _counter("host_tier_evicted_pages", "Pages dropped to keep the budget", tier.evicted_pages)
        yield _counter("host_tier_rejected_pages", "Pages dropped for a wrong checksum", tier.rejected_pages)


def _gauge(name: str, text: str, value: Any, *, label: str | None = None) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=[label] if label else []), value)


def _counter(name: str, text: str, value: Any, *, label: str | None = None) -> Metric:
    """A counter; the library adds ``_total`` to its name."""
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(PREFIX + name, text, labels=[label] if label else []), value)


def _histogram(name: str, text: str, value: HistogramSnapshot) -> Metric:
    """A histogram; its buckets contain those below them, as Prometheus wants it."""
    from prometheus_client.core import HistogramMetricFamily
    from prometheus_client.utils import floatToGoString

    upper = map(floatToGoString, (*value.bounds, math.inf))
    family = HistogramMetricFamily(PREFIX + name, text)
    family.add_metric([], list(zip(upper, accumulate(value.counts), strict=True)), value.sum)
    return family


def _filled(family: Any, value: Any) -> Metric:
    for key, number in value.items() if isinstance(value, dict) else [(None, value)]:
        family.add_metric([] if key is None else [key], number)
    filled: Metric = family
    return filled
