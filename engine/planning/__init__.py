"""How much a pool may take, decided before anything is made: arithmetic on plain numbers.

This room never imports jax and never allocates.

    sizing          tokens of a pool from bytes of memory, and the refusal of a pool that does not fit
    page_demand     pages that requests take, over all groups of layers
    units           numbers as people read them
    host_memory     bytes that this process can still take on its machine
"""

from engine.planning.host_memory import require_host_memory
from engine.planning.page_demand import PageDemand
from engine.planning.sizing import PoolPlan, require_page_table, require_room, size_pool
from engine.planning.units import format_bytes

__all__ = [
    "PageDemand",
    "PoolPlan",
    "format_bytes",
    "require_host_memory",
    "require_page_table",
    "require_room",
    "size_pool",
]
