"""The packet path: every case of the design as a trace, a slow twin, and a lot of nonsense.

The twin is tests.tools.packets: a rewritten packet equals one built from scratch.  The nonsense is
a hundred thousand damaged packets, of which only a flow's may come out changed.
"""

import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP

from knet.endpoint import Endpoint, FiveTuple, Proto, Source, flow_key
from knet.wire import BadPacket, ipv4
from krelay.datapath.probes import liveness_probes
from krelay.datapath.readdress import flow_of, readdressed
from krelay.datapath.refusals import ANSWERS_AT_ONCE, TOLD_EACH
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Rewrite, Timeouts, deltas
from krelay.nat.table import NatTable
from krelay.steps import Hook, Step
from tests.tools.observing import observe
from tests.tools.packets import (
    Template,
    addr,
    at,
    flow,
    policy,
    template,
    with_zero_check,
    with_zero_ip_check,
)
from tests.tools.script import RECORD_ROUTE, Host, describe, play
from tests.tools.strategies import mutated, rewritings

RELAY = policy(source=Source.RELAY)

# The two handshakes and T1 to T4 of one connection, which many scripts begin with.
CONNECTED = """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     post  K:16000 > C:40000 [S.]        => K:80 > C:40000
    0     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    0     post  K:45678 > S:80 [S]            => C:45678 > S:80
    0     pre   S:80 > C:45678 [S.]           => S:80 > K:45678
    0     post  K:45678 > S:80 [.]            => C:45678 > S:80
"""
CONFIRMED = """
    0     set   udp=53,7
    0     pre   C:4000 > K:7                  => C:4000 > S:7
    0     post  S:7 > C:4000                  => K:7 > C:4000
    0     pre   C:4000 > K:7                  => C:4000 > S:7
"""


def states(host: Host) -> list[str]:
    return [flow.state for flow in host.nat]


# The steps, system.md section 2


def test_a_connection_takes_the_steps_t1_to_t4() -> None:
    host = play(
        CONNECTED
        + """
    1     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    1     post  K:45678 > S:80 [P.]           => C:45678 > S:80
    1     pre   S:80 > C:45678 [P.]           => S:80 > K:45678
    1     post  K:16000 > C:40000 [P.]        => K:80 > C:40000
    2     pre   C:40000 > K:80 [F.]           => C:40000 > K:16000
    2     post  K:45678 > S:80 [F.]           => C:45678 > S:80
    2     pre   S:80 > C:45678 [F.]           => S:80 > K:45678
    2     post  K:16000 > C:40000 [F.]        => K:80 > C:40000
    2     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    """
    )

    assert host.steps == {"T1": 5, "T2": 3, "T3": 4, "T4": 3}
    assert states(host) == ["closing"]


def test_with_source_relay_the_server_sees_the_relay() -> None:
    host = play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 relay
    0     post  K:45678 > S:80 [S]            => K:45678 > S:80
    0     pre   S:80 > K:45678 [S.]           => S:80 > K:45678
    0     pre   S:80 > C:45678 [S.]           => pass no_flow
    0     post  K:16000 > C:40000 [S.]        => K:80 > C:40000
    """,
        on=RELAY,
    )

    assert host.steps == {"T1": 1, "T2": 1, "T3": 1, "T4": 1}


def test_udp_takes_the_steps_u1_to_u4_two_at_a_time() -> None:
    host = play("""
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     post  S:53 > C:4000                 => K:53 > C:4000
    1     pre   C:4000 > K:53                 => C:4000 > S:53
    """)

    assert host.steps == {"U1,U2": 2, "U3,U4": 1}
    assert states(host) == ["replied"]


def test_with_source_relay_udp_takes_each_step_by_itself() -> None:
    host = play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53    # U1
    0     post  C:4000 > S:53                 => K:4000 > S:53    # U2
    0     pre   S:53 > K:4000                 => S:53 > C:4000    # U3
    0     post  S:53 > C:4000                 => K:53 > C:4000    # U4
    """,
        on=RELAY,
    )

    assert host.steps == {"U1": 1, "U2": 1, "U3": 1, "U4": 1}
    assert states(host) == ["replied"]


def test_both_addresses_of_the_relay_serve() -> None:
    play("""
    0     pre   C:40000 > G:80 [S]            => C:40000 > G:16000
    0     post  G:16000 > C:40000 [S.]        => G:80 > C:40000
    0     pre   C:4000 > G:53                 => C:4000 > S:53
    0     post  S:53 > C:4000                 => G:53 > C:4000
    """)


# Cases that are easy to forget


def test_the_relay_hosts_own_connection_to_the_server_goes_on_untouched() -> None:
    play(
        CONNECTED
        + """
    0     post  K:50000 > S:80 [S]            => pass own
    0     pre   S:80 > K:50000 [S.]           => pass no_flow
    0     post  K:50000 > S:80 [.]            => pass no_flow
    0     post  K:50001 > S:53                => pass own
    0     pre   S:53 > K:50001                => pass no_flow
    """
    )


def test_the_hosts_own_query_keeps_its_port_to_itself() -> None:
    play(
        """
    0     post  K:4000 > S:53                 => pass own         # the host's own
    0     pre   C:4000 > K:53                 => C:moved > S:53
    0     post  C:moved > S:53                => K:moved > S:53
    0     pre   S:53 > K:4000                 => pass no_flow     # its answer
    0     pre   S:53 > K:moved                => S:53 > C:moved
    0     post  S:53 > C:moved                => K:53 > C:4000
    """,
        on=RELAY,
    )


def test_who_talks_to_the_gateway_port_itself_is_refused_and_never_relayed() -> None:
    host = play("""
    0     pre   C:40000 > K:16000 [S]         => drop gateway_port + K:16000 > C:40000 [R.]
    0     post  K:16000 > C:40000 [R.]        => drop no_flow     # not the one that was sent
    0     pre   C:40000 > K:16000 [R]         => drop gateway_port
    0     post  K:16000 > C:40000 [R]         => drop no_flow
    0     pre   C:40000 > K:16000 [.]         => drop gateway_port + K:16000 > C:40000 [R]
    0     open  C:40000 @16000 from K:45678   => refused: no row for this client
    """)

    assert len(host.nat) == 0


def refused_directly(worker: Worker, client: str, now: float = 0) -> bytes:
    """The RST that answers a SYN of this client to the gateway port."""
    syn = template(f"{client} > K:16000 [S]").build()
    assert worker.handle(syn, Hook.PREROUTING, now) is Verdict.DROP
    return worker.answers.pop()


def test_a_refusal_goes_out_once_as_it_is() -> None:
    worker = Host(policy()).worker
    answer = refused_directly(worker, "C:40000")

    assert worker.handle(answer, Hook.POSTROUTING, 0) is Verdict.PASS
    assert worker.handle(answer, Hook.POSTROUTING, 0) is Verdict.DROP


def test_a_refusal_is_not_taken_for_a_packet_of_the_flow_between_the_same_ports() -> None:
    """A client talks to the gateway port from the port of its relayed connection."""
    host = play(CONNECTED)
    [flow] = host.nat
    answer = refused_directly(host.worker, "C:40000")

    assert host.worker.handle(answer, Hook.POSTROUTING, 0) is Verdict.PASS
    assert str(flow.state) == "established"
    ours = template("K:16000 > C:40000 [R.]").build()
    assert host.worker.handle(ours, Hook.POSTROUTING, 0) not in list(Verdict)
    assert str(flow.state) == "closing"


def test_the_gateway_port_is_refused_also_to_a_client_that_is_relayed() -> None:
    play(
        CONNECTED
        + """
    1     pre   C:40000 > K:16000 [.]         => drop gateway_port + K:16000 > C:40000 [R]
    1     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    """
    )


def test_an_answer_of_the_gateway_port_never_goes_out_unrewritten() -> None:
    play("""
    0     post  K:16000 > C:40000 [S.]        => drop no_flow
    0     post  K:16000 > C:40000 [P.]        => drop no_flow
    0     set   tcp=
    0     post  K:16000 > C:40000 [.]         => drop no_flow
    """)


@pytest.mark.parametrize("client", ["S", "N"])
def test_the_server_and_its_neighbours_are_relayed_with_source_relay(client: str) -> None:
    play(
        """
    0     pre   X:40000 > K:80 [S]            => X:40000 > K:16000
    0     open  X:40000 @16000 from K:45678   => S:80 relay
    0     post  K:45678 > S:80 [S]            => K:45678 > S:80
    0     pre   S:80 > K:45678 [S.]           => S:80 > K:45678
    0     post  K:16000 > X:40000 [S.]        => K:80 > X:40000
    0     pre   X:4000 > K:53                 => X:4000 > S:53
    0     post  X:4000 > S:53                 => K:4000 > S:53
    0     pre   S:53 > K:4000                 => S:53 > X:4000
    0     post  S:53 > X:4000                 => K:53 > X:4000
    """.replace("X:", f"{client}:")
    )


def test_the_server_itself_is_relayed_with_source_relay_also_behind_a_router() -> None:
    """Whatever subnets are beside it."""
    for client, source in (("S", Source.RELAY), ("N", Source.CLIENT), ("C", Source.CLIENT)):
        assert policy(beside=()).source_for(addr(client)) is source


def test_new_flows_are_led_to_the_backend_with_the_services_port() -> None:
    service, client = Endpoint(addr("K"), 443), Endpoint(addr("C"), 40000)
    assert policy().backend_for(service, client) == Endpoint(addr("S"), 443)
    assert policy().backends == {addr("S")}
    assert replace(policy(), server=addr("Z")).backends == {addr("Z")}


