"""What ``python -m engine.bench gpu`` runs on one GPU: sections of small tasks, done by worker processes.

A task is a dict of plain values, so that it can be handed to another process and written down with its result. Each
section is a module with ``tasks``, which lists them, ``prepare``, which compiles one and returns what runs it, and
``line``, which tells one result. A kernel that never ends, or breaks the device for its process, costs its own task.
"""
