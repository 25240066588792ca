"""Ragged paged flash attention on TPU: ``kernel``, and all that is around it; see ``docs/tpu-kernel.md``."""