def test_a_relay_port_that_is_the_clients_own_direct_connections_is_refused() -> None:
    play("""
    0     pre   C:45678 > S:80 [S]            => pass direct
    0     pre   S:80 > C:45678 [S.]           => pass no_flow
    1     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    1     open  C:40000 @16000 from K:45678   => refused: relay port is taken
    1     open  C:40000 @16000 from K:45679   => S:80 client
    1     post  K:45679 > S:80 [S]            => C:45679 > S:80
    2     pre   S:80 > C:45678 [.]            => pass no_flow
    2     pre   C:45678 > S:80 [.]            => pass direct
    2     pre   S:80 > C:45679 [S.]           => S:80 > K:45679
    """)


def test_a_direct_connection_that_comes_later_is_moved_to_another_port() -> None:
    host = play(
        CONNECTED
        + """
    1     pre   C:45678 > S:80 [S]            => C:moved > S:80   # D1
    1     pre   S:80 > C:moved [S.]           => S:80 > C:45678   # D2
    1     pre   C:45678 > S:80 [.]            => C:moved > S:80
    1     pre   S:80 > C:45678 [P.]           => S:80 > K:45678   # the relayed one
    1     post  K:45678 > S:80 [.]            => C:45678 > S:80
    2     pre   C:45678 > S:80 [P.]           => C:moved > S:80
    """
    )

    assert host.steps["D1"] == 3
    assert states(host) == ["established", "established"]


def test_a_direct_connection_is_moved_also_when_only_flows_still_use_the_service() -> None:
    play(
        CONNECTED
        + """
    1     set   tcp=443
    1     pre   C:45678 > S:80 [S]            => C:moved > S:80
    1     pre   S:80 > C:moved [S.]           => S:80 > C:45678
    1     pre   S:80 > C:45678 [P.]           => S:80 > K:45678
    """
    )


def test_a_moved_connection_from_a_port_used_again_keeps_its_flow_while_it_idles() -> None:
    play(
        CONNECTED
        + """
    1     pre   C:45678 > S:80 [S]            => C:moved > S:80
    1     pre   S:80 > C:moved [R.]           => S:80 > C:45678
    2     pre   C:45678 > S:80 [S]            => C:moved > S:80
    2     pre   S:80 > C:moved [S.]           => S:80 > C:45678
    2     pre   C:45678 > S:80 [.]            => C:moved > S:80
    400   pre   C:45678 > S:80 [P.]           => C:moved > S:80
    """
    )


def test_the_hosts_own_query_from_a_port_that_a_flow_uses_gets_its_own_answer() -> None:
    play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     post  C:4000 > S:53                 => K:4000 > S:53
    0     post  K:4000 > S:53                 => K:moved > S:53
    0     pre   S:53 > K:moved                => S:53 > K:4000
    """,
        on=RELAY,
    )


def test_a_relayed_query_leaves_a_clients_own_its_port() -> None:
    play("""
    0     pre   C:4000 > S:53                 => pass direct
    0     pre   C:4000 > K:53                 => C:moved > S:53
    0     post  S:53 > C:4000                 => pass no_flow     # the direct one's answer
    0     post  S:53 > C:moved                => K:53 > C:4000
    0     pre   C:4000 > S:53                 => pass direct
    """)


@pytest.mark.parametrize("source", Source)
def test_a_clients_own_query_from_a_relayed_port_is_moved(source: Source) -> None:
    host = play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   C:4000 > S:53                 => C:moved > S:53   # D1
    0     post  C:moved > S:53                => pass no_flow
    0     post  S:53 > C:moved                => S:53 > C:4000    # D2
    0     post  S:53 > C:4000                 => K:53 > C:4000
    """,
        on=policy(source=source),
    )

    assert (host.steps["D1"], host.steps["D2"]) == (1, 1)


def test_a_relay_port_that_equals_the_clients_port_is_refused() -> None:
    play("""
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:40000   => refused: relay port is taken
    0     open  C:40000 @16000 from K:40001   => S:80 client
    """)


def test_no_service_port_is_a_relay_port_so_that_a_late_answer_is_no_query() -> None:
    """NTP asks from port 123: with that as relay port, S:53 > K:123 would read as S asking K."""
    host = play(
        """
    0     pre   C:123 > K:123                 => C:other > S:123
    0     post  C:other > S:123               => K:other > S:123
    0     pre   S:123 > K:other               => S:123 > C:other
    400   pre   S:123 > K:other               => pass no_flow
    """,
        on=policy(source=Source.RELAY, udp=frozenset({53, 123})),
    )

    assert len(host.nat) == 0


def test_one_client_port_to_two_services_comes_to_tcp_relay_as_two() -> None:
    play("""
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     pre   C:40000 > K:443 [S]           => C:other > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    0     open  C:other @16000 from K:45679   => S:443 client
    0     post  K:16000 > C:40000 [S.]        => K:80 > C:40000
    0     post  K:16000 > C:other [S.]        => K:443 > C:40000
    0     pre   C:40000 > K:443 [P.]          => C:other > K:16000
    """)


def test_one_client_port_to_two_addresses_of_the_relay_makes_two_flows() -> None:
    play("""
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     pre   C:40000 > G:80 [S]            => C:other > G:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    0     open  C:other @16000 from K:45679   => S:80 client
    0     post  G:16000 > C:other [S.]        => G:80 > C:40000
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   C:4000 > G:53                 => C:second > S:53
    0     post  S:53 > C:4000                 => K:53 > C:4000
    0     post  S:53 > C:second               => G:53 > C:4000
    """)


def test_one_client_port_at_two_clients_is_nothing_special() -> None:
    play("""
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     pre   D:40000 > K:80 [S]            => D:40000 > K:16000
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   D:4000 > K:53                 => D:4000 > S:53
    """)


