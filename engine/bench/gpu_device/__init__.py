"""What ``python -m engine.bench gpu`` runs on one GPU: sections of small tasks, done by worker processes.

A task is a dict of plain values, so that it can be sent to another process and saved with its result. Each section is a
module with ``tasks``, which lists its tasks, ``prepare``, which compiles one and returns the function that runs it, and
``line``, which formats one result. A kernel that never ends, or breaks the device for its process, costs only its task.
"""
