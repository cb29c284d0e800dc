#!/usr/bin/env bash
#
# Linux (seen on 6.18.44): while a dump is half read, another dump on that netlink socket fails with EBUSY, single requests don't.
#
# Guess: a socket takes one request after the other, in order; or all wait until the dump has been read; or none is taken.
# Seen: the second dump is answered at once by an error message (EBUSY, in band) that arrives amid the parts of the first, which
# then goes on and ends as if nothing had been; a single request (RTM_GETLINK for one link) is answered amid them, too.  So a
# reader that leaves a dump early, as on an exception, finds its next dump refused only if there are many links, and a reader that
# looks at message types alone takes that error for the first dump's.  Sequence numbers tell them apart.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/dumps.py" <<'PYTHON'
import errno
import os
import socket
import struct
import sys

RTM_GETLINK, RTM_NEWLINK, NLMSG_ERROR, NLMSG_DONE = 18, 16, 2, 3
REQUEST, ACK, DUMP = 1, 4, 0x300
LOOPBACK = 1

netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
netlink.bind((0, 0))
netlink.settimeout(1)


def ask(number: int, flags: int, index: int = 0) -> None:
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    netlink.send(struct.pack("=IHHII", 16 + len(body), RTM_GETLINK, REQUEST | flags, number, 0) + body)


def messages(data: bytes):
    while data:
        length, kind, _, number, _ = struct.unpack_from("=IHHII", data)
        if kind == NLMSG_ERROR:
            code = -struct.unpack_from("=i", data, 16)[0]
            yield number, errno.errorcode.get(code, "acknowledged")
        else:
            yield number, {RTM_NEWLINK: "link", NLMSG_DONE: "done"}.get(kind, str(kind))
        data = data[(length + 3) & ~3 :]


ask(1, DUMP)
seen = list(messages(netlink.recv(1 << 17)))
ask(2, DUMP)
ask(3, ACK, LOOPBACK)
try:
    while True:
        seen += messages(netlink.recv(1 << 17))
except TimeoutError:
    pass
order = [each for n, each in enumerate(seen) if n == 0 or each != seen[n - 1]]
print(os.uname().release, "- request and answer:", ", ".join(f"{n} {what}" for n, what in order))
links = sum(each == (1, "link") for each in seen)
print(f"the first dump had {links} links")
sys.exit(
    not (
        order[:4] == [(1, "link"), (2, "EBUSY"), (3, "link"), (3, "acknowledged")]
        and order[-1] == (1, "done")
        and links == 81
    )
)
PYTHON
unshare -n sh -c '
    ip link set lo up
    for n in $(seq 40); do ip link add "a$n" type veth peer name "b$n"; done
    exec python3 "$1"' sh "$work/dumps.py"
