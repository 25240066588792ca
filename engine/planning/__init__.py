"""How much a pool may take, decided before anything is allocated; arithmetic on plain numbers, free of jax.

sizing         tokens of a pool from bytes of memory, and the refusal of a pool that does not fit
host_memory    bytes that this process can still take on its machine
"""
