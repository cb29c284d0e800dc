"""Runs a module of this project by name: `python -I krelay/isolated.py MODULE ARGUMENT...`

`python -m MODULE` looks into the caller's folder first, and whoever may write there has his code
run.  `python -I -m MODULE` doesn't, but finds a checkout that was never installed no more.  So this
file, which is started by its path, says where the modules lie: beside it, unless Python looks there
anyway.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Goes on as `MODULE ARGUMENT...`."""
    here = str(Path(__file__).resolve().parent.parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
