"""Ragged paged attention on a Hopper GPU: the ``kernel``, and what prepares its calls (docs/gpu-attention.md)."""
