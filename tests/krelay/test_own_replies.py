"""The worker and this host's own packets from relayed ports: whose the replies are.

K and G are this host, Q is somebody on the clients' side.
"""

import pytest

from knet.endpoint import Source
from krelay.datapath.verdict import Verdict
from krelay.nat.ownflows import REPLIED, UNREPLIED
from krelay.steps import Hook
from tests.tools.packets import at, policy, template
from tests.tools.script import Host, describe, play

NTP = policy(udp=frozenset({53, 123}), tcp=frozenset({80, 443}), forwarded=frozenset({443}))


@pytest.mark.parametrize("source", Source)
def test_replies_go_on_and_strangers_are_clients(source: Source) -> None:
    host = play(
        f"""
    0     set   udp=53,123 source={source}
    0     post  G:123 > Q:123                 => pass own
    0     pre   Q:123 > G:123                 => pass own
    1     post  K:123 > S:123                 => pass own
    1     pre   S:123 > K:123                 => pass own
    2     post  G:53 > Q:53                   => pass own
    2     pre   Q:53 > G:53                   => pass own
    """
        + (
            """
    3     pre   Q:124 > G:123                 => Q:124 > S:123
    3     pre   D:123 > G:123                 => D:123 > S:123
    3     pre   Q:123 > K:123                 => Q:123 > S:123
    """
            if source is Source.CLIENT
            else ""
        )
    )
    assert len(host.nat) == (3 if source is Source.CLIENT else 0)
    assert len(host.nat.own_flows) == 3


def test_nothing_is_remembered_of_other_ports() -> None:
    host = play("""
    0     set   udp=123 tcp=80
    0     post  K:5000 > S:123                => pass own
    0     post  K:80 > Q:80 [S.]              => pass no_flow
    0     post  K:80 > Q:80 [.]               => pass no_flow
    0     post  K:8080 > Q:80 [S]             => pass own
    0     pre   Q:80 > K:80 [S]               => Q:80 > K:16000
    """)
    assert len(host.nat.own_flows) == 0


def test_replies_to_own_connections_go_on() -> None:
    host = play(
        """
    0     post  K:80 > Q:80 [S]               => pass own
    0     pre   Q:80 > K:80 [S.]              => pass own
    1     post  K:443 > Q:80 [S]              => pass own
    1     pre   Q:80 > K:443 [S.]             => pass own
    1     pre   Q:80 > K:443 [.]              => pass own
    1     pre   Q:80 > K:443 [P.]             => pass own
    2     post  K:80 > S:80 [S]               => pass own
    2     pre   S:80 > K:80 [S.]              => pass own
    2     post  K:443 > S:443 [S]             => pass own
    2     pre   S:443 > K:443 [S.]            => pass own
    7441  pre   Q:80 > K:443 [.]              => Q:80 > S:443
    """,
        on=NTP,
    )
    assert len(host.nat) == 1


@pytest.mark.parametrize("proto", ["", " [S]"])
def test_a_clients_flow_stays_its_own(proto: str) -> None:
    port, to = (443, "S:443") if proto else (123, "S:123")
    host = play(
        f"""
    0     pre   Q:500 > K:{port}{proto}       => Q:500 > {to}
    0     post  {to} > Q:500{" [S.]" if proto else ""} => K:{port} > Q:500
    0     post  K:{port} > Q:500{proto}       => pass own
    0     pre   Q:500 > K:{port}{" [.]" if proto else ""} => Q:500 > {to}
    """,
        on=NTP,
    )
    assert (len(host.nat), len(host.nat.own_flows)) == (1, 0)


def test_an_unanswered_flow_that_began_with_a_reply_ends() -> None:
    host = play(
        """
    0     pre   Q:123 > K:123                 => Q:123 > S:123
    1     post  K:123 > Q:123                 => pass own
    1     pre   Q:123 > K:123                 => pass own
    """,
        on=NTP,
    )
    assert len(host.nat) == 0


def test_own_flows_are_remembered_as_conntrack_does() -> None:
    play(
        f"""
    0     post  K:123 > Q:123                 => pass own
    0     post  K:123 > D:123                 => pass own
    1     pre   D:123 > K:123                 => pass own
    {UNREPLIED}  pre   Q:123 > K:123          => Q:123 > S:123
    {REPLIED}  pre   D:123 > K:123            => pass own
    {2 * REPLIED}  pre   D:123 > K:123        => D:123 > S:123
    """,
        on=NTP,
    )


def test_packets_from_this_host_never_begin_for_others() -> None:
    """Only what it sends itself: a reply that is forged, or comes from elsewhere, is a client's."""
    host = play(
        """
    0     post  Q:123 > D:123                 => pass no_flow
    0     pre   D:123 > K:123                 => D:123 > S:123
    0     post  K:123 > Q:123                 => pass own
    0     pre   D:124 > K:123                 => D:124 > S:123
    """,
        on=NTP,
    )
    assert len(host.nat.own_flows) == 1


def test_own_packets_go_on_while_recovering() -> None:
    play(
        """
    0     set   recovering=5
    0     post  K:123 > Q:123                 => pass own
    0     pre   Q:123 > K:123                 => pass own
    0     post  K:443 > Q:80 [S]              => pass own
    0     pre   Q:80 > K:443 [S.]             => pass own
    """,
        on=NTP,
    )


def test_what_krelay_asks_clients_is_no_flow_of_the_hosts() -> None:
    """While recovering; its answer is that of a connection which is picked up."""
    host = Host(NTP)
    host.worker.recovering_until = 5.0
    packet = template("S:443 > C:40000 [P.]").build()
    assert host.worker.handle(packet, Hook.POSTROUTING, 0.0) is Verdict.DROP
    queries = host.worker.answers.copy()
    host.worker.answers.clear()
    assert [describe(each) for each in queries] == [
        "G:443 > C:40000 [S]",
        "K:443 > C:40000 [S]",
    ]
    for each in queries * 2:  # as when two packets of the server's came
        assert host.worker.handle(each, Hook.POSTROUTING, 0.0) is Verdict.PASS
    assert len(host.nat.own_flows) == 0
    assert host.run(0.0, "pre", "C:40000 > K:443 [.]") == "C:40000 > S:443"


def test_a_port_that_tcp_relay_had_may_begin_for_the_host() -> None:
    play(
        """
    0     set   tcp=80,45678
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    0     post  K:45678 > S:80 [S]            => C:45678 > S:80
    0     close K:45678
    1     post  K:45678 > S:80 [S!]           => pass own
    1     pre   S:80 > K:45678 [S.]           => pass own
    """
    )


def test_connections_of_this_host_are_not_picked_up() -> None:
    """They were there before krelay; the kernel knows them."""
    host = Host(NTP)
    host.worker.has_connection = lambda own, peer: (own, peer) == (at("K:443"), at("Q:80"))

    assert host.run(0.0, "pre", "Q:80 > K:443 [.]") == "pass own"
    host.worker.has_connection = lambda own, peer: False
    assert host.run(1.0, "pre", "Q:80 > K:443 [P.]") == "pass own"
    assert host.run(1.0, "pre", "Q:81 > K:443 [.]") == "Q:81 > S:443"
    assert len(host.nat) == 1
