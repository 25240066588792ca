"""The exception family.

    EngineError
    ├── ConfigError            (ValueError)           a configuration or option is wrong
    │   └── CheckpointError                           a checkpoint is missing, incomplete or corrupt
    ├── ShapeError             (ValueError)           an array has the wrong shape, dtype or contents
    ├── RequestError           (ValueError)           a request can never be served as it was asked
    │   └── RequestTooLarge                           … because the whole pool is too small for it
    ├── KVPoolExhausted        (RuntimeError)         the pool has too few free tokens; retry after a free
    │   └── RequestTooLarge                           … and no free will ever help
    ├── DoubleFreeError        (RuntimeError)         what is being freed is not held
    ├── ConcurrentUse          (RuntimeError)         another thread is in a call, or this process is a fork
    ├── ProcessLost            (RuntimeError)         another process of this engine died or stopped answering
    ├── IntegrityError         (RuntimeError)         the books do not balance: a bug, never the caller's fault
    └── BackendUnsupported     (NotImplementedError)  this backend cannot, another might

A ``ValueError`` says that the caller is wrong; only ``BackendUnsupported`` makes ``impl="auto"`` fall back.
A message states what failed, the names, values and units, the rule, and the remedy. Whatever raises one of
these (but ``IntegrityError``) has changed nothing.
"""

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """Base class of everything this package raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A configuration value or option is wrong."""


class CheckpointError(ConfigError):
    """A checkpoint is missing, incomplete or corrupt."""


class ShapeError(EngineError, ValueError):
    """An array argument has the wrong shape, dtype or contents."""


class RequestError(EngineError, ValueError):
    """A request can never be served as it was asked."""


class KVPoolExhausted(EngineError, RuntimeError):
    """The pool has fewer free tokens than were asked for.

    Attributes:
        requested: tokens asked for, rounded up to whole pages.
        available: tokens that could have been had.
    """

    def __init__(self, message: str, *, requested: int, available: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class RequestTooLarge(RequestError, KVPoolExhausted):
    """A request needs more tokens than the whole pool has: refused at the door."""


class DoubleFreeError(EngineError, RuntimeError):
    """Slots were freed that their caller does not hold."""


class IntegrityError(EngineError, RuntimeError):
    """An invariant of the bookkeeping does not hold."""


class ConcurrentUse(EngineError, RuntimeError):
    """Books were used by two threads at once, or in a fork of the process that made them."""


class ProcessLost(EngineError, RuntimeError):
    """Another process of this engine died or stopped answering; this one cannot go on."""


class BackendUnsupported(EngineError, NotImplementedError):
    """This attention backend cannot do what was asked; another might."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a call that had answers already.

    Attributes:
        outputs: the answers so far, in the order of the prompts; what was not finished has the reason "abort".
    """

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs


def shown(value: object, most: int = 80) -> str:
    """A caller's value, or a file's, as a message shows it: one line of ``most`` characters or so, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 4 * most:
        return f"<a number of {value.bit_length()} bits>"
    try:
        text = repr(value).replace("\n", " ")
    except Exception:  # a caller's object may fail in any way
        return f"<a {type(value).__name__} that cannot be printed>"
    return text if len(text) <= most else f"{text[:most]}…"
