"""Host firewalls of common shapes: relaying fails, the doctor names the rule, its fix works.

Each ruleset is put into the relay host while krelay relays.  What the doctor says is held against
what really happens, before and after the fixes have been run as they are printed.
"""

import shlex
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address
from itertools import count
from typing import Any, NamedTuple

import pytest

from krelay.doctor import command, gather
from krelay.doctor.findings import Level
from krelay.rules.spec import instance_of
from krelay_vm import Result
from tests.net.world import PATIENCE, PYTHON, World, greet

pytestmark = [pytest.mark.net, pytest.mark.one_datapath("what it finds is the host's")]

IP_TRANSPARENT = 19  # linux/in.h
WITHIN = 0.4
"""Seconds for what should not come."""

# A default-drop ruleset as guides for nftables have it; only ssh and ping are let in.
GUIDE = """
table inet filter {
  chain input {
    type filter hook input priority filter; policy drop;
    ct state vmap { established : accept, related : accept, invalid : drop }
    iifname "lo" accept
    meta l4proto { icmp, ipv6-icmp } accept
    tcp dport 22 ct state new limit rate 10/minute accept
    limit rate 5/minute log prefix "denied " counter
    reject with icmpx admin-prohibited
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
  }
  chain output {
    type filter hook output priority filter; policy accept;
  }
}
"""
# As strict as it gets: nothing leaves either, but what belongs to a connection.
STRICT = """
table inet strict {
  chain input {
    type filter hook input priority filter; policy drop;
    ct state established accept
    iifname "lo" accept
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established accept
  }
  chain output {
    type filter hook output priority filter; policy drop;
    ct state established accept
    udp dport 53 accept
  }
}
"""
# firewalld's chains, with its zone `public` on both links; forwarding within a zone is off.
FIREWALLD = """
table inet firewalld {
  chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; }
  chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; }
  chain filter_INPUT {
    type filter hook input priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_INPUT_ZONES
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    ip6 daddr { ::/96, ::ffff:0.0.0.0/96 } reject with icmpv6 addr-unreachable
    jump filter_FORWARD_ZONES
    reject with icmpx admin-prohibited
  }
  chain filter_OUTPUT {
    type filter hook output priority filter + 10; policy accept;
    ct state { established, related } accept
    oifname "lo" accept
  }
  chain filter_INPUT_ZONES {
    iifname "eth0" goto filter_IN_public
    iifname "eth1" goto filter_IN_public
    goto filter_IN_public
  }
  chain filter_FORWARD_ZONES {
    iifname "eth0" goto filter_FWD_public
    iifname "eth1" goto filter_FWD_public
    goto filter_FWD_public
  }
  chain filter_IN_public {
    jump filter_IN_public_deny
    jump filter_IN_public_allow
    meta l4proto { icmp, ipv6-icmp } accept
    reject with icmpx admin-prohibited
  }
  chain filter_IN_public_deny { }
  chain filter_IN_public_allow {
    tcp dport 22 accept
    ip6 daddr fe80::/64 udp dport 546 accept
  }
  chain filter_FWD_public {
    reject with icmpx admin-prohibited
  }
}
"""
# What docker leaves for a bridge with one published port, 80, after it has set FORWARD to DROP.
DOCKER = """
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
# ufw's chains after `ufw default deny incoming`, `ufw allow ssh`.
UFW = """
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-after-forward - [0:0]
:ufw-after-input - [0:0]
:ufw-after-logging-forward - [0:0]
:ufw-after-logging-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-before-input - [0:0]
:ufw-before-logging-forward - [0:0]
:ufw-before-logging-input - [0:0]
:ufw-before-output - [0:0]
:ufw-logging-deny - [0:0]
:ufw-not-local - [0:0]
:ufw-reject-forward - [0:0]
:ufw-reject-input - [0:0]
:ufw-skip-to-policy-input - [0:0]
:ufw-track-forward - [0:0]
:ufw-track-input - [0:0]
:ufw-user-forward - [0:0]
:ufw-user-input - [0:0]
:ufw-user-output - [0:0]
-A INPUT -j ufw-before-logging-input
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A INPUT -j ufw-after-logging-input
-A INPUT -j ufw-reject-input
-A INPUT -j ufw-track-input
-A FORWARD -j ufw-before-logging-forward
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A FORWARD -j ufw-after-logging-forward
-A FORWARD -j ufw-reject-forward
-A FORWARD -j ufw-track-forward
-A OUTPUT -j ufw-before-output
-A ufw-after-input -p udp -m udp --dport 137 -j ufw-skip-to-policy-input
-A ufw-after-input -m addrtype --dst-type BROADCAST -j ufw-skip-to-policy-input
-A ufw-after-logging-forward -m limit --limit 3/min -j LOG --log-prefix "[UFW] "
-A ufw-after-logging-input -m limit --limit 3/min -j LOG --log-prefix "[UFW] "
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-before-output -o lo -j ACCEPT
-A ufw-before-output -j ufw-user-output
-A ufw-logging-deny -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j RETURN
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m addrtype --dst-type BROADCAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-skip-to-policy-input -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
"""
REDIRECTS_DNS = """
table ip dns_for_all {
  chain pre {
    type nat hook prerouting priority dstnat; policy accept;
    udp dport { 53, 7 } counter redirect to :5353
    tcp dport 80 redirect to :8080
  }
}
"""
TRANSPARENT = """
table ip mesh {
  chain pre {
    type filter hook prerouting priority mangle; policy accept;
    ip saddr 172.20.5.0/24 meta l4proto udp tproxy to :9 meta mark set 1 accept
  }
}
"""
UNTRACKED = """
table ip untracking {
  chain pre {
    type filter hook prerouting priority raw + 10; policy accept;
    meta l4proto udp notrack
  }
}
table inet guard {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state { new, established } accept
  }
}
"""
EARLY = """
table ip early {
  chain pre {
    type filter hook prerouting priority -350; policy accept;
    tcp dport 80 drop
    udp sport 7 drop
  }
}
"""
ADDRESSES_ONLY = """
table inet allowed {
  set friends { type ipv4_addr; flags interval; elements = { 172.20.5.0/24 } }
  set foes { type ipv4_addr; elements = { 192.0.2.7 } }
  chain input {
    type filter hook input priority filter; policy drop;
    ip saddr @foes drop
    ip saddr @friends tcp dport 18000 accept
    ct state established accept
    iifname "lo" accept
  }
}
"""
LEGACY = """
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m state --state ESTABLISHED -j ACCEPT
COMMIT
"""
FRESH = count(20000)
"""Ports of the client's that no test has used before: NAT goes by what was when a port was new."""