def test_two_clients_of_source_relay_get_two_ports_towards_the_server() -> None:
    play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   D:4000 > K:53                 => D:other > S:53
    0     post  D:other > S:53                => K:other > S:53
    0     pre   S:53 > K:other                => S:53 > D:other
    0     post  S:53 > D:other                => K:53 > D:4000
    """,
        on=RELAY,
    )


# Packets that can't be forwarded


@pytest.mark.parametrize("to", ["K:53", "S:53"], ids=["relayed", "direct"])
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({"ttl": 2, "payload": bytes(1172)}, None),
        ({"ttl": 1}, (11, 0, 0)),
        ({"ttl": 0}, (11, 0, 0)),
        ({"payload": bytes(1173)}, (3, 4, 1200)),
        ({"payload": bytes(1173), "fragment": 0}, None),
    ],
)
def test_a_first_packet_that_can_go_no_further_is_answered_by_icmp(
    to: str, what: dict[str, object], told: tuple[int, int, int] | None
) -> None:
    host = Host(policy(mtu=1200))
    packet = template(f"C:4000 > {to}", **what).build()
    got = host.worker.handle(packet, Hook.PREROUTING, 0)

    if told is None:
        assert (got is Verdict.PASS) == (to == "S:53")
        assert not host.worker.answers
        return
    assert got is Verdict.DROP
    assert host.worker.counts.dropped == {"not_forwarded": 1}
    assert len(host.nat) == 0
    [answer] = host.worker.answers
    error = IP(answer)
    assert (error.src, error.dst) == ("0.0.0.0", "10.0.0.1")  # the kernel knows its address best
    assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu or 0) == told
    assert answer[28:] == packet[:548]


def test_to_a_server_that_is_no_longer_the_server_another_link_may_lead() -> None:
    host = Host(policy(mtu=1200))
    host.run(0, "pre", "C:4000 > K:53")
    host.run(0, "set", "server=Z")
    host.worker.policy = replace(policy(mtu=1200), server=addr("Z"))
    large = template("C:4001 > S:53", payload=bytes(1400)).build()

    assert host.worker.handle(large, Hook.PREROUTING, 0) is Verdict.PASS


# Packets that open nothing


@pytest.mark.parametrize("flags", ["S.", ".", "P.", "F.", "R", "R.", "SR", "F", ""])
def test_only_a_syn_opens_a_connection(flags: str) -> None:
    host = play(f"0  pre  C:40000 > K:80 [{flags}]  => pass no_flow")

    assert len(host.nat) == 0


def test_whatever_no_rule_asks_for_goes_on_untouched() -> None:
    host = play("""
    0     pre   C:40000 > K:22 [S]            => pass no_flow
    0     pre   C:40000 > K:8080 [S]          => pass no_flow
    0     pre   C:4000 > K:80                 => pass no_flow     # UDP to a TCP service
    0     pre   C:4000 > S:80                 => pass no_flow
    0     pre   C:40000 > S:22 [S]            => pass no_flow
    0     pre   C:40000 > Z:80 [S]            => pass no_flow     # no server of ours
    0     post  S:53 > C:4000                 => pass no_flow
    0     post  K:22 > C:40000 [S.]           => pass no_flow
    """)

    assert len(host.nat) == 0


def test_what_is_neither_whole_nor_tcp_nor_udp_goes_on_and_is_counted() -> None:
    host = Host(policy())
    worker = host.worker
    packet = template("C:4000 > K:53").build()
    segment = template("C:40000 > K:80 [S]").build()
    fragment = template("C:4000 > K:53", fragment=0x2000).build()
    echo = ipv4.build(1, addr("C"), addr("K"), b"\x08\0\0\0\0\0\0\0")
    gre = ipv4.build(47, addr("C"), addr("K"), bytes(8))
    short_udp = ipv4.build(17, addr("C"), addr("K"), packet[20:27])
    short_tcp = ipv4.build(6, addr("C"), addr("K"), segment[20:39])
    long_udp = packet[:24] + (len(packet) - 19).to_bytes(2) + packet[26:]
    tiny_udp = packet[:24] + b"\0\x07" + packet[26:]
    for hook in Hook:
        strange = (fragment, echo, gre, short_udp, short_tcp, long_udp, tiny_udp)
        for bytes_ in (b"", b"\0" * 40, *strange):
            assert worker.handle(bytes_, hook, 0) is Verdict.PASS
        assert worker.handle(packet[:-1], hook, 0) is Verdict.DROP

    assert worker.counts.passed == {
        "short_header": 6,
        "bad_version": 2,
        "fragment": 2,
        "icmp_other": 2,
        "other_protocol": 2,
        "bad_length": 4,
    }
    assert worker.counts.dropped == {"truncated": 2}
    assert len(host.nat) == 0


def test_a_flows_packets_are_judged_alike() -> None:
    """The same as above where a flow would claim the addresses and ports."""
    host = Host(policy())
    worker = host.worker
    packet = template("C:4000 > K:53").build()
    assert worker.handle(packet, Hook.PREROUTING, 0) != Verdict.PASS
    long_udp = packet[:24] + (len(packet) - 19).to_bytes(2) + packet[26:]
    fragment = template("C:4000 > K:53", fragment=0x2000).build()

    for bytes_ in (long_udp, fragment):
        assert worker.handle(bytes_, Hook.PREROUTING, 0) is Verdict.PASS
    assert worker.handle(packet[:-1], Hook.PREROUTING, 0) is Verdict.DROP
    assert worker.counts.passed == {"bad_length": 1, "fragment": 1}

    segment = template("C:40000 > K:80 [P.]").build()
    assert worker.handle(template("C:40000 > K:80 [S]").build(), Hook.PREROUTING, 0)
    assert worker.handle(segment, Hook.PREROUTING, 0) != Verdict.PASS
    assert worker.handle(segment[:-1], Hook.PREROUTING, 0) is Verdict.DROP
    assert worker.handle(segment + b"\0", Hook.PREROUTING, 0) is Verdict.PASS
    assert worker.counts.passed == {"bad_length": 2, "fragment": 1}
    assert worker.counts.dropped == {"truncated": 2}


# Changes under live flows


def test_flows_keep_their_gateway_port_and_new_ones_get_the_new() -> None:
    play(
        CONNECTED
        + """
    1     set   gport=17000
    1     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    1     post  K:16000 > C:40000 [P.]        => K:80 > C:40000
    1     pre   C:40001 > K:80 [S]            => C:40001 > K:17000
    1     post  K:17000 > C:40001 [S.]        => K:80 > C:40001
    1     pre   D:5000 > K:17000 [S]          => drop gateway_port + K:17000 > D:5000 [R.]
    1     pre   D:5000 > K:16000 [S]          => drop gateway_port + K:16000 > D:5000 [R.]
    1     post  K:16000 > D:5001 [S.]         => drop no_flow
    1     close K:45678
    20    pre   D:5000 > K:16000 [S]          => pass no_flow     # nobody's any more
    """
    )


def test_the_same_client_port_may_come_to_two_gateway_ports() -> None:
    play("""
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     set   gport=17000
    0     pre   C:40000 > K:443 [S]           => C:40000 > K:17000
    0     open  C:40000 @17000 from K:45679   => S:443 client
    0     open  C:40000 @16000 from K:45678   => S:80 client
    """)


def test_flows_keep_their_server_and_new_ones_get_the_new() -> None:
    play(
        CONNECTED
        + """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    1     set   server=Z
    1     post  K:45678 > S:80 [P.]           => C:45678 > S:80
    1     pre   C:4000 > K:53                 => C:4000 > S:53
    1     pre   C:4001 > K:53                 => C:4001 > Z:53
    1     pre   C:40001 > K:80 [S]            => C:40001 > K:16000
    1     open  C:40001 @16000 from K:45679   => Z:80 client
    1     post  K:45679 > Z:80 [S]            => C:45679 > Z:80
    1     pre   C:45678 > S:80 [S]            => C:moved > S:80   # the old server is still minded
    """
    )


def test_flows_keep_their_source_and_new_ones_get_the_new() -> None:
    play(
        CONNECTED
        + """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    1     set   source=relay
    1     post  K:45678 > S:80 [P.]           => C:45678 > S:80
    1     pre   C:4000 > K:53                 => C:4000 > S:53
    1     post  C:4000 > S:53                 => pass no_flow
    1     pre   C:4001 > K:53                 => C:4001 > S:53
    1     post  C:4001 > S:53                 => K:4001 > S:53
    1     pre   C:40001 > K:80 [S]            => C:40001 > K:16000
    1     open  C:40001 @16000 from K:45679   => S:80 relay
    """
    )


def test_a_service_that_is_gone_serves_its_flows_and_no_new_ones() -> None:
    play(
        CONNECTED
        + """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    1     set   tcp=443 udp=
    1     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    1     pre   S:80 > C:45678 [P.]           => S:80 > K:45678
    1     pre   C:4000 > K:53                 => C:4000 > S:53
    1     pre   C:40001 > K:80 [S]            => pass no_flow
    1     pre   C:4001 > K:53                 => pass no_flow
    """
    )


def test_while_stopping_flows_live_on_and_nothing_new_begins() -> None:
    play(
        CONNECTED
        + """
    1     set   off
    1     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    1     post  K:16000 > C:40000 [R.]        => K:80 > C:40000
    1     pre   C:40001 > K:80 [S]            => pass not_relaying
    1     pre   C:4001 > K:53                 => pass not_relaying
    1     pre   C:40000 > K:80 [S]            => drop not_relaying
    """
    )


# Ports used again, and late packets


def test_a_syn_on_a_closing_flow_is_for_the_relays_host_to_judge() -> None:
    """It has forgotten the former connection, so tcp-relay accepts another one: beside the old
    server leg, which tcp-relay hasn't closed yet."""
    host = play(
        CONNECTED
        + """
    1     pre   C:40000 > K:80 [R]            => C:40000 > K:16000
    2     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    2     post  K:16000 > C:40000 [S.]        => K:80 > C:40000
    2     open  C:40000 @16000 from K:45679   => S:80 client
    2     post  K:45679 > S:80 [S]            => C:45679 > S:80
    2     pre   S:80 > C:45678 [F.]           => S:80 > K:45678   # the old server leg
    2     post  K:45678 > S:80 [R]            => C:45678 > S:80
    200   pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    200   pre   S:80 > C:45679 [S.]           => S:80 > K:45679
    243   pre   S:80 > C:45678 [.]            => pass no_flow     # it is gone now
    243   pre   S:80 > C:45679 [.]            => S:80 > K:45679
    """
    )

    assert len(host.nat) == 1


def test_a_syn_on_a_closed_flow_takes_its_place_and_its_port() -> None:
    host = play(
        CONNECTED
        + """
    1     close K:45678
    2     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    2     post  K:45678 > S:80 [.]            => C:45678 > S:80   # lingers
    2     open  C:40000 @16000 from K:45678   => S:80 client
    2     post  K:45678 > S:80 [S]            => C:45678 > S:80
    13    pre   S:80 > C:45678 [S.]           => S:80 > K:45678
    13    pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    """
    )

    assert len(host.nat) == 1
    assert states(host) == ["established"]


def test_a_syn_on_an_open_flow_is_that_flows() -> None:
    host = play(
        CONNECTED
        + """
    1     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    """
    )

    assert len(host.nat) == 1


def test_a_syn_on_a_closed_flow_of_a_service_that_is_gone_is_dropped() -> None:
    play(
        CONNECTED
        + """
    1     close K:45678
    1     set   tcp=443
    2     pre   C:40000 > K:80 [S]            => drop not_relaying
    """
    )


# Ports that are free again, and who else may have them


def test_who_connects_from_a_port_that_tcp_relay_has_left_is_himself() -> None:
    """The flow lingers; its late packets pass until the port is somebody's."""
    host = play(
        CONNECTED
        + """
    1     close K:45678
    2     pre   S:80 > C:45678 [F.]           => S:80 > K:45678
    2     post  K:45678 > S:80 [R]            => C:45678 > S:80
    3     post  K:45678 > S:80 [S]            => pass own
    3     pre   S:80 > K:45678 [S.]           => pass no_flow     # to the host itself
    3     post  K:45678 > S:80 [P.]           => pass no_flow
    3     pre   S:80 > C:45678 [S.]           => pass no_flow
    3     post  K:16000 > C:40000 [F.]        => K:80 > C:40000   # the client's leg lingers
    """
    )
    assert host.nat.tables[Hook.POSTROUTING, Proto.TCP].keys() == {
        flow_key(at("K:16000"), at("C:40000"))
    }


def test_who_connects_from_the_port_of_a_flow_that_krelay_takes_for_open_is_himself() -> None:
    """tcp-relay has died, or its closing isn't known yet: the number tells."""
    host = play(
        CONNECTED
        + """
    1     post  K:45678 > S:80 [S!]           => pass own
    1     post  K:45678 > S:80 [P.]           => pass no_flow
    12    pre   C:40000 > K:80 [.]            => pass no_flow
    """
    )
    assert len(host.nat) == 0


