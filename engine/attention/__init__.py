"""Attention that reads and writes the fused, paged cache."""
