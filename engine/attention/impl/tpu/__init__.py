"""Ragged paged flash attention on TPU: the kernel, and what prepares its calls (docs/tpu-kernel.md).

Nothing here allocates a page or chooses another implementation: what the kernel cannot take is refused.

    tpu_entry     whether a call is lowered for a TPU that the kernel knows
    tpu_step      lays a step out for the kernel, calls it, gathers its results
    schedule      the work of a step, made in XLA
    block_sizes   from the overrides that a tuner wrote, else by a formula over the target's VMEM
    contract/     what the kernel and the code around it agree on
    kernel/       what Pallas compiles
"""
