"""Random rulesets: what `judge` makes of them is what the kernel does with real packets.

client 10.0.0.1 ---- 10.0.0.254 relay 192.168.0.2 ---- 192.168.0.1 server

For each ruleset in the relay host a datagram goes through it, another to it, a third from it, each
from a new port, and each is answered.  A fate that is certain must befall it, none must if none is
told; where one is only possible there is nothing to hold against the kernel.
"""

import json
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import NamedTuple

import pytest

from krelay.doctor import iptrules, nftrules
from krelay.doctor.firewall import Chains, Packet, judge
from krelay_vm import Lab

pytestmark = [pytest.mark.net, pytest.mark.slow]

ROUNDS = 400 if os.environ.get("KRELAY_LONG") else 20
WITHIN = 0.03
"""Seconds for a datagram that isn't dropped; a late one is asked for again, with more time."""
PORT = 53

NFT_MATCHES = """
udp dport 53
udp dport 54
udp dport { 50-60, 99 }
udp dport != 53
udp sport 53
udp sport 1024-65535
th dport 53
tcp dport 53
meta l4proto udp
meta l4proto { tcp, udp }
ip protocol udp
ip protocol != udp
ip saddr 10.0.0.0/8
ip saddr != 10.0.0.1
ip saddr { 10.0.0.1, 192.168.0.1-192.168.0.9 }
ip daddr 192.168.0.1
ip daddr @servers
ip daddr != @servers
iifname "eth0"
iifname "eth*"
iifname "eth1"
oifname "eth1"
oifname "eth0"
oifname != "eth1"
iif "lo"
ct state new
ct state established,related
ct state { new, untracked }
ct state != new
ct state invalid
ct state untracked
ct direction reply
ct direction original
ct status dnat
meta mark 0x1
meta mark & 0x3 == 0x0
meta mark != 0x0
fib daddr type local
fib saddr type local
fib saddr type != local
fib daddr type unicast
fib saddr . iif oif missing
meta nfproto ipv4
meta nfproto ipv6
meta pkttype { broadcast, multicast }
ip saddr . udp dport { 10.0.0.1 . 53 }
ip saddr . udp dport != { 10.0.0.1 . 53 }
icmp type echo-request
ip6 saddr ::1
tcp flags syn
numgen random mod 100 < 50
""".strip().splitlines()
NFT_VERDICTS = [
    *("accept", "drop", "drop", "return", "jump a", "jump b", "goto a", "goto b", "counter"),
    *("notrack", "meta mark set 1", "reject", "udp dport 53 continue"),
    "ct state vmap { established : accept, new : jump a }",
    "iifname vmap @links",
    "meta l4proto vmap { tcp : accept, udp : goto b }",
]
IPTABLES_MATCHES = """
-p udp -m udp --dport 53
-p udp -m udp --dport 54
-p udp -m udp --dport 50:60
-p udp -m udp ! --dport 53
-p udp -m udp --sport 53
-p udp -m udp --sport 1024:65535
-p tcp -m tcp --dport 53
-p tcp -m tcp --syn
-p udp
! -p udp
-p udp -m multiport --dports 1,53
-p udp -m multiport --ports 53
-p udp -m multiport ! --sports 53,67
-s 10.0.0.0/8
! -s 10.0.0.1
-d 192.168.0.1
! -d 192.168.0.0/24
-m iprange --src-range 10.0.0.0-10.0.0.9
-m iprange ! --dst-range 10.0.0.0-10.0.0.9
-i eth0
-i eth+
! -i eth0
-o eth1
! -o eth+
-m conntrack --ctstate NEW
-m conntrack --ctstate RELATED,ESTABLISHED
-m conntrack ! --ctstate NEW
-m conntrack --ctstate INVALID
-m conntrack --ctstate NEW,UNTRACKED
-m conntrack --ctstate DNAT
-m conntrack --ctdir REPLY
-m state --state ESTABLISHED
-m addrtype --dst-type LOCAL
-m addrtype --src-type LOCAL
-m addrtype ! --dst-type LOCAL
-m mark --mark 0x1/0x1
-m mark ! --mark 0x1
-m comment --comment "-j ACCEPT"
-m pkttype --pkt-type broadcast
-m statistic --mode random --probability 0.5
-p icmp -m icmp --icmp-type 8
-f
""".strip().splitlines()
IPTABLES_VERDICTS = [
    *("-j ACCEPT", "-j DROP", "-j DROP", "-j RETURN", "-j a", "-j b", "-g a", "-g b", ""),
    *("-j MARK --set-mark 1", "-j CT --notrack", "-j REJECT", "-j LOG"),
]
NO_RULES = """
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
"""
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")


