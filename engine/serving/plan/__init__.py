"""Which requests run in a step, and how many tokens of each; never imports jax.

The room decides and books. It never sees a buffer and never waits for a device: a step is a plan, with the page moves
that the device makes before it.

    scheduler      Scheduler: plans and books a step of every replica; admits requests to replicas
    replica        Replica: one replica's running requests, its part of each step, and what becomes of it
    prefix_waits   requests that begin alike: one computes, the others wait for it
    queue          RequestQueue: the requests that wait, for all replicas
    step           ScheduledStep and ReplicaStep: a step as it is decided
    token_times    TokenTimes: when each row got its last token, for metrics
"""

from engine.serving.plan.queue import RequestQueue
from engine.serving.plan.replica import Replica
from engine.serving.plan.scheduler import Scheduler
from engine.serving.plan.step import ReplicaStep, ScheduledStep

__all__ = ["Replica", "ReplicaStep", "RequestQueue", "ScheduledStep", "Scheduler"]
