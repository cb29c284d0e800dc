"""`krelay` and `python -m krelay`."""

import sys

from krelay.cli import main

if __name__ == "__main__":
    sys.exit(main())
