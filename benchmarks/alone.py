"""What relaying costs in processor time: meanwhile the relay host has a core to itself.

The kernel deals with packets on the core where they come in, and with veth that is the core of
whoever sends them.  So a relay's work is booked on its neighbours, and theirs on the relay; what a
relay costs that is all kernel can't be seen in any process.  Here each host's packets are dealt
with on a core that we choose (receive packet steering, RPS): those of the relay host on one, where
its programs are kept too, those of all other hosts on another, with their programs and this
process.  The time that the first isn't idle is then what the relay costs, in the kernel and outside
it, and whatever else is on the machine: there should be nothing.

/proc/stat books a busy core by samples, but an idle one exactly, where idle cores stop their tick
(NO_HZ).  So it is the idle time that is read.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import ground, processes
from krelay_vm import Lab

Meter = Callable[[], float]
"""Seconds that the relay's core has been busy, since some time in the past."""

_RPS = Path("/sys/class/net/lo/queues/rx-0/rps_cpus")
_STEER = """\
mount -t sysfs sysfs /sys || exit
for queue in /sys/class/net/eth*/queues/rx-*/rps_cpus; do echo "$1" >"$queue" || exit; done
"""
"""A host's sysfs shows its interfaces only where it was mounted in its network."""


def impossible() -> str:
    """Why the relay host can't have a core to itself on this machine; empty if it can."""
    if ground.cores()[1] < 0:
        return "this machine has just one core"
    return "" if _RPS.exists() else "this kernel has no receive packet steering (CONFIG_RPS)"


@contextmanager
def relay_alone(lab: Lab) -> Iterator[Meter]:
    """Gives the relay host a core to itself, until the block ends; yields the meter of that core.

    What runs in the lab is moved, and what is started meanwhile stays off that core.  Only for
    machines where `impossible` says nothing.
    """
    rest, relay = ground.cores()
    usable, moved = os.sched_getaffinity(0), dict[int, set[int]]()
    try:
        for host in lab.topology.names:
            _steer(lab, host, _mask(relay if host == "relay" else rest))
        os.sched_setaffinity(0, {rest})
        for program in lab.programs:
            core = relay if program.host == "relay" else rest
            for thread in processes.threads([program]):
                with suppress(ProcessLookupError):  # it has just ended
                    moved[thread] = os.sched_getaffinity(thread)
                    os.sched_setaffinity(thread, {core})
        yield lambda: time.monotonic() - processes.cores()[f"cpu{relay}"].idle
    finally:
        for thread, before in moved.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, before)
        os.sched_setaffinity(0, usable)
        for host in lab.topology.names:
            _steer(lab, host, "0")


def _steer(lab: Lab, host: str, mask: str) -> None:
    lab.run(host, "unshare", "--mount", "sh", "-c", _STEER, "sh", mask)


def _mask(core: int) -> str:
    """The core as the kernel reads bitmaps: hexadecimal, with a comma before every 32nd bit.

    >>> _mask(1), _mask(33)
    ('2', '2,00000000')
    """
    return f"{1 << core % 32:x}" + ",00000000" * (core // 32)
