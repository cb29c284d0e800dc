"""Connection tracking forgets a flow before krelay does, and a firewall leans on it.

Behind such a firewall the server can't reach a client that has been silent (SIP, WireGuard, a push
over a connection at rest) though `krelay nat` still has the flow.  The kernel's timers are made
short here, so that nobody waits for two minutes.
"""

import socket
from typing import Any

import pytest

from tests.net.test_doctor import finding, sysctl
from tests.net.test_doctor_firewalls import doctor, type_as_root
from tests.net.world import World

pytestmark = pytest.mark.net

SERVICES = "udp/5060 tcp/443=forward tcp/80"
SHORT = 1
"""Seconds, instead of 30 and 120."""
README = """
table inet fw {
  chain input {
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
    tcp dport 18000 accept
  }
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    ip daddr SERVER udp dport 5060 accept
    ip daddr SERVER tcp dport 443 accept
  }
}
"""
BY_ADDRESS = README.replace("tcp dport 443 accept", "tcp dport 443 accept\nip saddr SERVER accept")
IPTABLES = """
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -d SERVER -j ACCEPT
COMMIT
"""


def guard(world: World, rules: str) -> None:
    load = ("iptables-restore", "--noflush") if "*filter" in rules else ("nft", "-f", "-")
    world.lab.run("relay", *load, input=rules.replace("SERVER", world.server))


def shorten(world: World, *names: str) -> None:
    sysctl(world, *(f"net.netfilter.nf_conntrack_{name}={SHORT}" for name in names))


def is_forgotten(world: World) -> None:
    """Waits until connection tracking knows no flow to the server any more."""
    text = f"dst={world.server}"
    world.until(
        lambda: text not in world.run("relay", "cat", "/proc/net/nf_conntrack"), "forgotten"
    )


class Sip:
    """A UDP server that speaks to its client whenever it likes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server = world.open("server", socket.SOCK_DGRAM)
        self.server.bind((world.server, 5060))
        self.client = world.open("client", socket.SOCK_DGRAM)

    def register(self) -> None:
        self.client.sendto(b"register", (self.world.relay, 5060))
        _, self.at = self.server.recvfrom(100)
        self.server.sendto(b"ok", self.at)
        assert self.client.recvfrom(100) == (b"ok", (self.world.relay, 5060))

    def rings(self, within: float) -> bool:
        """Whether the server, speaking first, reaches the client."""
        self.server.sendto(b"ring", self.at)
        self.client.settimeout(within)
        try:
            return self.client.recv(100) == b"ring"
        except TimeoutError:
            return False


def timers(world: World) -> dict[str, Any]:
    return finding(doctor(world, world.client)[1], "timers")


@pytest.mark.parametrize("rules", [README, IPTABLES], ids=["nft", "iptables"])
def test_the_server_reaches_a_silent_client_once_the_timers_are_mended(
    world: World, rules: str
) -> None:
    world.begin(services=SERVICES)
    assert world.values("status")["conntrack"] == "unused"
    guard(world, rules)
    shorten(world, "udp_timeout", "udp_timeout_stream")
    sip = Sip(world)
    sip.register()
    is_forgotten(world)
    assert world.flows("proto=udp")
    assert not sip.rings(0.5)
    told = timers(world)
    assert (told["level"], told["safe"]) == ("warning", True)
    assert "nf_conntrack_udp_timeout_stream" in told["text"]
    assert "forward" in told["text"].lower()
    sip.register()
    assert "forgets udp after 1 s, krelay after 300 s" in world.values("status")["conntrack"]

    type_as_root(world, told["fix"])
    assert timers(world)["level"] == "ok"
    assert world.values("status")["conntrack"] == "ok"
    sip.register()
    shown = world.run("relay", "cat", "/proc/net/nf_conntrack")
    (left,) = (int(line.split()[4]) for line in shown.splitlines() if "dport=5060" in line)
    assert left > 290
    assert sip.rings(5)


def test_ours_made_shorter_is_as_good(world: World) -> None:
    world.begin(services=SERVICES)
    guard(world, README)
    shorten(world, "udp_timeout", "udp_timeout_stream")
    assert timers(world)["level"] == "warning"
    world.put(timeouts__udp=SHORT)
    assert timers(world)["level"] == "ok"
    sip = Sip(world)
    sip.register()
    world.until(lambda: not world.flows("proto=udp"), "no flow that nobody can use")


def test_a_forwarded_connection_at_rest_is_forgotten_likewise(world: World) -> None:
    world.begin(services=SERVICES)
    guard(world, README)
    sysctl(world, "net.netfilter.nf_conntrack_udp_timeout=300")
    sysctl(world, "net.netfilter.nf_conntrack_udp_timeout_stream=300")
    shorten(world, "tcp_timeout_established")
    listener = world.open("server")
    listener.bind((world.server, 443))
    listener.listen()

    def is_pushed(sock: socket.socket, within: float) -> bool:
        """Whether the server, speaking first over a connection at rest, reaches the client."""
        peer.send(b"push")
        sock.settimeout(within)
        try:
            return sock.recv(100).startswith(b"push")  # it is repeated, then with the next one
        except TimeoutError:
            return False

    sock = world.connect("client", 443)
    peer, _ = listener.accept()
    with peer:
        is_forgotten(world)
        assert not is_pushed(sock, 0.5)
        told = timers(world)
        assert told["level"] == "warning"
        assert "forgets tcp flows after 1 s" in told["text"]
        type_as_root(world, told["fix"])
        assert timers(world)["level"] == "ok"
        sock.send(b"x")  # from the client it is let by, and known again
        assert is_pushed(sock, 5)


def test_rules_that_name_the_server_need_no_tracking(world: World) -> None:
    world.begin(services=SERVICES)
    guard(world, BY_ADDRESS)
    shorten(world, "udp_timeout", "udp_timeout_stream")
    sip = Sip(world)
    sip.register()
    is_forgotten(world)
    assert sip.rings(5)
    assert timers(world)["level"] == "ok"


def test_the_default_timers_are_told_of_behind_the_readmes_firewall(world: World) -> None:
    world.begin(services=SERVICES)
    assert timers(world)["level"] == "ok"  # no rule leans on them
    guard(world, README)
    told = timers(world)
    assert told["level"] == "warning"
    type_as_root(world, told["fix"])
    assert timers(world)["level"] == "ok"
