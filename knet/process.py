"""Processes that don't outlive the one that started them, even if that one is killed.

The kernel sends a signal of the child's choice when its parent dies (PR_SET_PDEATHSIG, prctl(2)).
Three things to know about it.  What happened before the call isn't told: a parent that died between
fork and prctl leaves a child that nothing would end, so the child looks afterwards whether its
parent is still the one.  "Parent" is the thread that forked: it must be one that stays.  And a
change of user or group takes the setting away, so it comes after that; Popen calls its preexec_fn
late enough.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)  # before the fork: loading in a child may meet a lock that is held


def die_with(parent: int) -> None:
    """Called in a child after fork: it gets SIGTERM when `parent`, the process it is of, dies.

    If that is gone already, this process ends here, with exit status 1.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(1)