def nft_ruleset(rng: random.Random) -> str:
    """Two to five base chains of any hook and priority, and two chains to jump to."""
    lines = ["table inet t {", "set servers { type ipv4_addr; elements = { 192.168.0.1 } }"]
    lines += ['map links { type ifname : verdict; elements = { "eth0" : jump a, "eth1" : drop } }']
    lines += ["chain b {", *nft_rules(rng, ("jump", "goto", "vmap", "reject", "notrack")), "}"]
    lines += ["chain a {", *nft_rules(rng, ("a", "links", "reject", "notrack")), "}"]
    for number in range(rng.randint(2, 5)):
        hook = rng.choice(HOOKS)
        without = ["notrack"] if hook != "prerouting" else []
        without += ["reject"] if hook in ("prerouting", "postrouting") else []
        policy = rng.choice(("accept",) * 5 + ("drop",))
        priority = rng.choice((-400, -300, -150, 0, 5, 400))
        lines += [
            f"chain c{number} {{",
            f"type filter hook {hook} priority {priority}; policy {policy};",
            *nft_rules(rng, without),
            "}",
        ]
    return "\n".join([*lines, "}", ""])


def nft_rules(rng: random.Random, without: Sequence[str]) -> list[str]:
    """Some rules, with none of these words in their verdicts."""
    verdicts = [v for v in NFT_VERDICTS if not set(v.replace("@", "").split()) & set(without)]
    return [
        " ".join([*rng.sample(NFT_MATCHES, rng.choice((0, 1, 1, 2))), rng.choice(verdicts)])
        for _ in range(rng.randint(0, 4))
    ]