def test_a_syn_that_is_repeated_is_tcp_relays() -> None:
    play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    0     post  K:45678 > S:80 [S]            => C:45678 > S:80
    1     post  K:45678 > S:80 [S]            => C:45678 > S:80
    3     post  K:45678 > S:80 [S]            => C:45678 > S:80
    3     pre   S:80 > C:45678 [S.]           => S:80 > K:45678
    3     post  K:45678 > S:80 [S]            => C:45678 > S:80   # the answer came late
    """
    )


def test_data_in_a_strangers_syn_is_his_own_as_well() -> None:
    """TCP Fast Open (RFC 7413)."""
    host = play(CONNECTED + "    1     close K:45678")
    syn = template("K:45678 > S:80 [S]", payload=b"GET /", tcp_options=bytes((34, 2, 1, 1)))

    assert host.worker.handle(syn.build(), Hook.POSTROUTING, 2) is Verdict.PASS
    assert host.run(2, "post", "K:45678 > S:80 [.]") == "pass no_flow"


def test_with_source_relay_a_strangers_packets_are_not_the_flows_either() -> None:
    host = play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 relay
    0     post  K:45678 > S:80 [S]            => K:45678 > S:80
    0     pre   S:80 > K:45678 [S.]           => S:80 > K:45678
    1     close K:45678
    2     post  K:45678 > S:80 [S]            => pass own
    2     pre   S:80 > K:45678 [S.]           => pass no_flow
    """,
        on=RELAY,
    )
    assert host.steps == {"T1": 1, "T3": 1, "T4": 1}


def test_after_tcp_relays_death_nobody_connects_in_its_clients_names() -> None:
    host = play(
        CONNECTED
        + """
    0     pre   D:50000 > K:80 [S]            => D:50000 > K:16000
    0     open  D:50000 @16000 from K:45679   => S:80 client      # and dies before it connects
    """
    )
    for who in list(host.relays._owner.values()):
        host.relays.lost(who, 1)

    assert host.run(1, "post", "K:45678 > S:80 [R]") == "C:45678 > S:80"
    assert host.run(1, "post", "K:16000 > C:40000 [R]") == "K:80 > C:40000"
    assert host.run(2, "pre", "S:80 > D:45679 [S]") == "pass no_flow"
    assert host.run(2, "post", "K:45678 > S:80 [S]") == "pass own"
    assert host.run(2, "post", "K:45679 > S:80 [S]") == "pass own"


def test_a_resumed_connection_has_no_syn_of_its_own() -> None:
    play(
        """
    0     resume C:40000 @16000 from K:45678 to S:80 => resumed
    1     post  K:45678 > S:80 [.]            => C:45678 > S:80
    1     pre   S:80 > C:45678 [.]            => S:80 > K:45678
    2     post  K:45678 > S:80 [S]            => pass own
    2     post  K:45678 > S:80 [.]            => pass no_flow
    """
    )


def test_a_server_that_connects_to_a_free_port_meets_nobody_on_the_relay() -> None:
    play(
        CONNECTED
        + """
    1     pre   S:80 > C:45678 [S]            => S:80 > K:45678   # tcp-relay's host judges it
    2     close K:45678
    3     pre   S:80 > C:45678 [S]            => pass no_flow     # the client's, if anybody's
    3     pre   S:80 > C:45678 [S.]           => pass no_flow
    """
    )


def test_nobody_connects_from_the_gateway_port_in_a_services_name() -> None:
    play(
        CONNECTED
        + """
    1     post  K:16000 > C:40000 [S]         => drop no_flow
    1     post  K:16000 > C:40000 [.]         => K:80 > C:40000
    2     close K:45678
    3     post  K:16000 > C:40000 [S]         => drop no_flow
    3     post  K:16000 > C:40000 [F.]        => K:80 > C:40000
    """
    )


@pytest.mark.parametrize("source", list(Source))
def test_the_hosts_own_datagrams_are_no_flows_whatever_port_they_have(source: Source) -> None:
    """Nobody holds the relay port of a flow: it is no socket's, and may be anybody's."""
    host = play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     post  K:4000 > S:53                 => SELF
    """.replace("SELF", "pass own" if source is Source.CLIENT else "K:p > S:53"),
        on=policy(source=source),
    )
    if source is Source.RELAY:
        own = list(host.nat)[1].rewrites[Step.D1].src.port
        assert host.run(0, "pre", "S:53 > K:4000") == "S:53 > C:4000"
        assert host.run(0, "pre", f"S:53 > K:{own}") == "S:53 > K:4000"


# What flags alone decide nothing about


@pytest.mark.parametrize("forged", ["F.", "R", "R.", "FR.", "SF", "S.", "P.", "", "FSRPU."])
def test_forged_packets_of_both_ends_take_no_connection_from_its_client(forged: str) -> None:
    host = play(CONNECTED)
    [flow] = host.nat
    flags = f"[{forged}!]"
    for _ in range(2):
        assert host.run(1, "pre", f"C:40000 > K:80 {flags}") == "C:40000 > K:16000"
        assert host.run(1, "pre", f"S:80 > C:45678 {flags}") == "S:80 > K:45678"
    assert host.run(2, "pre", "C:40000 > K:80 [S!]") == "C:40000 > K:16000"
    assert host.run(2, "post", "K:16000 > C:40000 [.]") == "K:80 > C:40000"  # which that host says

    assert (list(host.nat), flow.state) == ([flow], "established")
    host.nat.expire(7440)
    assert list(host.nat) == [flow]


def test_a_forged_syn_while_a_connection_closes_leaves_its_last_bytes_their_way() -> None:
    """They may be lost and sent again, by a host that only listens to right numbers."""
    host = play(
        CONNECTED
        + """
    1     post  K:45678 > S:80 [F.]           => C:45678 > S:80
    1     post  K:16000 > C:40000 [F.]        => K:80 > C:40000
    1     pre   C:40000 > K:80 [S!]           => C:40000 > K:16000
    1     post  K:16000 > C:40000 [FP.]       => K:80 > C:40000
    1     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    2     close K:45678
    3     pre   C:40000 > K:80 [S!]           => C:40000 > K:16000
    3     post  K:16000 > C:40000 [FP.]       => K:80 > C:40000
    3     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    3     post  K:45678 > S:80 [FP.]          => C:45678 > S:80
    3     pre   S:80 > C:45678 [.]            => S:80 > K:45678
    """
    )
    assert [flow.inside for flow in host.nat] == [at("C:40000")] * 2


def test_forged_packets_amid_a_handshake_change_nothing_of_it() -> None:
    host = play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     post  K:16000 > C:40000 [S.]        => K:80 > C:40000
    0     pre   C:40000 > K:80 [.!]           => C:40000 > K:16000
    0     post  K:16000 > C:40000 [R]         => K:80 > C:40000   # that was none of its numbers
    0     pre   C:40000 > K:80 [S!]           => C:40000 > K:16000
    0     pre   C:40000 > K:80 [R!]           => C:40000 > K:16000
    0     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    """
    )
    assert [flow.inside for flow in host.nat] == [at("C:40000")]


def test_a_connection_on_another_that_tcp_relay_has_not_closed_has_a_flow_of_its_own() -> None:
    host = play(
        CONNECTED
        + """
    1     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    1     close K:45678
    2     open  C:40000 @16000 from K:45679   => S:80 client      # accepted before that
    2     post  K:45679 > S:80 [S]            => C:45679 > S:80
    2     post  K:45678 > S:80 [.]            => C:45678 > S:80
    """
    )
    assert [(flow.relay, flow.state) for flow in host.nat] == [
        (at("K:45678"), "closed"),
        (at("K:45679"), "opening"),
    ]


def test_a_syn_on_an_open_flow_of_a_service_that_is_gone_is_dropped() -> None:
    play(
        CONNECTED
        + """
    1     set   tcp=443
    2     pre   C:40000 > K:80 [S]            => drop not_relaying
    2     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    """
    )


# Late packets


def test_a_closed_flow_still_serves_the_last_packets_and_then_goes() -> None:
    play(
        CONNECTED
        + """
    1     close K:45678
    9     pre   S:80 > C:45678 [F.]           => S:80 > K:45678
    9     post  K:45678 > S:80 [.]            => C:45678 > S:80
    9     post  K:16000 > C:40000 [F.]        => K:80 > C:40000
    13    pre   S:80 > C:45678 [.]            => pass no_flow
    13    pre   C:40000 > K:80 [.]            => pass no_flow
    13    post  K:16000 > C:40000 [.]         => drop no_flow
    13    post  K:45678 > S:80 [.]            => pass no_flow
    """
    )


def test_packets_that_come_after_their_flow_has_expired_are_strangers() -> None:
    host = play(
        CONNECTED
        + """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    22    post  S:53 > C:4000                 => pass no_flow
    7442  pre   C:40000 > K:80 [P.]           => pass no_flow
    7442  pre   S:80 > C:45678 [P.]           => pass no_flow
    7442  post  K:16000 > C:40000 [P.]        => drop no_flow
    7442  pre   C:4000 > K:53                 => C:4000 > S:53    # a new flow
    """
    )

    assert len(host.nat) == 1


def test_packets_keep_a_flow_alive_and_resets_do_not() -> None:
    play(
        CONNECTED
        + """
    7000  pre   S:80 > C:45678 [.]            => S:80 > K:45678
    14000 pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    14000 post  K:45678 > S:80 [R]            => C:45678 > S:80
    14200 pre   S:80 > C:45678 [R]            => S:80 > K:45678
    14200 post  K:45678 > S:80 [R]            => C:45678 > S:80
    14242 pre   S:80 > C:45678 [R]            => pass no_flow
    """
    )


def test_a_flow_that_is_closing_goes_by_its_new_timeout_at_once() -> None:
    host = play(CONNECTED)
    host.nat.timeouts = Timeouts(tcp_transitory=2)
    host.nat.expire(1)
    assert host.run(1, "post", "K:45678 > S:80 [R]") == "C:45678 > S:80"

    assert host.run(4, "pre", "S:80 > C:45678 [R]") == "pass no_flow"


