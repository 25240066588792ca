"""The exception family.

    EngineError
    ├── ConfigError            (ValueError)           a configuration or option is wrong
    │   └── CheckpointError                           a checkpoint is missing, incomplete or corrupt
    ├── ShapeError             (ValueError)           an array has the wrong shape, dtype or contents
    ├── RequestError           (ValueError)           a request can never be served as it was asked
    │   ├── PromptTooLong                             … because its prompt fills the context
    │   └── RequestTooLarge                           … because the whole pool is too small for it
    ├── KVPoolExhausted        (RuntimeError)         the pool has too few free tokens; retry after a free
    │   └── RequestTooLarge                           … and no free will ever help
    ├── QueueFull              (RuntimeError)         as many requests wait as may; retry later
    ├── DoubleFreeError        (RuntimeError)         slots or pages are freed that are not held
    ├── ConcurrentUse          (RuntimeError)         another thread is in a call, or this process is a fork
    ├── ProcessLost            (RuntimeError)         another process of this engine died or stopped answering
    ├── IntegrityError         (RuntimeError)         the books do not balance: a bug, never the caller's fault
    └── BackendUnsupported     (NotImplementedError)  this backend cannot, another might

A ``ValueError`` says that the caller is wrong; only ``BackendUnsupported`` makes ``impl="auto"`` fall back.
A message states what failed, the names, values and units, the rule, and the remedy. A call that raises one of
these, other than ``IntegrityError``, has changed nothing.
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


class PromptTooLong(RequestError):
    """A prompt leaves no room for an answer in the context."""


class KVPoolExhausted(EngineError, RuntimeError):
    """The pool has fewer free tokens than were asked for.

    Attributes:
        requested: tokens asked for, rounded up to whole pages.
        available: tokens that could have been allocated.
    """

    def __init__(self, message: str, *, requested: int, available: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class RequestTooLarge(RequestError, KVPoolExhausted):
    """A request needs more tokens than the whole pool has; it is refused before it is queued."""


class QueueFull(EngineError, RuntimeError):
    """As many requests wait as may; later there may be room.

    Attributes:
        retry_after: seconds after which it is worth another try.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DoubleFreeError(EngineError, RuntimeError):
    """Slots or pages were freed that the caller does not hold."""


class IntegrityError(EngineError, RuntimeError):
    """An invariant of the bookkeeping does not hold."""


class ConcurrentUse(EngineError, RuntimeError):
    """An object was used by two threads at once, or in a fork of the process that made it."""


class ProcessLost(EngineError, RuntimeError):
    """Another process of this engine died or stopped answering; this one cannot continue."""


class BackendUnsupported(EngineError, NotImplementedError):
    """This attention backend cannot do what was asked; another might."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a call that had answers already.

    Attributes:
        outputs: the answers so far, in the order of the prompts; an unfinished answer has the reason "abort".
    """

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs


def shown(value: object, most: int = 80) -> str:
    """A value from a caller or a file as text for a message: one line of about ``most`` characters, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 4 * most:
        return f"<a number of {value.bit_length()} bits>"
    try:
        text = repr(value).replace("\n", " ")
    except Exception:  # a caller's object may fail in any way
        return f"<a {type(value).__name__} that cannot be printed>"
    return text if len(text) <= most else f"{text[:most]}…"
