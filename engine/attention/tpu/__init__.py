"""Ragged paged flash attention on TPU: ``kernel`` is the whole, ``docs/tpu-kernel.md`` the way there."""
