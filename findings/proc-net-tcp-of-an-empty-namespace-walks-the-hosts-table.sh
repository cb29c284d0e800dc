#!/usr/bin/env bash
#
# Linux 6.18 (6.18.44): /proc/net/tcp of a network namespace without any socket takes as long as the host's table is large.
#
# Guess: a namespace that was just made has no connections, so its /proc/net/tcp is read in microseconds.
# Seen: namespaces share the host's table of connections (its size goes with the memory: 262,144 places on a machine of 24 GB),
# and the file walks all places: some milliseconds, a hundred times as long as sock_diag takes to list the listeners alone, or as
# /proc/net/udp.  With net.ipv4.tcp_child_ehash_entries set in a parent, a child namespace gets a table of its own and the same
# file is short work.  It concerns whatever looks into the file in a loop, as scripts do that wait for a server to listen.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/reads.py" <<'PYTHON'
import socket
import struct
import sys
import time

LISTENERS = struct.pack("=IHHIIBBBxI48s", 72, 20, 0x301, 1, 0, 2, 6, 0, 1 << 10, bytes(48))


def fastest(read) -> float:
    took = []
    for _ in range(30):
        began = time.perf_counter()
        read()
        took.append(time.perf_counter() - began)
    return min(took) * 1e6


def by_file() -> None:
    with open("/proc/thread-self/net/tcp") as file:
        assert len(file.readlines()) == 1  # the heading: there is no socket


def by_sock_diag() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:
        kernel.send(LISTENERS)
        assert struct.unpack_from("=IH", kernel.recv(1 << 16))[1] == 3  # NLMSG_DONE at once


print(f"{fastest(by_file):.0f} {fastest(by_sock_diag):.0f}")
PYTHON
if [ "$(id -u)" != 0 ] || ! unshare -n true 2>/dev/null; then
    echo "needs root, and network namespaces" >&2
    exit 1
fi
read -r table listeners < <(timeout 60 unshare -n python3 "$work/reads.py")
read -r own _ < <(timeout 60 unshare -n sh -c \
    'echo 1024 >/proc/sys/net/ipv4/tcp_child_ehash_entries && exec unshare -n python3 "$1"' sh "$work/reads.py")
echo "Linux $(uname -r): /proc/net/tcp of an empty namespace $table us, listeners by sock_diag $listeners us;" \
    "with a table of 1,024 places of its own $own us"
[ "$table" -gt $((10 * listeners)) ] || { echo "the file is no slower now" >&2; exit 1; }
[ "$table" -gt $((5 * own)) ] || { echo "a table of its own makes no difference now" >&2; exit 1; }
