"""`krelay` and `python -m krelay`."""

import sys

try:
    from krelay.cli import main
except KeyboardInterrupt:  # Ctrl-C while still loading
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
