"""Runs a module of this project by name: `python -I knet/isolated.py MODULE ARGUMENT...`

`python -m MODULE` looks into the caller's folder first, and so runs the code of any user who may
write there.  `python -I -m MODULE` doesn't, but finds a checkout that was never installed no more.
So this file, which is started by its path, says where the modules lie: beside it, unless Python
looks there anyway.
"""

import os
import runpy
import sys
from pathlib import Path


def leave_callers_folder() -> None:
    """From now on this process takes no module from the folder in which it was started.

    For commands, before they load more than this.
    """
    ours = str(Path(__file__).resolve().parent.parent)
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        here = ""
    if here != ours:
        sys.path[:] = [place for place in sys.path if place not in ("", here)]


def main() -> None:
    """Goes on as `MODULE ARGUMENT...`."""
    here = str(Path(__file__).resolve().parent.parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
