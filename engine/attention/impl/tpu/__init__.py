"""Ragged paged flash attention on TPU: the ``kernel``, and what prepares its calls (docs/tpu-kernel.md)."""