def test_what_the_daemon_itself_sends_keeps_no_flow_alive() -> None:
    play(
        CONNECTED
        + """
    7000  post  K:45678 > S:80 [.]            => C:45678 > S:80
    7000  post  K:16000 > C:40000 [.]         => K:80 > C:40000
    7442  pre   C:40000 > K:80 [.]            => pass no_flow
    """
    )


# Recovery after a kill


def test_while_recovering_what_may_be_a_known_flows_is_dropped_and_a_syn_is_welcome() -> None:
    play("""
    0     set   recovering=5
    0     pre   C:40000 > K:80 [P.]           => drop recovering
    0     pre   S:80 > C:45678 [P.]           => drop recovering
    0     post  K:45678 > S:80 [P.]           => drop recovering
    0     post  K:16000 > C:40000 [P.]        => drop no_flow
    0     post  S:53 > C:4000                 => drop recovering
    0     pre   S:53 > K:4000                 => drop recovering
    0     pre   C:40001 > K:80 [S]            => C:40001 > K:16000
    0     pre   C:4001 > K:53                 => C:4001 > S:53
    0     pre   C:5000 > S:80 [S]             => pass direct
    0     post  K:50000 > S:80 [S]            => pass own
    4.9   pre   C:40000 > K:80 [P.]           => drop recovering
    5     pre   C:40000 > K:80 [P.]           => pass no_flow
    """)


def test_a_resumed_connection_goes_on_as_if_nothing_had_been() -> None:
    host = play("""
    0     set    recovering=5
    0     pre    C:40000 > K:80 [P.]                    => drop recovering
    1     resume C:40000 @16000 from K:45678 to S:80    => resumed
    1     pre    C:40000 > K:80 [P.]                    => C:40000 > K:16000
    1     post   K:45678 > S:80 [P.]                    => C:45678 > S:80
    1     pre    S:80 > C:45678 [P.]                    => S:80 > K:45678
    1     post   K:16000 > C:40000 [P.]                 => K:80 > C:40000
    7440  pre    C:40000 > K:80 [.]                     => C:40000 > K:16000
    """)

    assert states(host) == ["established"]


# Full


def test_a_full_table_refuses_new_flows_and_disturbs_none() -> None:
    host = play(
        CONNECTED
        + CONFIRMED
        + """
    1     set   flows=2
    1     pre   D:40000 > K:80 [S]            => drop table_full + K:80 > D:40000 [R.]
    1     pre   D:4000 > K:53                 => drop table_full + K > D icmp 3/13
    1     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    1     post  K:45678 > S:80 [P.]           => C:45678 > S:80
    1     pre   C:4000 > K:7                  => C:4000 > S:7
    1     post  S:7 > C:4000                  => K:7 > C:4000
    1     pre   D:5000 > S:80 [S]             => pass direct
    302   pre   D:4000 > K:53                 => D:4000 > S:53    # there is room again
    """
    )

    assert host.worker.counts.dropped == {"table_full": 2}
    assert host.nat.admission.evicted == 0


def test_a_client_that_has_its_share_is_refused_and_others_are_not() -> None:
    play(
        CONFIRMED
        + """
    0     set   flows_per_client=1
    0     pre   C:4001 > K:53                 => drop client_full + K > C icmp 3/13
    0     pre   D:4000 > K:53                 => D:4000 > S:53
    0     pre   C:4000 > K:7                  => C:4000 > S:7
    """
        + CONNECTED
        + """
    0     pre   C:40001 > K:80 [S]            => drop client_full + K:80 > C:40001 [R.]
    0     pre   D:40000 > K:80 [S]            => D:40000 > K:16000
    """
    )


@pytest.mark.parametrize(
    "source", ["K", "G", "127.0.0.1", "0.0.0.0", "224.0.0.9", "255.255.255.255"]
)
def test_a_source_that_is_no_hosts_begins_nothing(source: str) -> None:
    play(f"""
    0     pre   {source}:4000 > K:80 [S]      => pass bad_source
    0     pre   {source}:4000 > K:53          => pass bad_source
    """)


def test_a_servers_own_port_is_no_client_or_it_would_answer_itself_for_ever() -> None:
    host = play(
        """
    0     pre   S:53 > K:53                   => drop server_itself
    0     pre   S:53 > G:53                   => drop server_itself
    0     pre   S:80 > K:80 [S]               => drop server_itself
    0     pre   S:80 > K:443 [S]              => drop server_itself
    0     pre   S:443 > K:443 [S]             => drop server_itself
    0     pre   S:443 > K:443 [.]             => drop server_itself
    """,
        on=policy(tcp=frozenset({80, 443}), forwarded=frozenset({443})),
    )
    assert len(host.nat) == 0


def test_two_services_of_the_server_do_not_ask_each_other_for_ever() -> None:
    play(
        """
    0     pre   S:7 > K:19                    => drop server_itself
    0     pre   S:19 > K:7                    => drop server_itself
    0     pre   S:4000 > K:7                  => S:4000 > S:7     # the server as its own client
    0     post  S:4000 > S:7                  => K:4000 > S:7
    """,
        on=policy(udp=frozenset({7, 19})),
    )


def test_a_former_server_that_flows_lead_to_is_no_client_either() -> None:
    play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    1     set   server=Z
    1     pre   S:53 > K:53                   => drop server_itself
    1     pre   Z:53 > K:53                   => drop server_itself
    22    pre   S:53 > K:53                   => S:x > Z:53       # no flow leads there any more
    """
    )


def test_new_flows_of_a_client_are_admitted_at_their_pace_and_live_ones_always() -> None:
    host = play("""
    0     set   new_flows_per_client=2
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     pre   C:40001 > K:80 [S]            => drop client_rate + K:80 > C:40001 [R.]
    0     pre   C:4001 > K:53                 => drop client_rate + K > C icmp 3/13
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    0     pre   D:4000 > K:53                 => D:4000 > S:53    # another client's pace
    0.4   pre   C:4001 > K:53                 => drop client_rate + K > C icmp 3/13
    0.5   pre   C:4001 > K:53                 => C:4001 > S:53
    0.5   pre   C:4002 > K:53                 => drop client_rate + K > C icmp 3/13
    3     pre   C:4002 > K:53                 => C:4002 > S:53
    3     pre   C:4003 > K:53                 => C:4003 > S:53
    3     pre   C:4004 > K:53                 => drop client_rate + K > C icmp 3/13
    """)

    assert host.worker.refused.top() == {addr("C"): {"client_rate": 5}}


def test_connections_that_are_resumed_are_not_new() -> None:
    play("""
    0     set    new_flows_per_client=1
    0     resume C:40000 @16000 from K:45678 to S:80    => resumed
    0     resume C:40001 @16000 from K:45679 to S:80    => resumed
    0     pre    C:40002 > K:80 [S]                     => C:40002 > K:16000
    """)


def test_who_is_refused_hears_nothing_where_that_is_wanted() -> None:
    play(
        CONNECTED
        + CONFIRMED
        + """
    0     set   flows_per_client=1
    0     pre   C:4001 > K:53                 => drop client_full
    0     pre   C:40001 > K:80 [S]            => drop client_full
    """,
        on=policy(answers=False, udp=frozenset({53, 7})),
    )


def test_another_connection_on_a_flow_may_be_refused_too() -> None:
    play(
        CONNECTED
        + """
    1     pre   C:40000 > K:80 [R]            => C:40000 > K:16000
    2     set   flows=1
    2     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    2     open  C:40000 @16000 from K:45679   => refused: table_full
    """
    )


def test_half_open_connections_make_room_the_oldest_first() -> None:
    host = play(
        CONNECTED
        + """
    1     set   flows=3
    1     pre   D:5001 > K:80 [S]             => D:5001 > K:16000
    1     pre   D:5002 > K:80 [S]             => D:5002 > K:16000
    1     pre   D:5001 > K:80 [S]             => D:5001 > K:16000 # it tries again
    1     pre   D:5003 > K:80 [S]             => D:5003 > K:16000 # instead of 5001
    3     pre   D:5002 > K:80 [.]             => D:5002 > K:16000
    3     pre   D:5003 > K:80 [.]             => D:5003 > K:16000
    60    pre   D:5004 > K:80 [S]             => drop table_full + K:80 > D:5004 [R.]
    60    pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    """
    )

    assert host.nat.admission.evicted == 1


def test_an_acknowledgement_that_the_relays_host_resets_keeps_no_flow() -> None:
    """A client whose address is forged can't know what to acknowledge (RFC 9293, 3.10.7.4)."""
    play("""
    0     set   flows=1
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    5     pre   D:40000 > K:80 [S]            => drop table_full + K:80 > D:40000 [R.]
    5     post  K:16000 > C:40000 [R]         => K:80 > C:40000
    5     pre   D:40000 > K:80 [S]            => D:40000 > K:16000
    """)


