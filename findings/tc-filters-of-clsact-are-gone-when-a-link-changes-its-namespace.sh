#!/usr/bin/env bash
#
# iproute2 6.1.0 on Linux 6.18.44: a link that moves to another network namespace and back has lost its clsact and all filters.
#
# Guess: what `tc` attached to a device belongs to the device, as its MTU and its addresses of Ethernet do, and goes with it; or
# the move is refused, or told of.
# Seen: `ip link set v0 netns X` ends with status 0 and says nothing; there, and again here after the way back, `tc qdisc show`
# has no clsact and `tc filter show` nothing.  The kernel announces a deleted qdisc to who listens for RTM_DELQDISC, and that is
# all.  MTU and alias have come along.  So whoever attaches programs by clsact must look again when a link appears, though its
# name is the same and its MTU is the one that was set.

set -euo pipefail
[ "${1-}" = inside ] || exec unshare --net --mount --propagation private "$0" inside

mount -t tmpfs tmpfs /run
work=$(mktemp -d)
holder=
trap '[ -z "$holder" ] || kill "$holder"; rm -rf "$work"' EXIT
echo "$(ip -V), Linux $(uname -r)"

unshare --net sleep 60 &
holder=$!
while [ "$(readlink "/proc/$holder/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done

ip link add v0 mtu 1400 type veth peer name v1
ip link set v0 alias kept
tc qdisc add dev v0 clsact
for where in ingress egress; do # one instruction: return -1, go on
    tc filter add dev v0 "$where" bpf bytecode '1,6 0 0 4294967295' flowid 1:1
done
filters() {
    "$@" tc filter show dev v0 ingress
    "$@" tc filter show dev v0 egress
}
before=$(filters env | grep -c 'filter protocol all pref [0-9]* bpf chain 0 handle')
[ "$before" = 2 ]

ip link set v0 netns "$holder"
there=(nsenter --net="/proc/$holder/ns/net")
echo "moved: status 0; clsact there: $("${there[@]}" tc qdisc show dev v0 | grep -c clsact || true)"
[ -z "$("${there[@]}" tc qdisc show dev v0 clsact)" ]
"${there[@]}" ip link set v0 netns "$$"
shown=$(ip -details link show v0)
[[ $shown == *"mtu 1400"* && $shown == *"alias kept"* ]]
[ -z "$(tc qdisc show dev v0 clsact)" ]
[ -z "$(filters env 2>/dev/null || true)" ]
echo "back again: MTU 1400 and the alias are as they were; no clsact, no filter of 2"
