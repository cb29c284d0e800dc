#!/usr/bin/env bash
#
# scapy 2.6.1 on Linux 6.18.44: a probe by SYN of a live connection is answered once in half a second, and not at all after others.
#
# Guess: an established connection answers each SYN by a challenge ACK (RFC 5961, section 4.2), up to a rate of the host's
# (tcp_challenge_ack_limit); so one SYN tells whether an end is alive, and silence tells that it isn't.
# Seen: a connection answers one, and none for the next 500 ms (tcp_invalid_ratelimit), which a pure ACK out of its window has used
# up as well: then the first SYN is met by silence.  Nothing is told to anybody but a counter (TCPACKSkippedChallenge).  Data
# out of the window doesn't count.  So a probe must be repeated, and later than after half a second; and
# a program that resets connections by what they answer to a SYN (tcpkill's kin, middleboxes) misses some at random.

set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 77; }
if [ "${1-}" != inside ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" -q --disable-pip-version-check install scapy==2.6.1
    unshare --net "$0" inside "$work"
    exit
fi

work=$2
ip link set lo up
echo "Linux $(uname -r), tcp_invalid_ratelimit $(sysctl -n net.ipv4.tcp_invalid_ratelimit) ms"
cat >"$work/probe.py" <<'PY'
import logging, pathlib, socket, time

logging.disable(logging.WARNING)
from scapy.all import IP, TCP, L3RawSocket, conf

conf.L3socket = L3RawSocket
HERE = "127.0.0.1"


def counted(name: str) -> int:
    names, values = (line.split() for line in pathlib.Path("/proc/net/netstat").read_text().splitlines()[:2])
    return int(values[names.index(name)])


def connected() -> tuple[socket.socket, socket.socket, int]:
    with socket.create_server((HERE, 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return client, listening.accept()[0], listening.getsockname()[1]


def outside(out: L3RawSocket, port: int, own: int, data: bytes) -> None:
    """A segment out of the window: with these bytes, or a pure ACK."""
    out.send(IP(src=HERE, dst=HERE) / TCP(sport=port, dport=own, flags="A", seq=1, ack=1) / data)


def syn(out: L3RawSocket, port: int, own: int) -> str:
    before = counted("TCPChallengeACK"), counted("TCPACKSkippedChallenge")
    out.send(IP(src=HERE, dst=HERE) / TCP(sport=port, dport=own, flags="S", seq=1))
    for _ in range(200):
        after = counted("TCPChallengeACK"), counted("TCPACKSkippedChallenge")
        if after != before:
            return "answered" if after[0] > before[0] else "skipped"
        time.sleep(0.001)
    raise SystemExit("neither answered nor skipped")


out = conf.L3socket()
client, server, port = connected()
own = client.getsockname()[1]
print("three SYNs at once:", *(syn(out, port, own) for _ in range(3)))
time.sleep(0.6)
print("0.6 s later:", syn(out, port, own))
for name, data in (("an ACK", b""), ("data", b"old")):
    client, server, port = connected()
    own = client.getsockname()[1]
    outside(out, port, own, data)
    print(f"the first, after {name} out of the window:", syn(out, port, own))
client.sendall(b"still there")
print("and the connection lives:", server.recv(100).decode())
PY
"$work/venv/bin/python" "$work/probe.py" | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
three SYNs at once: answered skipped skipped
0.6 s later: answered
the first, after an ACK out of the window: skipped
the first, after data out of the window: answered
and the connection lives: still there
SEEN
