"""What an engine does, counted and exported. The room reads every other one and changes none.

stats            running totals that the stepper counts
metrics          ``EngineMetrics``: what the engine does and holds at one moment
board            the last snapshot, for readers in other threads
exporter         metrics over HTTP for Prometheus
bounded_server   the HTTP server under it: no client can hold it up
"""
