"""Compiles the GPU kernels ahead of time without a GPU, and reads the machine code."""
