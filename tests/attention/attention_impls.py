"""The implementations that this machine can run."""

import pytest

from engine.native import library

needs_native = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")
NATIVE = pytest.param("cpu", marks=needs_native)
FAST = ["xla", NATIVE]
ALL = ["reference", *FAST]
