"""``python -m engine``, and the installed command."""

from engine.terminal import leave, loading


def main() -> None:
    """Runs the command line; Ctrl-C ends it in one line from here on, while it still loads."""
    with loading():
        from engine.cli import main as run
    leave(run())


if __name__ == "__main__":
    main()