def iptables_ruleset(rng: random.Random) -> str:
    """Tables raw, mangle and filter, with two chains to jump to in each."""
    lines = []
    for table, chains in (
        ("raw", ("PREROUTING", "OUTPUT")),
        ("mangle", ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")),
        ("filter", ("INPUT", "FORWARD", "OUTPUT")),
    ):
        lines.append(f"*{table}")
        lines += [f":{c} {rng.choice(['ACCEPT'] * 9 + ['DROP'])} [0:0]" for c in chains]
        lines += [":a - [0:0]", ":b - [0:0]"]
        for chain in ("a", "b", *(c for c in chains if rng.random() < 0.6)):
            for _ in range(rng.randint(0, 3)):
                without = {"a": ("-j a", "-g a"), "b": ("-j a", "-g a", "-j b", "-g b")}
                verdict = rng.choice(
                    [v for v in IPTABLES_VERDICTS if v not in without.get(chain, ())]
                )
                if (table != "filter" and "REJECT" in verdict) or (
                    table != "raw" and "CT" in verdict
                ):
                    continue
                if table != "mangle" and "MARK" in verdict:
                    continue
                count = rng.choice((0, 1, 1, 2))
                lines.append(
                    f"-A {chain} {' '.join(rng.sample(IPTABLES_MATCHES, count))} {verdict}"
                )
        lines.append("COMMIT")
    return "\n".join([*lines, ""])


class Way(NamedTuple):
    """A conversation: who asks whom, and the hooks of the relay that each direction passes."""

    name: str
    asks: str
    address: str
    there: tuple[tuple[str, str, str], ...]
    """Hook, link it came by, link it leaves by."""
    back: tuple[tuple[str, str, str], ...]


CLIENT, NEAR, FAR, SERVER = "10.0.0.1", "10.0.0.254", "192.168.0.2", "192.168.0.1"
WAYS = (
    Way("through", "client", SERVER,
        (("prerouting", "eth0", ""), ("forward", "eth0", "eth1"), ("postrouting", "eth0", "eth1")),
        (("prerouting", "eth1", ""), ("forward", "eth1", "eth0"), ("postrouting", "eth1", "eth0"))),
    Way("into", "client", NEAR,
        (("prerouting", "eth0", ""), ("input", "eth0", "")),
        (("output", "", "eth0"), ("postrouting", "", "eth0"))),
    Way("out", "relay", SERVER,
        (("output", "", "eth1"), ("postrouting", "", "eth1")),
        (("prerouting", "eth1", ""), ("input", "eth1", ""))),
)  # fmt: skip


def told(chains: Chains, way: Way, port: int) -> tuple[bool | None, bool | None]:
    """Whether question and answer get through, by our reckoning; None: it can't be told."""
    source = int(IPv4Address(CLIENT if way.asks == "client" else FAR))
    target = int(IPv4Address(way.address))
    ours = (int(IPv4Address(NEAR)), int(IPv4Address(FAR)))
    verdicts: list[bool | None] = []
    tracked: bool | None = True
    for reply, hooks in ((False, way.there), (True, way.back)):
        src, dst = (target, source) if reply else (source, target)
        packet = Packet(
            "udp", src, PORT if reply else port, dst, port if reply else PORT, "", "",
            src_local=src in ours, dst_local=dst in ours, reply=reply,
            state="new" if reply and tracked is False else "",
        )  # fmt: skip
        if reply and tracked is None:
            verdicts.append(None)
            break
        passes: bool | None = True
        for hook, iif, oif in hooks:
            fates, packet = judge(chains, hook, packet._replace(iif=iif, oif=oif))
            if fates:
                passes = False if fates[-1].certain and passes else None
                break
        verdicts.append(passes)
        tracked = packet.tracked
    return verdicts[0], verdicts[1]


class Network:
    """The lab, with a socket that answers at each end."""

    def __init__(self, lab: Lab, held: ExitStack) -> None:
        self.lab = lab
        self._held = held
        self._servers = {
            address: self._socket(host, (address, PORT))
            for host, address in (("server", SERVER), ("relay", NEAR))
        }

    def _socket(self, host: str, address: tuple[str, int]) -> socket.socket:
        with self.lab.enter(host):
            sock = self._held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind(address)
        return sock

    def client(self, way: Way) -> socket.socket:
        """A new port that asks."""
        return self._socket(way.asks, ("" if way.asks == "relay" else CLIENT, 0))

    def passes(self, way: Way, client: socket.socket, wait: float) -> tuple[bool, bool]:
        """Whether a question comes through, and whether its answer does."""
        server = self._servers[way.address]
        try:
            client.sendto(b"?", (way.address, PORT))
        except PermissionError:  # dropped on its way out
            return False, False
        server.settimeout(wait)
        try:
            while True:
                _, peer = server.recvfrom(10)
                if peer[1] == client.getsockname()[1]:
                    break
        except TimeoutError:
            return False, False
        try:
            server.sendto(b"!", peer)
            client.settimeout(wait)
            return True, bool(client.recv(10))
        except (TimeoutError, PermissionError):
            return True, False

    def clear(self, tool: str) -> None:
        """Takes out what a round has put in."""
        if tool == "nft":
            self.lab.run("relay", "nft", "delete", "table", "inet", "t")
        else:
            self.lab.run("relay", f"{tool}-restore", input=NO_RULES)


@pytest.fixture
def network() -> Iterator[Network]:
    with Lab() as lab, ExitStack() as held:
        yield Network(lab, held)


def listed(lab: Lab, tool: str) -> Chains:
    """The rules as the doctor reads them."""
    if tool == "nft":
        shown = json.loads(lab.run("relay", "nft", "-j", "list", "ruleset").stdout)
        return nftrules.chains(shown, lab.run("relay", "nft", "-a", "list", "ruleset").stdout)
    return iptrules.chains(lab.run("relay", f"{tool}-save").stdout, tool)


@pytest.mark.parametrize("tool", ["nft", "iptables", "iptables-legacy"])
def test_the_kernel_does_what_we_make_of_random_rules(network: Network, tool: str) -> None:
    rng = random.Random(2026)
    seen: Counter[tuple[str, bool | None]] = Counter()
    for _ in range(ROUNDS):
        if tool == "nft":
            text, command = nft_ruleset(rng), ["nft", "-f", "-"]
        else:
            text, command = iptables_ruleset(rng), [f"{tool}-restore"]
        done = network.lab.run("relay", *command, input=text, check=False)
        if done.status:  # a combination that the tool or the kernel refuses
            seen["refused", None] += 1
            continue
        chains = listed(network.lab, tool)
        for way in WAYS:
            client = network.client(way)
            expected = told(chains, way, client.getsockname()[1])
            if expected[0] is not None:
                known = 1 if expected[1] is None or not expected[0] else 2
                found = network.passes(way, client, WITHIN)
                if found[:known] != expected[:known]:  # on a busy machine
                    found = network.passes(way, network.client(way), 100 * WITHIN)
                assert found[:known] == expected[:known], f"{way.name}\n{text}"
            seen["there", expected[0]] += 1
            seen["back", expected[1]] += expected[0] is True
        network.clear(tool)
    print(dict(seen))
    assert min(seen["there", True], seen["there", False], seen["back", True]) >= ROUNDS // 5
