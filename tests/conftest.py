"""Shared test setup: the suite runs on the CPU backend, with eight virtual devices where a test asks for a mesh."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nothing of a test stays in the user's cache

from hypothesis import HealthCheck, settings

# Compiling jax programs inside an example breaks hypothesis's per-example clock; the suite has its own timeout.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
settings.load_profile("default")
