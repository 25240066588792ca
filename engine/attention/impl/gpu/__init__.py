"""The GPU backend: Pallas kernels for Hopper (docs/gpu-attention.md)."""