def test_unconfirmed_datagrams_and_answered_queries_make_room_and_confirmed_ones_do_not() -> None:
    """Two of four flows: D:9's connection has one, and the last of four is TCP's."""
    play(
        CONNECTED
        + """
    0     set   udp=53,7 flows=4
    0     pre   C:1 > K:7                     => C:1 > S:7
    0     pre   C:2 > K:7                     => C:2 > S:7
    0     post  S:7 > C:1                     => K:7 > C:1
    0     post  S:7 > C:2                     => K:7 > C:2
    0     pre   C:2 > K:7                     => C:2 > S:7        # confirmed
    9     pre   D:3 > K:53                    => D:3 > S:53       # instead of C:1
    9     post  S:53 > D:3                    => K:53 > D:3
    9     pre   D:3 > K:53                    => D:3 > S:53
    9     pre   D:4 > K:7                     => D:4 > S:7        # instead of D:3
    9     pre   D:4 > K:7                     => D:4 > S:7        # which nobody has answered
    9     post  S:7 > D:4                     => K:7 > D:4
    9     pre   D:5 > K:7                     => D:5 > S:7        # instead of D:4
    9     post  S:7 > D:5                     => K:7 > D:5
    9     pre   D:5 > K:7                     => D:5 > S:7        # confirmed
    99    pre   D:6 > K:7                     => drop table_full + K > D icmp 3/13
    99    pre   C:2 > K:7                     => C:2 > S:7
    """
    )


def test_an_exchange_that_goes_on_for_two_seconds_is_confirmed() -> None:
    play("""
    0     set   udp=7 flows=1
    0     pre   C:1 > K:7                     => C:1 > S:7
    9     post  S:7 > C:1                     => K:7 > C:1        # a late answer is but one
    9     pre   C:2 > K:7                     => C:2 > S:7
    10    post  S:7 > C:2                     => K:7 > C:2
    12    post  S:7 > C:2                     => K:7 > C:2
    12    pre   C:3 > K:7                     => drop table_full + K > C icmp 3/13
    17    pre   C:3 > K:7                     => C:3 > S:7        # it didn't go on
    """)


def test_one_way_datagrams_make_room_however_many_come() -> None:
    play("""
    0     set   udp=514 flows=1
    0     pre   C:1 > K:514                   => C:1 > S:514
    1.5   pre   C:1 > K:514                   => C:1 > S:514
    3     pre   C:1 > K:514                   => C:1 > S:514
    4     pre   D:1 > K:514                   => D:1 > S:514
    4.5   pre   C:1 > K:514                   => C:1 > S:514
    """)


def test_a_client_at_its_limit_makes_room_for_itself_and_leaves_others_alone() -> None:
    """Its address may be forged by a flood, and it must not be locked out of its own flows."""
    host = play("""
    0     set   flows_per_client=2
    0     pre   D:4000 > K:80 [S]             => D:4000 > K:16000
    1     pre   C:4000 > K:80 [S]             => C:4000 > K:16000
    1     pre   C:4001 > K:80 [S]             => C:4001 > K:16000
    1     pre   C:4002 > K:80 [S]             => C:4002 > K:16000
    1     post  K:16000 > D:4000 [S.]         => K:80 > D:4000
    1     post  K:16000 > C:4000 [S.]         => drop no_flow
    1     post  K:16000 > C:4001 [S.]         => K:80 > C:4001
    """)

    assert host.nat.admission.evicted == 1


def test_answers_to_refused_packets_are_paced() -> None:
    worker = Host(policy()).worker
    worker.nat.limits = FlowLimits(flows=0)
    query = template("C:4000 > K:53").build()
    for second in range(3):
        for number in range(5000):
            assert worker.handle(query, Hook.PREROUTING, second + number / 5000) is Verdict.DROP

    assert 3000 <= len(worker.answers) <= 3000 + ANSWERS_AT_ONCE
    assert worker.counts.dropped == {"table_full": 15000}


@pytest.mark.parametrize("what", [{"ttl": 1}, {"payload": bytes(1173)}], ids=["ttl", "size"])
@pytest.mark.parametrize("to", ["K:53", "S:53", "K:443"], ids=["relayed", "direct", "forwarded"])
def test_errors_about_what_cannot_be_forwarded_are_paced(what: dict[str, object], to: str) -> None:
    host = Host(policy(mtu=1200, tcp=frozenset({443}), forwarded=frozenset({443})))
    tcp = " [S]" if to == "K:443" else ""
    for number in range(5000):
        client = f"198.51.{number // 250}.{number % 250 + 1}:4000"
        packet = template(f"{client} > {to}{tcp}", **what).build()
        assert host.worker.handle(packet, Hook.PREROUTING, number / 5000) is Verdict.DROP

    assert 1000 <= len(host.worker.answers) <= 1000 + ANSWERS_AT_ONCE
    assert host.worker.counts.dropped == {"not_forwarded": 5000}


def test_one_address_is_told_few_errors_and_others_theirs() -> None:
    worker = Host(policy()).worker

    def told(client: str, now: float) -> int:
        packet = template(f"{client}:4000 > K:53", ttl=1).build()
        for _ in range(100):
            worker.handle(packet, Hook.PREROUTING, now)
        answers, worker.answers = len(worker.answers), []
        return answers

    assert told("C", 0) == told("D", 0) == TOLD_EACH
    assert (told("C", 0.1), told("C", 60)) == (0, TOLD_EACH)


def test_all_answers_have_one_pace() -> None:
    worker = Host(policy()).worker
    worker.nat.limits = FlowLimits(flows=0)
    for number in range(30):
        client = f"198.51.100.{number + 1}"
        for text in (f"{client}:4000 > K:53", f"{client}:4000 > K:16000 [S]"):
            worker.handle(template(text, ttl=1).build(), Hook.PREROUTING, 0)
        worker.handle(template(f"{client}:4000 > K:80 [S]").build(), Hook.PREROUTING, 0)

    assert len(worker.answers) == ANSWERS_AT_ONCE


def test_each_packet_of_a_killed_flow_is_told_at_whatever_pace() -> None:
    """Among the many packets of a download there is one by which its client can be told."""
    worker = Host(policy(tcp=frozenset({443}), forwarded=frozenset({443}))).worker
    worker.handle(template("C:40000 > K:443 [S]").build(), Hook.PREROUTING, 0)
    [flow] = worker.nat
    worker.nat.kill(flow, 0)
    for _ in range(10 * ANSWERS_AT_ONCE):
        worker.handle(template("S:443 > C:40000 [P.]").build(), Hook.POSTROUTING, 0)
    worker.answers.clear()
    worker.handle(template("C:40000 > K:443 [.]").build(), Hook.PREROUTING, 0)

    assert len(worker.answers) == 1


def test_a_forged_reset_does_not_shorten_the_life_of_a_connection() -> None:
    """Whether it was one, the relay's host judges by its number."""
    play(
        CONNECTED
        + """
    1     pre   S:80 > C:45678 [R]            => S:80 > K:45678   # out of its window
    2     pre   C:40000 > K:80 [P.]           => C:40000 > K:16000
    7000  pre   S:80 > C:45678 [P.]           => S:80 > K:45678
    """
    )


def test_a_reset_leaves_a_flow_its_four_minutes_however_long_it_was_idle() -> None:
    """RFC 7857, section 2.2."""
    play(
        CONNECTED
        + """
    7000  post  K:45678 > S:80 [R]            => C:45678 > S:80
    7100  post  K:45678 > S:80 [R]            => C:45678 > S:80   # and this one adds nothing
    7238  post  K:45678 > S:80 [R]            => C:45678 > S:80
    7242  pre   S:80 > C:45678 [R]            => pass no_flow
    """
    )


def test_a_direct_connection_that_would_need_a_flow_is_refused_when_there_is_no_room() -> None:
    play(
        CONNECTED
        + """
    1     set   flows=1
    1     pre   C:45678 > S:80 [S]            => drop table_full + S:80 > C:45678 [R.]
    1     pre   C:45677 > S:80 [S]            => pass direct
    """
    )


def test_the_refusal_of_a_query_quotes_it() -> None:
    host = Host(policy())
    host.nat.limits = FlowLimits(flows=0)
    query = template("C:4000 > K:53").build()

    assert host.worker.handle(query, Hook.PREROUTING, 0) is Verdict.DROP

    [answer] = host.worker.answers
    error = IP(answer)
    assert (error.src, error.dst) == ("192.168.0.2", "10.0.0.1")
    assert (error[ICMP].type, error[ICMP].code) == (3, 13)
    assert bytes(error[ICMP].payload) == query
    del error.chksum, error[ICMP].chksum
    assert bytes(error) == answer
    assert UDP in IP(query)


# Slow twins


def rewrite_to(packet: Template, to: FiveTuple) -> Rewrite:
    """A rewrite from the packet's flow to another, in a row made for it."""
    nat = NatTable(rng=Random(1))
    there = packet.flow
    if to.proto is Proto.TCP:
        flow = nat.open_tcp(there.src, there.dst, to.dst, Source.CLIENT, 1, 0)
    else:
        flow = nat.open_forwarded(Proto.UDP, there.src, there.dst, to.dst, Source.CLIENT, 0)
    old, new = (
        f.src.addr + f.dst.addr + f.src.port.to_bytes(2) + f.dst.port.to_bytes(2)
        for f in (there, to)
    )
    step = Step.T1 if to.proto is Proto.TCP else Step.U12
    return Rewrite(flow, step, {}, old, new, deltas(old, new), 0)


