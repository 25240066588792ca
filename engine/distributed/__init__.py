"""Many devices and many processes as one engine.

What the axes of a mesh mean, where a step's arrays lie over it, how processes join, and what they agree on before they
act. The room knows nothing of requests, pages or models: it places arrays, and agrees on JSON values.

    mesh          the axes data, context and tensor; ``make_mesh``; shardings over the axes that a mesh has
    placement     where a step's arrays lie: on one device, by replica, or whole on every device
    processes     joining jax's distributed runtime; ``SharedPlan``, which carries what process 0 decides
    agreement     decisions of process 0 in every process; checks that all processes did the same
    launch        ``python -m engine launch``: one command in several processes

Only the mesh is exported here. The modules of processes reach into internals of jax, so they are imported by name.
"""

from engine.distributed.mesh import (
    AXES,
    CONTEXT_AXIS,
    DATA_AXIS,
    TENSOR_AXIS,
    axis_size,
    make_mesh,
    placed,
    shard_over,
)

__all__ = ["AXES", "CONTEXT_AXIS", "DATA_AXIS", "TENSOR_AXIS", "axis_size", "make_mesh", "placed", "shard_over"]