class Case(NamedTuple):
    """A ruleset, by what it is put in, and what it hinders."""

    name: str
    tool: str
    rules: str
    tcp: bool
    """Whether TCP gets through before the fix."""
    udp: bool
    named: tuple[str, ...]
    """Words of the findings: the steps, and something of each rule."""


CASES = [
    Case("guide", "nft", GUIDE, False, False, ("T1, input", "reject with icmpx", "U1, forward")),
    Case("strict", "nft", STRICT, False, False, ("T1, input", "T3, output", "U1, forward")),
    Case("firewalld", "nft", FIREWALLD, False, False, ("filter_IN_public", "filter_FWD_public")),
    Case(
        "docker", "iptables", DOCKER, True, False, ("U1, forward", "U3, forward", "the policy of")
    ),
    Case("ufw", "iptables", UFW, False, False, ("T1, input", "U1, forward")),
    Case("legacy", "iptables-legacy", LEGACY, False, False, ("iptables-legacy", "T1", "U1", "U3")),
    Case("redirect", "nft", REDIRECTS_DNS, True, False, ("sent elsewhere", "redirect to :5353")),
    Case("tproxy", "nft", TRANSPARENT, True, False, ("transparent proxy", "U1, prerouting")),
    Case("notrack", "nft", UNTRACKED, True, False, ("U1, forward", "U3, forward")),
    Case("early", "nft", EARLY, False, False, ("T1, prerouting", "U3, prerouting", "udp sport 7")),
    Case("addresses", "nft", ADDRESSES_ONLY, True, True, ()),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    """Relaying, for all of these tests."""
    with World() as world:
        world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
        world.begin()
        proxy = world.open("relay", socket.SOCK_DGRAM)  # whom `tproxy` finds
        proxy.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        proxy.bind(("0.0.0.0", 9))
        yield world


@pytest.fixture
def world(shared: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Relaying with no rules of others; afterwards there are none again, and krelay's untouched.

    ufw and firewalld aren't asked here (test_firewall_tools): they would see the machine's files.
    """
    monkeypatch.setattr(gather, "TOOLS", ())
    yield shared
    shared.put(source="client")
    for line in shared.lab.run("relay", "nft", "list", "tables").stdout.splitlines():
        _, family, name = line.split()
        of_iptables = family == "ip" and name in ("filter", "nat", "raw", "mangle")
        if not of_iptables and not instance_of(name):
            shared.lab.run("relay", "nft", "delete", "table", family, name)
    for tool in ("iptables", "iptables-legacy"):
        for table in ("filter", "nat"):
            empty = f"*{table}\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
            if tool == "iptables" or "-A" in shared.lab.run("relay", f"{tool}-save").stdout:
                if table == "filter":
                    empty = empty.replace(
                        ":OUTPUT", ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT"
                    )
                shared.lab.run("relay", f"{tool}-restore", input=empty)
    assert "took krelay's rules out" not in shared.krelay_process.output


def doctor(world: World, client: str | None = None) -> tuple[int, list[dict[str, Any]]]:
    """What the command would say in the relay host: its exit status and its findings."""
    with world.lab.enter("relay"):
        findings = command.look(world.root, IPv4Address(client) if client else None)
    failed = any(finding.level is Level.FAILED for finding in findings)
    return int(failed), [command.as_values(finding) for finding in findings]


def about_rules(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The findings on the host's rules that aren't ok."""
    return [f for f in findings if f["check"] == "firewall" and f["level"] != "ok"]


def type_as_root(world: World, command: str) -> Result:
    """A fix as it is printed, in a shell of the relay host."""
    krelay = f'krelay() {{ {shlex.join(PYTHON)} -m krelay "$@"; }}; '
    return world.lab.run("relay", "sh", "-c", krelay + command)


def tcp_passes(world: World, expected: bool) -> bool:
    """Whether a client is served; what isn't expected is waited for briefly."""
    sock = world.open("client")
    sock.bind(("", next(FRESH)))
    sock.settimeout(PATIENCE if expected else WITHIN)
    with sock:
        try:
            sock.connect((world.relay, 80))
            return bool(greet(sock))
        except (TimeoutError, ConnectionRefusedError, OSError):
            return False


def udp_passes(world: World, expected: bool) -> bool:
    """The same for a datagram, from a port of which connection tracking knows nothing yet."""
    sock = world.open("client", socket.SOCK_DGRAM)
    sock.bind(("", next(FRESH)))
    sock.settimeout(PATIENCE if expected else WITHIN)
    with sock:
        try:
            return bool(world.exchange(sock, b"who", (world.relay, 7)))
        except (TimeoutError, ConnectionRefusedError, OSError):
            return False


@pytest.mark.parametrize(
    ("case", "source"),
    [
        *((case, "client") for case in CASES),
        *((case, "relay") for case in CASES if case.name in ("strict", "docker")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_doctor_names_the_rule_and_its_mend_works(
    world: World, case: Case, source: str
) -> None:
    world.put(source=source)
    load = ("nft", "-f", "-") if case.tool == "nft" else (f"{case.tool}-restore", "--noflush")
    world.lab.run("relay", *load, input=case.rules)

    passes = tcp_passes(world, case.tcp), udp_passes(world, case.udp)
    assert passes == (case.tcp, case.udp)
    status, findings = doctor(world, world.client)
    wrong = about_rules(findings)
    assert status == (0 if case.tcp and case.udp else 1), findings
    shown = "\n".join(finding["text"] for finding in wrong)
    assert [words for words in case.named if words not in shown] == [], shown
    for finding in wrong:
        type_as_root(world, finding["fix"])

    status, findings = doctor(world, world.client)
    assert about_rules(findings) == []
    assert status == 0
    seen = world.client if source == "client" else world.relay
    assert world.who("client", 80).startswith(f"{seen}:")
    assert world.who_udp("client", 7).startswith(f"{seen}:")
    assert world.who_udp("client2", 53).startswith(
        f"{world.lab.address('client2')}:" if source == "client" else f"{seen}:"
    )
