#!/usr/bin/env bash
#
# Linux (seen on 6.18.44): a connected UDP socket hears of "port unreachable" and "prohibited", but not of "no route" and
# "host unreachable", unless it has set IP_RECVERR.
#
# Guess: an ICMP error that comes back for a connected UDP socket is the next error of a call: ECONNREFUSED, EHOSTUNREACH,
# ENETUNREACH.
# Seen: only errors that the kernel calls fatal are (icmp_err_convert in net/ipv4/icmp.c): port unreachable (code 3) gives
# ECONNREFUSED, "administratively prohibited" (13) EHOSTUNREACH, at once; network and host unreachable (0, 1) nothing at all, and
# the program waits for its own time-out.  With IP_RECVERR each of them is an error at once.  So the same missing route is told at
# once to programs that use glibc's resolver, which sets it, and costs dig its full time-out; and a router's
# `ip route add prohibit` fails quickly where `unreachable` doesn't.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/ask.py" <<'PYTHON'
import errno
import os
import socket
import sys

IP_RECVERR = 11
EXPECTED = {
    "10.9.0.1": ("no route (code 0)", "nothing", "ENETUNREACH"),
    "10.9.1.1": ("unreachable (code 1)", "nothing", "EHOSTUNREACH"),
    "10.9.2.1": ("prohibit (code 13)", "EHOSTUNREACH", "EHOSTUNREACH"),
    "10.8.0.2": ("no such port (code 3)", "ECONNREFUSED", "ECONNREFUSED"),
}


def told(address: str, recverr: bool) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, recverr)
        sock.connect((address, 9))
        sock.send(b"x")
        try:
            sock.recv(1)
        except TimeoutError:
            return "nothing"
        except OSError as error:
            return errno.errorcode[error.errno]
        return "an answer"


print(os.uname().release)
wrong = 0
for address, (what, *expected) in EXPECTED.items():
    seen = [told(address, recverr) for recverr in (False, True)]
    print(f"{what}: {seen[0]}; with IP_RECVERR: {seen[1]}")
    wrong += seen != expected
sys.exit(wrong != 0)
PYTHON
# This namespace is the router, a second one inside it the client; both go with their last process.
unshare -n sh -euc '
    unshare -n sleep 60 & client=$!
    trap "kill $client" EXIT
    until [ "$(readlink /proc/$client/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
    ip link add near type veth peer name far netns "$client"
    ip address add 10.8.0.2/24 dev near; ip link set near up; ip link set lo up
    sysctl -qw net.ipv4.ip_forward=1 net.ipv4.icmp_ratelimit=0
    ip route add unreachable 10.9.1.0/24; ip route add prohibit 10.9.2.0/24
    in_client="nsenter -n -t $client"
    $in_client ip address add 10.8.0.1/24 dev far; $in_client ip link set far up
    $in_client ip route add default via 10.8.0.2
    $in_client python3 "$1"' sh "$work/ask.py"
