"""Writes down what a process has inherited: `python -m tests.tools.inherited FILE`."""

import ctypes
import json
import os
import sys
from pathlib import Path

_PR_GET_PDEATHSIG = 2  # linux/prctl.h


def main() -> None:
    """All of it, as JSON, whole when the file is there."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    open_ones = {}
    for name in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{name}"):
            open_ones[name] = os.readlink(f"/proc/self/fd/{name}")
    umask = os.umask(0)
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(dies_with := ctypes.c_int()))
    found = {
        "environment": dict(os.environ),
        "path": sys.path,
        "files": open_ones,
        "umask": umask,
        "blocked": status["SigBlk"].strip(),
        "ignored": status["SigIgn"].strip(),
        "groups": os.getgroups(),
        "session": os.getsid(0) == os.getpid(),
        "folder": os.getcwd(),
        "arguments": sys.argv[1:],
        "network": os.readlink("/proc/self/ns/net"),
        "limits": Path("/proc/self/limits").read_text(),
        "dies with its parent": dies_with.value,
    }
    path = Path(sys.argv[1])
    path.with_suffix(".new").write_text(json.dumps(found))
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    main()
