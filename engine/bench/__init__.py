"""Benchmarks, as commands: ``python -m engine.bench NAME``."""
