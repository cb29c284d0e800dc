#!/usr/bin/env bash
#
# pyroute2 0.9.7, Python 3.11.7: an IPRoute() that fails for want of a descriptor keeps three or four open.
#
# Guess: a constructor that raises has closed what it opened, or reference counting closes it when the exception goes.
# Seen: socket, epoll and a socket pair of the event loop inside stay open in a reference cycle until the cyclic collector
# runs.  With the collector off (as long-running programs do it for its pauses) each try makes the shortage worse by as many,
# so that a program which tries again will never have a descriptor again.  A call of gc.collect() after the failure closes
# them.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install pyroute2==0.9.7
"$work/venv/bin/python" - <<'PYTHON'
import gc
import os
import resource
import sys

from pyroute2 import IPRoute

TRIES = 10
IPRoute().close()  # what the first one loads or keeps is no matter here
gc.collect()
gc.disable()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
before = descriptors()
failed = 0
for _ in range(TRIES):
    lowest = os.open("/dev/null", os.O_RDONLY)  # the number that the next descriptor would get
    os.close(lowest)
    # Each try finds the same room: enough to begin with, too little to end.
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 4, hard))
    try:
        IPRoute().close()
    except OSError:
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
kept = descriptors() - before
gc.collect()
left = descriptors() - before
print(f"{failed} of {TRIES} IPRoute() failed: {kept} descriptors more; after gc.collect(): {left}")
sys.exit(not (failed == TRIES and kept >= 3 * TRIES and left == 0))
PYTHON
