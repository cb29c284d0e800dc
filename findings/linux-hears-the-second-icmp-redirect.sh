#!/usr/bin/env bash
#
# Linux (seen on 6.18.44): of two equal ICMP redirects only the second changes the route.
#
# Guess: a host that accepts redirects goes by the first one; so "no route was learnt" after one packet shows that it doesn't
# accept them, or that none was sent.
# Seen: while the new gateway's link address isn't known, the host that hears the redirect only asks for it by ARP and forgets
# the rest (__ip_do_redirect in net/ipv4/route.c); the next one finds it known, and the route is there.  A test that sends one
# packet sees nothing, and in the field the first answer of a server behind a one-armed relay arrives while all later ones
# don't.

set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root, for network namespaces"; exit 1; }
name="redirect$$"
trap 'for host in host hop router; do ip netns del "$name-$host" 2>/dev/null || :; done' EXIT
for host in host hop router; do
	ip netns add "$name-$host"
	ip -n "$name-$host" link set lo up
done
# One link: the router's bridge, with the two others on it.
ip -n "$name-router" link add lan type bridge
ip -n "$name-router" link set lan up
ip -n "$name-router" addr add 192.0.2.3/24 dev lan
ip -n "$name-router" addr add 198.51.100.1/32 dev lo
for host in host:1 hop:2; do
	ip -n "$name-router" link add "${host%:*}" type veth peer name eth0 netns "$name-${host%:*}"
	ip -n "$name-router" link set "${host%:*}" up master lan
	ip -n "$name-${host%:*}" link set eth0 up
	ip -n "$name-${host%:*}" addr add "192.0.2.${host#*:}/24" dev eth0
done
ip -n "$name-host" route add default via 192.0.2.2
ip -n "$name-hop" route add default via 192.0.2.3
ip netns exec "$name-hop" sysctl -qw net.ipv4.ip_forward=1

learnt() {
	ip -n "$name-host" route get 198.51.100.1 | grep -c "via 192.0.2.3" || :
}

hop_told() {
	ip netns exec "$name-host" awk '/^Icmp:/ { for (i = 1; i <= NF; i++) if (!seen && $i == "InRedirects") at = i; line = $at; seen = 1 } END { print line }' /proc/net/snmp
}

send() {
	# Datagrams, so that nothing is repeated; then time for the redirect, and for ARP.
	ip netns exec "$name-host" bash -c 'echo x >/dev/udp/198.51.100.1/9'
	sleep 1.2
}

send
first="$(hop_told) $(learnt)"
send
second="$(hop_told) $(learnt)"
echo "redirects heard, and whether the route has changed: after one datagram $first, after two $second"
[ "$first" = "1 0" ] && [ "$second" = "2 1" ]
