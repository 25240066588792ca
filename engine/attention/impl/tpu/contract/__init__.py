"""What the kernel and the code around it agree on.

    geometry    heads, dtypes and the sizes of blocks
    scratch     the memory that the kernel works with
    step_plan   a step as numbers in scalar memory

Nothing here runs a kernel or makes a step's work: ``kernel`` and ``schedule`` do.
"""
