#!/usr/bin/env bash
#
# iproute2 6.1.0, iputils 20221126 on Linux 6.18.44: bpf_fib_lookup says that a packet fits which the kernel won't forward whole.
#
# Guess: with tot_len given, BPF_FIB_LKUP_RET_FRAG_NEEDED tells what the stack would do with a packet that it forwards: it asks the
# route's own `mtu`, as ip_forward does, and the link's if the route has none.
# Seen: of a route with `mtu 1000` over a link of 1,500 the helper finds 1,200 bytes fit (0, or 7: no neighbour yet), while the stack
# answers the same packet with "frag needed", mtu 1000, or cuts it.  Only `mtu lock 1000` is heard by both,
# or a smaller link.  So a program that redirects by this answer sends packets past a smaller tunnel's route, and one that wants
# to know whether the stack will cut must be told of routes' sizes by user space.

set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 77; }
[ "$(uname -m)" = x86_64 ] || { echo "knows the number of bpf(2) for x86_64 alone"; exit 77; }
[ "${1-}" = inside ] || exec unshare --net --mount --propagation private "$0" inside

mount -t tmpfs tmpfs /run
work=$(mktemp -d)
mkdir /run/netns
trap 'ip netns delete near 2>/dev/null || true; ip netns delete far 2>/dev/null || true; rm -rf "$work"' EXIT
echo "$(ip -V), $(ping -V | head -1), Linux $(uname -r)"

at=1
for name in near far; do
    ip netns add "$name"
    ip link add "$name" type veth peer name eth0 netns "$name"
    ip address add "10.0.$at.1/24" dev "$name"
    ip link set "$name" up
    ip -n "$name" address add "10.0.$at.2/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" route add default via "10.0.$at.1"
    at=$((at + 1))
done
ip -n far address add 10.0.9.9/32 dev eth0
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.lo.forwarding=1

cat >"$work/fits.py" <<'PY'
import ctypes, os, socket, struct, sys

libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    if (found := libc.syscall(321, command, buffer, len(attributes))) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found.to_bytes(4, "little") + buffer.raw


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, to | source << 4, offset, value)


def fits(dst: str, size: int) -> int:
    """What bpf_fib_lookup(ctx, {AF_INET, tot_len, ifindex: lo, ipv4_dst}, 64, 0) returns in a program of tc."""
    (address,) = struct.unpack("=i", socket.inet_aton(dst))
    code = instruction(0xBF, 6, 1) + b"".join(instruction(0x7A, 10, 0, at) for at in range(-64, 0, 8))
    code += instruction(0x72, 10, 0, -64, socket.AF_INET) + instruction(0x6A, 10, 0, -58, size)
    code += instruction(0x62, 10, 0, -56, 1) + instruction(0x62, 10, 0, -32, address)
    code += instruction(0xBF, 1, 6) + instruction(0xBF, 2, 10) + instruction(0x07, 2, 0, 0, -64)
    code += instruction(0xB7, 3, 0, 0, 64) + instruction(0xB7, 4) + instruction(0x85, value=69) + instruction(0x95)
    held, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL\0", 4)
    loaded = bpf(5, struct.pack("=IIQQIIQII16s", 3, len(code) // 8, ctypes.addressof(held), ctypes.addressof(licence), 0, 0, 0, 0, 0, b"fits"))
    packet = ctypes.create_string_buffer(bytes(12) + b"\x08\x00" + bytes(50), 64)
    run = struct.pack("=IIIIQQIIIIQQ", int.from_bytes(loaded[:4], "little"), 0, 64, 0, ctypes.addressof(packet), 0, 1, 0, 0, 0, 0, 0)
    return struct.unpack_from("=I", bpf(10, run), 8)[0]


names = {0: "fits", 7: "fits", 8: "frag needed"}
print(names[fits("10.0.9.9", int(sys.argv[1]))])
PY

say() { # what the helper says of 1,200 bytes, and the stack
    helper=$(python3 "$work/fits.py" 1200)
    told=$(ip netns exec near ping -c 1 -W 5 -M "do" -s 1172 10.0.9.9 2>&1 || true)
    stack=fits
    case $told in *"Frag needed and DF set (mtu = 1000)"* | *"message too long, mtu=1000"*) stack="frag needed" ;; esac
    ip -n near route flush cache
    echo "$1: bpf_fib_lookup: $helper; ip_forward: $stack"
}
{
    ip route add 10.0.9.0/24 via 10.0.2.2
    say "a route like most"
    ip route replace 10.0.9.0/24 via 10.0.2.2 mtu 1000
    say "mtu 1000"
    ip route replace 10.0.9.0/24 via 10.0.2.2 mtu lock 1000
    say "mtu lock 1000"
    ip route replace 10.0.9.0/24 via 10.0.2.2
    ip link set far mtu 1000
    say "a link of 1000"
} | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
a route like most: bpf_fib_lookup: fits; ip_forward: fits
mtu 1000: bpf_fib_lookup: fits; ip_forward: frag needed
mtu lock 1000: bpf_fib_lookup: frag needed; ip_forward: frag needed
a link of 1000: bpf_fib_lookup: frag needed; ip_forward: frag needed
SEEN
