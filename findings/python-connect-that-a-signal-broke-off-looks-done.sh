#!/usr/bin/env bash
#
# Python 3.11 (3.11.7; 3.12.1 and 3.13.0 alike): socket.connect() to a Unix socket that a signal breaks off returns as if it were connected.
#
# Guess: since PEP 475 a call that a signal breaks off is made again, so that a connect() that returns has connected.
# Seen: where the listener's queue is full, connect() of a blocking Unix socket waits in the kernel; it waits for a time limit
# only by SO_SNDTIMEO, since a time-out of Python's makes it fail at once (EAGAIN).  A signal whose handler returns breaks it off
# (EINTR), and nothing is under way then: unlike TCP's, the kernel's call has to be made again.  Python polls for writing instead,
# reads SO_ERROR (0), and returns.  The socket isn't connected: getpeername() and send() say ENOTCONN.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/broken.py" <<'PYTHON'
import errno
import platform
import signal
import socket
import struct
import sys

path = sys.argv[1]
heard = []
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(0)
waiting = socket.socket(socket.AF_UNIX)
waiting.connect(path)  # the one place there is

late = socket.socket(socket.AF_UNIX)
late.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 20, 0))
signal.signal(signal.SIGALRM, lambda *_: heard.append("SIGALRM"))
signal.setitimer(signal.ITIMER_REAL, 0.3)
late.connect(path)
try:
    late.getpeername()
    state = "connected"
except OSError as error:
    state = errno.errorcode[error.errno]
print(f"Python {platform.python_version()}: connect() returned after {heard}; getpeername(): {state}")
assert heard == ["SIGALRM"]
assert state == "ENOTCONN"

listener.accept()[0].close()  # a place comes free: the same call, made again, succeeds
late.connect(path)
late.getpeername()
print("made again it connects")
PYTHON
timeout 60 python3 "$work/broken.py" "$work/socket"
