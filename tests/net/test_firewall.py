"""Beside a stateful firewall and NAT of the host: both work, and neither is touched."""

import pytest

from tests.net.world import GPORT, World

pytestmark = pytest.mark.net

FIREWALL = f"""
table inet guard {{
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    tcp dport {GPORT} accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    udp dport 53 ct state new accept
  }}
}}
"""
MASQUERADE = """
table ip nat_of_host {
  chain post {
    type nat hook postrouting priority srcnat; policy accept;
    oifname { %s } masquerade
  }
}
"""
IPTABLES = """
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:foreign - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport %d -j ACCEPT
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -p udp -m udp --dport 53 -m conntrack --ctstate NEW -j ACCEPT
-A foreign -s 192.0.2.1/32 -j DROP
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
-A PREROUTING -s 192.0.2.2/32 -j DROP
COMMIT
*mangle
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -s 192.0.2.3/32 -j DROP
COMMIT
"""


@pytest.fixture
def busy(world: World) -> World:
    """HTTP and DNS servers, and a relay host with rules of its own."""
    world.serve("server", "tcp/80")
    world.dnsmasq("server", 53, {"www.example": "10.9.8.7"})
    return world


def dig(world: World) -> str:
    """What dig says, asking the relay."""
    command = ("dig", f"@{world.relay}", "+short", "+tries=2", "+time=2", "www.example")
    return world.lab.run("client", *command, check=False).stdout


def test_http_and_dns_pass_a_stateful_firewall(busy: World) -> None:
    busy.nft("relay", FIREWALL)
    before = busy.rules()
    busy.begin()

    assert busy.who("client", 80).startswith(f"{busy.client}:")
    busy.download("client", 80, seed=1, size=10 << 20).finish()
    assert dig(busy) == "10.9.8.7\n"
    assert f"query[A] www.example from {busy.client}" in log_of(busy)
    busy.krelay("stop")
    assert busy.rules() == before


def test_http_and_dns_pass_a_firewall_of_iptables_which_stays_as_it_is(busy: World) -> None:
    busy.lab.run("relay", "iptables-restore", input=IPTABLES % GPORT)
    before = busy.rules()
    busy.begin()

    assert busy.who("client", 80).startswith(f"{busy.client}:")
    assert dig(busy) == "10.9.8.7\n"
    shown = busy.rules().splitlines()
    foreign = [rule for rule in (IPTABLES % GPORT).splitlines() if rule.startswith("-A")]
    assert [rule for rule in foreign if shown.count(rule) != 1] == []
    busy.kill(busy.krelay_process)
    busy.start_krelay()
    busy.krelay("stop")
    assert busy.rules() == before


def test_the_servers_see_the_client_beside_masquerading_towards_the_clients(
    busy: World,
) -> None:
    busy.nft("relay", FIREWALL)
    busy.nft("relay", MASQUERADE % '"eth0"')
    before = busy.rules()
    busy.begin()

    assert busy.who("client", 80).startswith(f"{busy.client}:")
    assert dig(busy) == "10.9.8.7\n"
    assert f"query[A] www.example from {busy.client}" in log_of(busy)
    busy.krelay("stop")
    assert busy.rules() == before


def test_http_keeps_the_client_and_dns_works_beside_masquerading_everywhere(
    busy: World,
) -> None:
    """TCP gets the client's address after the host's NAT, UDP before it: there NAT has its way."""
    busy.nft("relay", FIREWALL)
    busy.nft("relay", MASQUERADE % '"eth0", "eth1"')
    before = busy.rules()
    busy.begin()

    assert busy.who("client", 80).startswith(f"{busy.client}:")
    busy.download("client", 80, seed=1, size=10 << 20).finish()
    assert dig(busy) == "10.9.8.7\n"
    assert f"query[A] www.example from {busy.relay}" in log_of(busy)
    busy.krelay("stop")
    assert busy.rules() == before


def log_of(world: World) -> str:
    """dnsmasq's."""
    (program,) = (one for one in world.lab.programs if one.argv[0] == "dnsmasq")
    return program.output
