"""Commands that are typed while krelay is only just being started wait for it.

    krelay up --real-ip 192.168.0.1 &
    krelay status

The second line is there long before the first has made its file tree.  So where nobody answers a
command looks whether a krelay for this tree is among the processes of this host, and waits as long
as that is so; a command where there is none is told at once.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from knet.roles import ADMIN
from krelay.control import client
from krelay.host import processes, treelock

T = TypeVar("T")

WITHIN = 15.0
"""Seconds; a slow machine takes one or two."""
GRACE = 0.5
"""Seconds that a process may take until it is seen to be krelay's."""
STARTS = ("daemon", "up")
_PAUSE = 0.02


def answered(root: Path, ask: Callable[[], T]) -> T:
    """What `ask` gives, which is tried again while it finds nobody, but a krelay is being started.

    Raises what it raises.
    """
    begun = time.monotonic()
    while True:
        try:
            return ask()
        except client.NoPermission:
            raise
        except client.NoDaemon:
            if not _may_come(root, begun):
                raise
        time.sleep(_PAUSE)


def wait(root: Path) -> None:
    """Returns when a krelay serves this tree, or none is being started."""
    begun = time.monotonic()
    while not is_served(root) and _may_come(root, begun):
        time.sleep(_PAUSE)


def is_served(root: Path) -> bool:
    """Whether the tree is there, with a krelay at work and its sockets."""
    return treelock.is_served(root) and (root / ADMIN.socket).exists()


def is_starting(root: Path) -> bool:
    """Whether a process is there that is to serve this tree, or does."""
    return any(
        ours.name == processes.KRELAY and ours.arguments[:1] and ours.arguments[0] in STARTS
        for ours in processes.running(root)
    )


def _may_come(root: Path, begun: float) -> bool:
    waited = time.monotonic() - begun
    return waited <= GRACE or (waited <= WITHIN and is_starting(root))
