"""Ragged paged attention on a Hopper GPU: the kernel, and what prepares its calls (docs/gpu-attention.md).

Nothing here allocates a page or chooses another implementation: what the kernels cannot take is refused.

    gpu_entry   whether a call is lowered for a Hopper GPU and the kernels take it
    gpu_step    writes the new tokens, cuts the step into work, calls the kernels
    cut_work    the work of a step, made in XLA
    work        the same as the kernels read it
    kernel/     what runs on a streaming multiprocessor
"""