@given(rewritings())
def test_a_rewritten_packet_is_the_one_built_from_scratch(case: tuple[Template, FiveTuple]) -> None:
    packet, to = case
    rewrite = rewrite_to(packet, to)
    worker = Worker(NatTable(rng=Random(1)))
    worker.nat.tables[Hook.PREROUTING, to.proto][rewrite.old] = rewrite
    built = packet.build()
    right = replace(packet, flow=to).build()

    assert worker.handle(built, Hook.PREROUTING, 1) == right
    assert readdressed(built, ipv4.parse(built), rewrite) == right
    assert (rewrite.packets, rewrite.bytes, rewrite.seen_at) == (1, len(built), 1) or (
        packet.flags & 0x04 and to.proto is Proto.TCP
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [b"", RECORD_ROUTE], ids=["plain", "options"])
@pytest.mark.parametrize("there", ["C:40000 > K:80 [P.]", "C:4000 > K:53"])
def test_checksums_of_zero_are_written_as_from_scratch_on_both_paths(
    there: str, options: bytes, when: str
) -> None:
    """In UDP as FFFF, elsewhere as 0, and so whether a packet came with it or leaves with it."""
    packet = template(there, ip_options=options)
    to = FiveTuple(packet.flow.proto, at("D:1234"), at("Z:4321"))
    corner = packet.flow if when == "before" else to
    packet = with_zero_ip_check(with_zero_check(packet, corner), corner)
    where = packet.l4 + (16 if to.proto is Proto.TCP else 6)
    zero = b"\0\0" if to.proto is Proto.TCP else b"\xff\xff"
    built, right = packet.build(), replace(packet, flow=to).build()
    at_corner = built if when == "before" else right
    assert (at_corner[10:12], at_corner[where : where + 2]) == (b"\0\0", zero)
    rewrite = rewrite_to(packet, to)
    worker = Worker(NatTable(rng=Random(1)))
    worker.nat.tables[Hook.PREROUTING, to.proto][rewrite.old] = rewrite

    assert worker.handle(built, Hook.PREROUTING, 1) == right


@given(
    case=rewritings(),
    error=st.integers(1, 0xFFFE),
    ip_error=st.integers(0, 0xFFFE),
)
def test_a_broken_checksum_stays_broken_by_as_much(
    case: tuple[Template, FiveTuple], error: int, ip_error: int
) -> None:
    packet, to = case
    packet = replace(packet, check_error=error, ip_check_error=ip_error)
    rewrite = rewrite_to(packet, to)
    worker = Worker(NatTable(rng=Random(1)))
    worker.nat.tables[Hook.POSTROUTING, to.proto][rewrite.old] = rewrite
    built, right = packet.build(), replace(packet, flow=to).build()

    got = worker.handle(built, Hook.POSTROUTING, 1)

    assert isinstance(got, bytes)
    assert got == readdressed(built, ipv4.parse(built), rewrite)
    check = packet.l4 + (16 if to.proto is Proto.TCP else 6)
    for where in (10, check):
        got_field, right_field = (int.from_bytes(p[where : where + 2]) for p in (got, right))
        assert got_field % 0xFFFF == right_field % 0xFFFF
        got = got[:where] + b"--" + got[where + 2 :]
        right = right[:where] + b"--" + right[where + 2 :]
    assert got == right


def live_worker() -> Worker:
    """A worker with flows of every kind, some of them in each state."""
    host = Host(policy(tcp=frozenset({80, 443, 8443}), forwarded=frozenset({8443})))
    traces = [
        "0 pre D:8 > K:8443 [S]",  # killed below
        "0 pre C:8 > K:8443 [S]",
        "0 pre N:9 > K:8443 [S]",
        *CONNECTED.splitlines(),
        "0 pre C:40002 > K:443 [S]",
        "0 pre C:45678 > S:80 [S]",
        "0 pre C:4000 > K:53",
        "0 pre N:4001 > K:53",
        "0 pre N:40001 > K:80 [S]",
    ]
    for line in filter(str.strip, traces):
        time, verb, rest = line.partition("=>")[0].split(None, 2)
        host.run(float(time), verb, rest.strip())
    host.nat.kill(next(iter(host.nat)), 0)
    return host.worker


def traffic() -> list[bytes]:
    """Packets of those flows, of strangers, and of both at once."""
    columns = """
        C:40000 > K:80 [S]       K:16000 > C:40000 [.]     S:80 > C:45678 [P.]
        C:40000 > K:80 [P.]      K:45678 > S:80 [P.]       C:45678 > S:80 [P.]
        C:40002 > K:443 [F.]     K:16000 > C:40002 [R]     N:40001 > K:80 [.]
        C:4000 > K:53            S:53 > C:4000             N:4001 > K:53
        N:4001 > S:53            S:53 > K:4001             S:53 > N:4001
        D:1 > K:80 [S]           D:2 > K:16000 [S]         D:3 > S:80 [S]
        D:1 > K:53               K:16000 > D:7 [.]         K:7 > S:80 [S]
        D:3 > Z:99               K:5 > S:53                D:8 > K:22 [S]
        C:8 > K:8443 [P.]        S:8443 > C:8 [P.]         C:8 > S:8443 [.]
        N:9 > K:8443 [F.]        S:8443 > K:9 [.]          K:9 > S:8443 [S]
        D:8 > K:8443 [P.]        S:8443 > D:8 [R]          D:9 > K:8443 [.]
    """
    texts = [text.strip() for text in re.split(r"\s{2,}", columns) if text.strip()]
    return [
        template(text, ip_options=options, tcp_options=b"\x01" * 4, padding=padding).build()
        for text in texts
        for options in (b"", RECORD_ROUTE)
        for padding in ((b"", b"end") if not options else (b"",))
    ]


def only_readdressed(packet: bytes, result: bytes) -> bool:
    """Whether nothing but addresses, ports and checksums differs; a missing one stays missing."""
    l4 = (packet[0] & 0xF) * 4
    check = l4 + (16 if packet[9] == 6 else 6)
    same = (
        slice(0, 10),
        slice(20, l4),
        slice(l4 + 4, check),
        slice(check + 2, None),
    )
    none = packet[9] == 17 and packet[check : check + 2] == b"\0\0"
    return (
        len(packet) == len(result)
        and all(packet[part] == result[part] for part in same)
        and (not none or result[check : check + 2] == b"\0\0")
    )


def test_a_hundred_thousand_damaged_packets_do_no_harm() -> None:
    rng = Random(20)
    worker = live_worker()
    worker.nat.limits = FlowLimits(flows=300, flows_per_client=100)
    begun = sum(worker.counts.steps)
    sound = traffic()
    rewritten = 0
    for number in range(100_000):
        packet = rng.choice(sound) if number % 50 else rng.randbytes(rng.randrange(80))
        if number % 50 and number % 4:
            packet = mutated(packet, rng)
        hook = Hook.PREROUTING if rng.random() < 0.5 else Hook.POSTROUTING
        result = worker.handle(packet, hook, number / 1000)
        if isinstance(result, bytes):
            rewritten += 1
            l4 = (packet[0] & 0xF) * 4
            claimed = worker.nat.tables[hook, Proto(packet[9])]
            rewrite = claimed[packet[12:20] + packet[l4 : l4 + 4]]
            assert result[12:20] + result[l4 : l4 + 4] == rewrite.new
            assert only_readdressed(packet, result), packet.hex()
        else:
            assert isinstance(result, Verdict)
        worker.answers.clear()

    counts = worker.counts
    assert sum(counts.steps) - begun == rewritten > 10_000
    assert rewritten + counts.passed.total() + counts.dropped.total() == 100_000
    assert {"short_header", "bad_version", "bad_length", "fragment", "other_protocol"} <= set(
        counts.passed
    )
    assert counts.dropped["truncated"] > 100
    assert len(worker.nat) <= 300


@pytest.mark.parametrize("options", [b"", RECORD_ROUTE])
def test_a_rewritten_packet_is_told_as_it_came_and_as_it_goes_on_while_somebody_traces(
    options: bytes,
) -> None:
    host = Host(policy())
    told: list[tuple[str, bytes, bytes]] = []
    untouched: list[object] = []
    host.worker.on_rewrite = lambda rewrite, *both: told.append((rewrite.step.name, *both))
    host.worker.on_untouched = lambda *what: untouched.append(what)
    packets = [
        template(text, ip_options=options).build()
        for text in ("C:4000 > K:53", "C:4000 > K:53", "C:40000 > K:80 [S]", "C:40000 > K:80 [.]")
    ]

    became = [host.worker.handle(packet, Hook.PREROUTING, 0) for packet in packets]

    assert told == list(zip(["U12", "U12", "T1", "T1"], packets, became, strict=True))
    assert untouched == []


def test_a_packet_that_is_not_rewritten_is_told_with_the_reason_while_somebody_traces() -> None:
    host = Host(policy())
    told: list[tuple[bytes, int, Verdict, str, int]] = []
    host.worker.on_untouched = lambda *what: told.append((*what, len(host.worker.answers)))
    host.worker.on_rewrite = lambda *_: None
    script = [
        ("C:40000 > K:80 [S]", None),
        ("C:40000 > K:80 [.]", None),
        ("C:40001 > K:80 [S]", (Verdict.DROP, "client_full", 1)),
        ("C:40000 > K:22 [S]", (Verdict.PASS, "no_flow", 0)),
        ("D:40000 > K:16000 [S]", (Verdict.DROP, "gateway_port", 1)),
        ("D:40000 > S:80 [S]", (Verdict.PASS, "direct", 0)),
    ]

    host.nat.limits = host.nat.limits._replace(flows_per_client=1)
    for text, expected in script:
        packet = template(text).build()
        told.clear()
        host.worker.answers.clear()
        verdict = host.worker.handle(packet, Hook.PREROUTING, 0)

        if expected is None:
            assert (type(verdict), told) == (bytes, [])
        else:
            assert told == [(packet, Hook.PREROUTING, *expected)]
            assert verdict is expected[0]


