"""What an engine does, counted and exported.

This room reads every other one and changes none.

    stats            running totals that the stepper counts
    histogram        counts of values by fixed bounds
    latency          how long requests and steps take: LatencyMetrics, and the Latencies that measure it
    metrics          EngineMetrics: what the engine does and holds at one moment
    live_pages       every page of the pool at one moment, for the page that shows them
    board            the last snapshot, for readers in other threads
    exporter         metrics over HTTP for Prometheus
    bounded_server   the HTTP server under it: no client can hold it up
"""

from engine.serving.watch.board import SnapshotBoard
from engine.serving.watch.exporter import serve_metrics
from engine.serving.watch.metrics import EngineMetrics, collect_metrics
from engine.serving.watch.stats import EngineStats

__all__ = ["EngineMetrics", "EngineStats", "SnapshotBoard", "collect_metrics", "serve_metrics"]
