"""The kernels themselves: what runs on a streaming multiprocessor. Imports nothing around them."""
