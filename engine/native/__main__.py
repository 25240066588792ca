"""``python -m engine.native``: builds the native CPU kernels ahead of their first use."""

from __future__ import annotations

import sys

from engine.terminal import FAILED, leave, loading, run_command


def main() -> int:
    """Builds and loads the library and prints its path; returns the exit code, 1 where that fails."""
    with loading():
        from engine.errors import BackendUnsupported
        from engine.native.compiler import build_library
        from engine.native.library import register

    try:
        register()
    except BackendUnsupported as error:
        print(f"native CPU kernels: {error}", file=sys.stderr)
        return FAILED
    print(build_library())
    return 0


if __name__ == "__main__":
    leave(run_command(main))
