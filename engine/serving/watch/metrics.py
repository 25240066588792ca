"""What an engine does and holds, as one value: for embedders, for log lines and for the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.memory.offload.host_tier import HostTier
from engine.memory.pool_snapshot import PoolSnapshot, add_snapshots, snapshot_pool
from engine.memory.prefix.cache import RadixCache
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.watch.latency import LatencyMetrics
from engine.serving.watch.stats import EngineStats


@dataclass(frozen=True)
class PrefixCacheMetrics:
    """Counts since the engine was made; a request that is admitted again after a retraction is not counted again.

    Attributes:
        queried_tokens: known tokens of the requests that were admitted.
        hit_tokens: the part of ``queried_tokens`` whose pages were found on the device.
        evicted_pages: pages given up to make room.
    """

    queried_tokens: int
    hit_tokens: int
    evicted_pages: int


@dataclass(frozen=True)
class HostTierMetrics:
    """The host tier: what it holds, and what has happened since the engine was made.

    Attributes:
        held_bytes: bytes of the pages held now.
        capacity_bytes: most bytes that it may hold.
        queried_pages: pages looked up when requests were admitted.
        loaded_pages: pages brought back to the device.
        stored_pages: pages taken in.
        evicted_pages: pages dropped to keep the budget.
        rejected_pages: pages dropped because their checksum did not match.
    """

    held_bytes: int
    capacity_bytes: int
    queried_pages: int
    loaded_pages: int
    stored_pages: int
    evicted_pages: int
    rejected_pages: int


@dataclass(frozen=True)
class RequestMemory:
    """One running request's part of the pool.

    Attributes:
        request_id: the request.
        tokens: tokens with a slot.
        pages: pages that hold them, shared ones included.
        locked_pages: cached pages that the request keeps from eviction.
        replica: index of the replica that runs it.
    """

    request_id: int
    tokens: int
    pages: int
    locked_pages: int
    replica: int = 0


@dataclass(frozen=True)
class EngineMetrics:
    """An engine at one moment. Counts start when the engine is made and never decrease.

    Attributes:
        pool: the state of every page, for all replicas together.
        running: requests that hold pages.
        waiting: requests without pages: not admitted yet, or retracted.
        retractions: how often a running request lost its pages and was queued again.
        prefix_cache: None where it is disabled.
        host_tier: None where there is none.
        requests: the running requests' parts of the pool.
        prompt_tokens: tokens fed by prefill.
        generation_tokens: tokens fed by decode, one per sequence and step.
        steps: steps run.
        finished: number of answers by finish reason.
        latency: how long requests and steps took, as histograms.
        kv_token_bytes: bytes of a token in all layers, scales and padding included, by the name of the pool's dtype.
    """

    pool: PoolSnapshot
    running: int
    waiting: int
    retractions: int
    prefix_cache: PrefixCacheMetrics | None
    host_tier: HostTierMetrics | None
    requests: tuple[RequestMemory, ...]
    prompt_tokens: int
    generation_tokens: int
    steps: int
    finished: Mapping[str, int]
    latency: LatencyMetrics
    kv_token_bytes: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for a log."""
        pool = self.pool
        parts = [
            f"Running: {self.running} reqs, Waiting: {self.waiting} reqs, KV cache usage: {pool.usage:.1%}",
            f"pages: {pool.free_pages:,} free in {pool.free_runs:,} runs, {pool.private_pages:,} held, "
            f"{pool.locked_pages:,} cached and locked, {pool.evictable_pages:,} cached of {pool.total_pages:,}",
            f"tail waste: {pool.tail_waste_tokens:,} tokens, retractions: {self.retractions:,}",
        ]
        if self.prefix_cache:
            queried, hit = self.prefix_cache.queried_tokens, self.prefix_cache.hit_tokens
            parts.append(f"prefix cache: {hit:,} of {queried:,} tokens hit")
        if self.host_tier:
            held, most = self.host_tier.held_bytes, self.host_tier.capacity_bytes
            parts.append(f"host tier: {held / 2**20:,.1f} of {most / 2**20:,.1f} MiB")
        return "; ".join(parts)


def collect_metrics(
    scheduler: Scheduler, stats: EngineStats, kv_token_bytes: Mapping[str, int] | None = None
) -> EngineMetrics:
    """Reads everything; raises IntegrityError where the parts of the pool do not add up.

    Args:
        scheduler: the replicas and their books.
        stats: what has been counted.
        kv_token_bytes: as in ``EngineMetrics``.
    """
    replicas = scheduler.replicas
    pools = [snapshot_pool(replica.cache) for replica in replicas]
    return EngineMetrics(
        pool=pools[0] if len(pools) == 1 else add_snapshots(pools),
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        retractions=scheduler.retractions,
        prefix_cache=_prefix_cache([replica.cache.prefix for replica in replicas if replica.cache.shares_prefixes]),
        host_tier=_host_tier(replicas[0].cache.host_tier),  # the replicas share one
        requests=tuple(
            request
            for index, (replica, pool) in enumerate(zip(replicas, pools, strict=True))
            for request in _requests(replica, pool, index)
        ),
        prompt_tokens=stats.prefill_tokens,
        generation_tokens=stats.decode_tokens,
        steps=stats.steps,
        finished=dict(stats.finished),
        latency=stats.latency.snapshot(),
        kv_token_bytes=kv_token_bytes or {},
    )


def _requests(scheduler: Replica, pool: PoolSnapshot, replica: int) -> list[RequestMemory]:
    of_row = {request.req_pool_idx: request.request_id for request in scheduler.running}
    return [
        RequestMemory(of_row[row.row], row.tokens, row.pages, row.locked_pages, replica)
        for row in pool.rows
        if row.row in of_row
    ]


def _prefix_cache(caches: list[RadixCache]) -> PrefixCacheMetrics | None:
    if not caches:
        return None
    return PrefixCacheMetrics(
        queried_tokens=sum(cache.query_tokens for cache in caches),
        hit_tokens=sum(cache.hit_tokens for cache in caches),
        evicted_pages=sum(cache.evicted_pages for cache in caches),
    )


def _host_tier(tier: HostTier | None) -> HostTierMetrics | None:
    if tier is None:
        return None
    counters = tier.counters
    return HostTierMetrics(
        held_bytes=tier.held_bytes,
        capacity_bytes=tier.capacity_bytes,
        queried_pages=counters.queried_pages,
        loaded_pages=counters.loaded_pages,
        stored_pages=counters.stored_pages,
        evicted_pages=counters.evicted_pages,
        rejected_pages=counters.rejected_pages,
    )
