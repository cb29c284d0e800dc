"""A run of tests in parts: each part has a network, and a /run, of its own.

So labs of one part are no traces that another has left on the host, names and locks don't meet, and
what a test does to "the host" is seen by its own part alone.
"""

import ctypes
import os
import subprocess
from contextlib import suppress
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # linux/sched.h
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18  # linux/mount.h


def enter() -> None:
    """Moves this thread, and what it starts from now on, there; without root it stays.

    Raises OSError if a mount fails that must not.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(kind: str, at: str, flags: int = 0, data: str = "") -> None:
        if libc.mount(b"none", at.encode(), kind.encode(), flags, data.encode()):
            code = ctypes.get_errno()
            raise OSError(code, f"can't mount {kind or 'anew'} at {at}: {os.strerror(code)}")

    if os.geteuid() != 0 or libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET):
        return
    mount("", "/", _MS_REC | _MS_PRIVATE)
    mount("tmpfs", "/run", data="mode=755")
    for folder in ("lock", "user"):
        Path("/run", folder).mkdir()
    # It shows the links of the network that it was mounted in.
    with suppress(OSError):
        mount("sysfs", "/sys")
        mount("cgroup2", "/sys/fs/cgroup")
    subprocess.run(("ip", "link", "set", "lo", "up"), check=True)
