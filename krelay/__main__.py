"""`krelay` and `python -m krelay`."""

import sys


def main() -> int:
    """Runs what the command line says; the exit status."""
    try:
        from knet import isolated

        isolated.leave_callers_folder()  # before more is loaded
        from knet import children
        from krelay.cli import main

        children.prepare()
    except KeyboardInterrupt:  # Ctrl-C while still loading
        return 130
    return main.main()


if __name__ == "__main__":
    sys.exit(main())
