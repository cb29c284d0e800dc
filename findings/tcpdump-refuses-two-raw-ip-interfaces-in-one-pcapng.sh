#!/usr/bin/env bash
#
# libpcap 1.10.3 (tcpdump 4.99.3, Debian 12): a pcapng file with two interfaces of LINKTYPE_RAW is refused, though they are equal.
#
# Guess: libpcap gives one link type for a whole file, so it refuses interfaces of different types, and takes equal ones.
# Seen: with two interfaces of type 101 (LINKTYPE_RAW, raw IP) the second is "different from the type of the first": the
# first one's type is translated to the platform's DLT_RAW (12 on Linux) and then compared with the 101 in the file.  Two of
# type 1 (Ethernet), of 228 (LINKTYPE_IPV4) and even of 12, which the registry of link types keeps out of files, are read;
# so is a single one of 101.  tshark reads all of them.  Who captures at several TUN devices writes 228 and 229.

set -euo pipefail
version=$(tcpdump --version 2>&1 | sed -n 's/^libpcap version \([^ ]*\).*/\1/p')
echo "libpcap $version"
[ "$version" = 1.10.3 ] || { echo "another version; nothing was tried"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/write.py" <<'PYTHON'
"""A capture with one packet for each interface: FILE LINKTYPE..."""

import struct
import sys

UDP = bytes.fromhex("4500001c000100004011 66cf 0a000001 0a000002 c0000009 00080000")


def block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack("<II", kind, len(body) + 12) + body + struct.pack("<I", len(body) + 12)


name, *types = sys.argv[1:]
with open(name, "wb") as file:
    file.write(block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)))
    for kind in types:
        file.write(block(1, struct.pack("<HHI", int(kind), 0, 65535)))
    for number, kind in enumerate(types):
        frame = (bytes(12) + b"\x08\x00" if kind == "1" else b"") + UDP
        file.write(block(6, struct.pack("<IIIII", number, 0, 0, len(frame), len(frame)) + frame))
PYTHON
failed=0
for types in "101" "1 1" "228 228" "12 12" "101 101"; do
    python3 "$work/write.py" "$work/capture.pcapng" $types
    status=0
    tcpdump -nr "$work/capture.pcapng" >"$work/out" 2>"$work/err" || status=$?
    read=$(wc -l <"$work/out")
    echo "interfaces of type $types: $read packets, status $status; $(tail -n 1 "$work/err")"
    if [ "$types" = "101 101" ]; then
        grep -q "type 101 different from the type of the first interface" "$work/err" && [ "$read" = 0 ] || failed=1
    else
        [ "$read" = "$(wc -w <<<"$types")" ] && [ "$status" = 0 ] || failed=1
    fi
done
exit "$failed"
