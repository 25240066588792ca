"""The device half of serving: what a step sends to the device, and what runs there.

The room never decides which request runs, and never waits for a step.

    batcher          fills a parcel from a scheduled step; free of jax
    parcel           the one array that a step sends, its fields and its static shapes
    runner           compiles a program for each static shape, and runs steps and page copies
    page_mover       makes the page moves of a plan, in their order
    sampler          chooses the next token of every row
    adjuster         runs what requests need that adjust their logits
    adjustments      how logits are adjusted, and what the device keeps of a row for it
    row_entries      what the device must know of such a request; free of jax
    compiling        how programs are lowered before their arguments are there
    device_rows      page table and last tokens, which the device keeps from step to step
    layer_attention  how and in which buffer each layer of a model attends
    device_memory    bytes that the devices of all processes have and use

Nothing is exported here, so that the batcher loads without jax.
"""
