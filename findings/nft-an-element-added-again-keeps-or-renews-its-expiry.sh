#!/usr/bin/env bash
#
# Linux 6.12 and later (seen on 6.18.44, nft 1.0.6): whether a map's element that is added again lives longer hangs on its timeout.
#
# Guess: adding what is there either does nothing or refreshes it, whoever adds it.
# Seen, with an element that has expired by a few seconds:
#   a rule's `add @m { key : value }`            leaves timeout and expiry
#   a rule's `update @m { key : value }`         renews the expiry
#   nft add element, the same timeout            status 0, and nothing changes: it isn't renewed
#   nft add element, another timeout             status 0, and timeout and expiry are the new ones
#   nft add element, another value               "File exists"
# So who wants to keep an element from user space alternates between two timeouts, or deletes and adds it in one transaction.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/elements.py" <<'PYTHON'
import json
import os
import socket
import subprocess
import sys
import time

RULES = """
table ip t {
  map by_add { type ipv4_addr : mark; flags dynamic,timeout; timeout 40s; }
  map by_update { type ipv4_addr : mark; flags dynamic,timeout; timeout 40s; }
  chain out {
    type filter hook output priority 0;
    udp dport 9 add @by_add { ip daddr : 1 }
    udp dport 9 update @by_update { ip daddr : 1 }
  }
}
"""


def nft(*words: str, text: str | None = None) -> tuple[int, str]:
    done = subprocess.run(("nft", "-j", *words), input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def packet() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", 9))


def element(name: str) -> tuple[int, int]:
    """Its timeout and what is left of it, in seconds."""
    shown = json.loads(nft("list", "map", "ip", "t", name)[1])
    ((key, _),) = next(each["map"]["elem"] for each in shown["nftables"] if "map" in each)
    return key["elem"].get("timeout", 40), key["elem"]["expires"]


def add(timeout: int, value: int) -> int:
    """What `nft add element` ends with."""
    words = f"{{ 127.0.0.1 timeout {timeout}s : {value} }}"
    return nft("add", "element", "ip", "t", "by_add", words)[0]


subprocess.run(("nft", "-f", "-"), input=RULES, text=True, check=True)
packet()
time.sleep(3)
packet()
seen = {"rule add": element("by_add"), "rule update": element("by_update")}
seen["same timeout"] = (add(40, 1), *element("by_add"))
seen["another timeout"] = (add(60, 1), *element("by_add"))
time.sleep(3)
seen["that again"] = (add(60, 1), *element("by_add"))
seen["another value"] = (add(60, 2), *element("by_add"))
print(os.uname().release, subprocess.run(("nft", "-v"), capture_output=True, text=True).stdout.strip())
for what, values in seen.items():
    print(f"{what}: {values}")


def is_old(seconds: int, timeout: int) -> bool:
    return seconds <= timeout - 3


sys.exit(
    not (
        is_old(seen["rule add"][1], 40)
        and not is_old(seen["rule update"][1], 40)
        and seen["same timeout"][:2] == (0, 40)
        and is_old(seen["same timeout"][2], 40)
        and seen["another timeout"][:2] == (0, 60)
        and not is_old(seen["another timeout"][2], 60)
        and seen["that again"][:2] == (0, 60)
        and is_old(seen["that again"][2], 60)
        and seen["another value"][0] == 1
    )
)
PYTHON
unshare -n sh -c 'ip link set lo up && exec python3 "$1"' sh "$work/elements.py"
