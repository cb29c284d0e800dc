"""A process and the one that started it: it ends with that one, and says when it serves.

A child doesn't outlive its parent, even if that is killed: the kernel sends a signal of the child's
choice when the parent dies (PR_SET_PDEATHSIG, prctl(2)).  Three things to know about it.  What
happened before the call isn't told: a parent that died between fork and prctl leaves a child that
nothing would end, so the child looks afterwards whether its parent is still the one.  "Parent" is
the thread that forked: it must be one that stays.  And a change of user or group takes the setting
away, so it comes after that; Popen calls its preexec_fn late enough.
"""

import ctypes
import os
import signal
import socket

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)  # before the fork: loading in a child may meet a lock that is held


def die_with(parent: int) -> None:
    """Called in a child after fork: it gets SIGTERM when `parent`, the process it is of, dies.

    If that is gone already, this process ends here, with exit status 1.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(1)


def tell_ready() -> str | None:
    """Tells the service manager that this process serves (sd_notify(3)); what went wrong, or None.

    Sends READY=1 if NOTIFY_SOCKET asks for it.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return None
    try:
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.sendto(b"READY=1", address.replace("@", "\0", 1))
    except OSError as error:
        return error.strerror or str(error)
    return None