def test_what_the_fast_path_does_not_rewrite_is_told_too() -> None:
    host = Host(policy())
    told: list[tuple[Verdict, str]] = []
    host.run(0, "pre", "C:40000 > K:80 [S]")
    host.run(0, "post", "K:16000 > C:40000 [R]")
    reset = refused_directly(host.worker, "C:40000")
    host.worker.on_untouched = lambda _packet, _hook, verdict, reason: told.append(
        (verdict, reason)
    )
    host.worker.handle(reset, Hook.POSTROUTING, 0)
    host.run(0, "set", "tcp=443")
    host.run(0, "pre", "C:40000 > K:80 [S]")

    assert told == [(Verdict.PASS, "own"), (Verdict.DROP, "not_relaying")]


def test_the_refusals_of_the_gateway_port_are_remembered_in_bounded_room() -> None:
    worker = Host(policy()).worker
    answers = [refused_directly(worker, f"C:{port}", port) for port in range(1000, 2000)]

    assert worker.handle(answers[-1], Hook.POSTROUTING, 0) is Verdict.PASS
    assert worker.handle(answers[0], Hook.POSTROUTING, 0) is Verdict.DROP


@pytest.mark.parametrize("text", ["C:4000 > K:53", "C:40000 > K:80 [P.]"])
def test_flow_of_reads_the_flow_behind_options_too(text: str) -> None:
    assert flow_of(template(text).build()) == flow(text)
    assert flow_of(template(text, ip_options=RECORD_ROUTE).build()) == flow(text)


def test_flow_of_is_for_tcp_and_udp_only() -> None:
    for packet in (ipv4.build(1, addr("C"), addr("K"), bytes(8)), b"\x45"):
        with pytest.raises(BadPacket):
            flow_of(packet)


# The script tool itself


def test_a_script_that_does_not_hold_is_shown_up_to_the_line_that_failed() -> None:
    with pytest.raises(AssertionError) as caught:
        play("""
        0  pre  C:4000 > K:53  => C:4000 > S:53
        1  pre  C:4001 > K:53  => C:4002 > S:53
        2  pre  C:4003 > K:53  => C:4003 > S:53
        """)

    shown = str(caught.value).splitlines()
    assert shown[-2:] == [
        "        1  pre  C:4001 > K:53  => C:4002 > S:53",
        "        but: C:4001 > S:53",
    ]
    assert "4003" not in str(caught.value)


def test_a_port_named_twice_must_be_the_same_both_times() -> None:
    with pytest.raises(AssertionError, match="but: C:4001 > S:53"):
        play("""
        0  pre  C:4000 > K:53  => C:port > S:53
        0  pre  C:4001 > K:53  => C:port > S:53
        """)


def test_endpoints_of_scripts_are_read_with_and_without_letters() -> None:
    assert at("10.0.0.1:40000") == at("C:40000")


@pytest.mark.parametrize(
    ("script", "ends"),
    [
        (CONNECTED, "K:80 > C:40000, S:80 > K:45678, C:40000 > K:16000, C:45678 > S:80"),
        ("0 pre C:40000 > K:80 [S] => C:40000 > K:16000", "K:80 > C:40000, C:40000 > K:16000"),
    ],
)
def test_all_ends_of_a_terminated_connection_are_probed_in_the_name_of_their_peers(
    script: str, ends: str
) -> None:
    [flow] = play(script).nat

    asked = sorted(describe(packet) for packet in liveness_probes(flow))
    assert asked == sorted(f"{end} [S]" for end in ends.split(", "))


def test_a_low_port_takes_the_steps_with_a_low_port_of_its_own() -> None:
    play(
        """
    0     pre   C:777 > K:80 [S]              => C:777 > K:16000
    0     open  C:777 @16000 from K:45678     => S:80 client
    0     post  K:45678 > S:80 [S]            => C:777 > S:80
    0     pre   S:80 > C:777 [S.]             => S:80 > K:45678
    """
    )


def test_this_hosts_own_low_port_is_not_used_towards_the_server() -> None:
    play(
        """
    0     post  K:777 > S:80 [S]              => pass own
    0     pre   C:777 > K:80 [S]              => C:777 > K:16000
    0     open  C:777 @16000 from K:45678     => S:80 relay
    0     pre   S:80 > K:777 [S.]             => pass no_flow
    0     pre   C:779 > K:80 [S]              => C:779 > K:16000
    0     open  C:779 @16000 from K:45679     => S:80 relay
    0     post  K:45679 > S:80 [S]            => K:779 > S:80
    """,
        on=RELAY,
    )


# Servers that answer from another port

TFTP = policy(udp=frozenset({53, 69}), any_port=frozenset({69}))


def test_answers_from_another_port_are_relayed_both_ways() -> None:
    host = play(
        """
    0     pre   C:6900 > K:69                 => C:6900 > S:69
    0     post  S:7000 > C:6900               => K:7000 > C:6900
    0     pre   C:6900 > K:7000               => C:6900 > S:7000
    1     post  S:7000 > C:6900               => K:7000 > C:6900
    1     post  S:7000 > C:6901               => pass no_flow
    1     pre   C:6901 > K:7000               => pass no_flow
    1     post  D:7000 > C:6900               => pass no_flow
    """,
        on=TFTP,
    )

    assert states(host) == ["unreplied", "replied"]


def test_answers_from_another_port_take_four_steps_with_source_relay() -> None:
    play(
        """
    0     pre   C:6900 > K:69                 => C:6900 > S:69
    0     post  C:6900 > S:69                 => K:6900 > S:69
    0     pre   S:7000 > K:6900               => S:7000 > C:6900
    0     post  S:7000 > C:6900               => K:7000 > C:6900
    0     pre   C:6900 > K:7000               => C:6900 > S:7000
    0     post  C:6900 > S:7000               => K:6900 > S:7000
    1     pre   S:7000 > K:5353               => pass no_flow
    1     pre   S:123 > K:6900                => S:123 > C:6900
    """,
        on=replace(TFTP, source=Source.RELAY),
    )


def test_services_of_the_usual_kind_are_not_answered_from_elsewhere() -> None:
    play(
        """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     post  S:7000 > C:4000               => pass no_flow
    0     pre   C:4000 > K:7000               => pass no_flow
    """,
        on=TFTP,
    )


def test_a_copy_of_such_an_answer_names_the_service_and_is_traced() -> None:
    worker = Worker(NatTable(rng=Random(1)))
    worker.policy = policy()
    seen: list[tuple[bytes, int, Verdict, str]] = []
    worker.on_untouched = lambda *what: seen.append(what)
    worker.handle(template("C:4000 > K:53").build(), Hook.PREROUTING, 0)
    head = template("S:7000 > C:4000").build()[:28]

    assert worker.saw_elsewhere(head, Hook.POSTROUTING, 0) == at("K:53")
    other = template("S:7000 > C:4001").build()[:28]
    assert worker.saw_elsewhere(other, Hook.POSTROUTING, 0) is None
    assert seen == [(head, Hook.POSTROUTING, Verdict.PASS, "other_port")]
    assert worker.counts.passed == {"other_port": 1}
    assert worker.other_ports == {53: 1}


# DSCP


class Marks:
    """A connection with both legs, and what is told of its marks."""

    def __init__(self) -> None:
        self.nat = NatTable(rng=Random(1))
        self.worker = Worker(self.nat)
        self.worker.policy = policy()
        self.told: list[tuple[int, int]] = []
        observe(self.nat, marked=lambda flow: self.told.append(flow.dscps))

    def send(self, text: str, tos: int, hook: Hook, now: float, flags: int = 0x10) -> None:
        packet = bytearray(template(f"{text} [.]").build())
        packet[1] = tos
        packet[33] = flags
        before = bytes(packet)
        became = self.worker.handle(before, hook, now)
        assert isinstance(became, bytes)
        assert became[1] == tos  # it goes on with the mark it has

    def client(self, tos: int, now: float = 0.0, flags: int = 0x10) -> None:
        self.send("C:40000 > K:80", tos, Hook.PREROUTING, now, flags)

    def server(self, tos: int, now: float = 0.0, flags: int = 0x10) -> None:
        self.send("S:80 > C:45678", tos, Hook.PREROUTING, now, flags)


@pytest.fixture
def marks() -> Marks:
    marks = Marks()
    marks.client(46 << 2, flags=0x02)
    (flow,) = marks.nat
    marks.nat.attach(flow, at("K:45678"), 0)
    return marks


def test_the_dscp_of_both_ends_is_told_when_it_changes(marks: Marks) -> None:
    assert marks.told == [(46, 0)]
    marks.client(46 << 2)
    marks.server(0)
    assert len(marks.told) == 1
    marks.server(10 << 2)
    marks.client(8 << 2)
    marks.client(0)
    assert marks.told[1:] == [(46, 10), (8, 10), (0, 10)]


def test_ecn_and_resets_are_no_change_of_dscp(marks: Marks) -> None:
    for ecn in (2, 1, 3, 0):
        marks.client(46 << 2 | ecn)
        marks.server(ecn)
    marks.server(0, flags=0x14)
    marks.client(0, flags=0x14)
    assert marks.told == [(46, 0)]


def test_what_this_host_sends_itself_is_no_change_of_dscp(marks: Marks) -> None:
    marks.send("K:16000 > C:40000", 18 << 2, Hook.POSTROUTING, 0)
    marks.send("K:45678 > S:80", 18 << 2, Hook.POSTROUTING, 0, 0x02)
    assert marks.told == [(46, 0)]


def test_dscp_that_changes_with_each_packet_is_followed_now_and_then(marks: Marks) -> None:
    for number in range(1000):
        marks.client(number % 2 * 8, 1 + number / 10_000)
    assert len(marks.told) < 20
    marks.client(20 << 2, 2)
    assert marks.told[-1] == (20, 0)
