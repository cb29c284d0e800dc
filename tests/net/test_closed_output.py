"""A closed OUTPUT chain: what krelay itself sends must leave, or somebody is told that it doesn't.

Who is refused hears it by a RST or an ICMP error, and so do both ends of a forwarded connection
that is killed.  Connection tracking knows none of these packets.
"""

import socket
import time
from typing import Any

import pytest

from krelay.doctor.findings import Level
from tests.net.test_doctor_firewalls import doctor, type_as_root
from tests.net.world import GPORT, World, greet

pytestmark = pytest.mark.net

SERVICES = "tcp/80 tcp/443=forward udp/7"
CLOSED = """
table inet fw {
  chain output {
    type filter hook output priority 0; policy drop;
    oifname "lo" accept
    ct state invalid drop
    ct state established,related accept
    ip daddr SERVER tcp dport 80 accept
  }
}
"""
CLOSED_BY_IPTABLES = """
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT DROP [0:0]
-A OUTPUT -o lo -j ACCEPT
-A OUTPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A OUTPUT -d SERVER -p tcp -m tcp --dport 80 -j ACCEPT
COMMIT
"""


def about_own(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The findings about krelay's own packets."""
    return [f for f in findings if "krelay itself sends" in f["text"]]


def is_reset(sock: socket.socket, within: float) -> bool:
    """Whether the connection ends by a reset."""
    sock.settimeout(within)
    try:
        sock.recv(1)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    raise AssertionError("an end of file")


def is_refused(world: World, port: int, within: float) -> bool:
    """Whether a connection is refused at once."""
    sock = world.open("client")
    sock.settimeout(within)
    try:
        sock.connect((world.relay, port))
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    raise AssertionError("it is open")


def killed(world: World) -> socket.socket:
    """A forwarded connection at rest, that was killed."""
    sock = world.connect("client", 443)
    greet(sock)
    flow = next(r for r in world.flows("service=tcp/443") if r["state"] == "established")
    world.ask(f"kill {flow['id']}")
    return sock


def close_output(world: World, tool: str) -> None:
    rules = CLOSED if tool == "nft" else CLOSED_BY_IPTABLES
    load = ("nft", "-f", "-") if tool == "nft" else ("iptables-restore", "--noflush")
    world.lab.run("relay", *load, input=rules.replace("SERVER", world.server))


@pytest.mark.parametrize("tool", ["nft", "iptables"])
@pytest.mark.parametrize("source", ["client", "relay"])
def test_the_doctor_names_the_chain_and_its_fix_lets_resets_out(
    world: World, tool: str, source: str
) -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7")
    world.begin(services=SERVICES, source=source)
    assert world.values("status")["own_packets"] == "ok"
    close_output(world, tool)
    assert greet(world.connect("client", 80))  # relaying itself goes on
    sock = killed(world)
    assert not is_reset(sock, 0.5)
    assert not is_refused(world, GPORT, 0.5)
    _, findings = doctor(world, world.client)
    told = about_own(findings)
    assert {f["level"] for f in told} == {Level.WARNING}
    assert all("output" in f["text"] or "OUTPUT" in f["text"] for f in told)

    def is_said() -> bool:
        """Of which one may have come meanwhile."""
        stopped = world.values("counters")["own_packets_stopped"]
        assert stopped >= 2
        said = f"{stopped} stopped by rules of this host; krelay doctor names them"
        return bool(world.values("status")["own_packets"] == said)

    world.until(is_said, "how many were stopped")
    world.until(lambda: "stop krelay's own packets" in world.krelay_process.output, "a warning")

    for fix in dict.fromkeys(f["fix"] for f in told):
        type_as_root(world, fix)
    assert about_own(doctor(world, world.client)[1]) == []
    assert is_reset(killed(world), 5)
    assert is_refused(world, GPORT, 5)


def test_a_refused_client_of_udp_is_told_once_the_fix_is_in(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.begin(services="udp/7")
    close_output(world, "nft")
    world.put(limits__new_flows_per_client=1)

    def told(within: float) -> bool:
        """Whether one of some new flows hears that it is refused."""
        socks = [world.open("client", socket.SOCK_DGRAM) for _ in range(4)]
        for sock in socks:
            sock.connect((world.relay, 7))
            sock.send(b"x")
        deadline = time.monotonic() + within
        for sock in socks:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock.recv(100)
            except OSError as error:
                if not isinstance(error, TimeoutError):
                    return True
        return False

    assert not told(0.5)
    (found,) = about_own(doctor(world, world.client)[1])
    assert found["text"].startswith("icmp that krelay itself sends to clients is dropped")
    type_as_root(world, found["fix"])
    assert told(5)
    assert about_own(doctor(world, world.client)[1]) == []
