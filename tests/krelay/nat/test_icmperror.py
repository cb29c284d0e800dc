"""ICMP errors about relayed packets: each direction and leg, what scapy says of them, and nonsense.

A case is a line: who sends the error to whom, its type and code, and the packet it quotes as that
reads there; behind the arrow what it must read afterwards.  The twin is scapy, which builds both
from scratch: every byte must agree, so every checksum is right, the quoted ones too.
"""

import re
import socket
import time
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, IPOption, in4_chksum
from scapy.packet import Raw
from scapy.utils import checksum as scapy_checksum

from knet.endpoint import Proto, Source
from knet.wire import BadPacket, icmp, ipv4
from krelay.datapath.policy import Policy
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat import icmperror
from krelay.steps import Hook, Step
from tests.tools.errors import error
from tests.tools.packets import (
    Template,
    addr,
    flow,
    policy,
    template,
    with_zero_ip_check,
)
from tests.tools.script import HOOKS, RECORD_ROUTE, Host, play
from tests.tools.strategies import mutated, options, words

RELAY = policy(source=Source.RELAY)

TCP_FLOW = """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     post  K:16000 > C:40000 [S.]        => K:80 > C:40000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    0     post  K:45678 > S:80 [S]            => C:45678 > S:80
    0     pre   C:40000 > K:443 [S]           => C:other > K:16000
"""
TCP_FLOW_RELAY = TCP_FLOW.replace("S:80 client", "S:80 relay").replace("C:45678 >", "K:45678 >")
UDP_FLOW = """
    0     pre   C:4000 > K:53                 => C:4000 > S:53
    0     pre   C:4000 > G:53                 => C:second > S:53
"""
UDP_FLOW_RELAY = """
    0     pre   D:4000 > K:53                 => D:4000 > S:53
    0     pre   C:4000 > K:53                 => C:other > S:53
"""
MOVED = (
    TCP_FLOW
    + UDP_FLOW
    + """
    0     pre   C:45678 > S:80 [S]            => C:moved > S:80
    0     pre   C:4000 > S:53                 => C:away > S:53
"""
)

# hook, error, what it becomes, by which steps; `sent` stands for a packet that is sent anew
CASES = {
    # source=client, UDP
    "the server's port unreachable": (
        UDP_FLOW,
        "post  S > C 3/3 about C:4000 > S:53         => K > C about C:4000 > K:53         U3,U4",
    ),
    "a router's error keeps its address": (
        UDP_FLOW,
        "post  R > C 11/0 about C:4000 > S:53        => R > C about C:4000 > K:53         U3,U4",
    ),
    "too big for a link behind the relay": (
        UDP_FLOW,
        "post  R > C 3/4 about C:4000 > S:53         => R > C about C:4000 > K:53         U3,U4",
    ),
    "too big for the relay's own next link": (
        UDP_FLOW,
        "post  G > C 3/4 about C:4000 > S:53         => G > C about C:4000 > K:53         U3,U4",
    ),
    "the row of the relay's other address": (
        UDP_FLOW,
        "post  S > C 3/3 about C:{second} > S:53     => G > C about C:4000 > G:53         U3,U4",
    ),
    "the client's port unreachable": (
        UDP_FLOW,
        "pre   C > K 3/3 about K:53 > C:4000         => C > S about S:53 > C:4000         U1,U2",
    ),
    "too big for a link before the relay": (
        UDP_FLOW,
        "pre   Q > K 3/4 about K:53 > C:4000         => Q > S about S:53 > C:4000         U1,U2",
    ),
    "the client is gone from the link": (
        UDP_FLOW,
        "post  K > K 3/1 about K:53 > C:4000         => K > S about S:53 > C:4000   sent  U1,U2",
    ),
    # source=client, TCP
    "a router's error finds tcp-relay's socket": (
        TCP_FLOW,
        "pre   R > C 3/4 about C:45678 > S:80 [.]    => R > K about K:45678 > S:80 [.]    T4",
    ),
    "the server's own": (
        TCP_FLOW,
        "pre   S > C 3/10 about C:45678 > S:80 [S]   => S > K about K:45678 > S:80 [S]    T4",
    ),
    "the server is gone from the link": (
        TCP_FLOW,
        "post  K > C 3/1 about C:45678 > S:80 [S]    => K > K about K:45678 > S:80 [S] sent T4",
    ),
    "about what tcp-relay sends to a client": (
        TCP_FLOW,
        "pre   Q > K 3/4 about K:80 > C:40000 [.]    => Q > K about K:16000 > C:40000 [.] T1",
    ),
    "the client has two connections from one port": (
        TCP_FLOW,
        "pre   C > K 12/0 about K:443 > C:40000 [.]  => C > K about K:16000 > C:{other} [.] T1",
    ),
    "a TCP client is gone from the link": (
        TCP_FLOW,
        "post  K > K 3/1 about K:80 > C:40000 [.]    => K > K about K:16000 > C:40000 [.] T1",
    ),
    "a firewall of the relay host rejects": (
        TCP_FLOW,
        "post  K > C 3/3 about C:40000 > K:16000 [.] => K > C about C:40000 > K:80 [.]    T2",
    ),
    # source=relay
    "the server's, first half": (
        UDP_FLOW_RELAY,
        "pre   S > K 3/3 about K:{other} > S:53      => S > C about C:{other} > S:53      U3",
    ),
    "the server's, second half": (
        UDP_FLOW_RELAY,
        "post  S > C 3/3 about C:{other} > S:53      => K > C about C:4000 > K:53         U4",
    ),
    "a router's, first half": (
        UDP_FLOW_RELAY,
        "pre   R > K 3/4 about K:4000 > S:53         => R > D about D:4000 > S:53         U3",
    ),
    "a router's, second half: the relay stands for its network": (
        UDP_FLOW_RELAY,
        "post  R > D 3/4 about D:4000 > S:53         => K > D about D:4000 > K:53         U4",
    ),
    "the relay's own next link": (
        UDP_FLOW_RELAY,
        "post  G > D 11/0 about D:4000 > S:53        => G > D about D:4000 > K:53         U4",
    ),
    "the client's, first half": (
        UDP_FLOW_RELAY,
        "pre   D > K 3/3 about K:53 > D:4000         => D > S about S:53 > D:4000         U1",
    ),
    "the client's, second half": (
        UDP_FLOW_RELAY,
        "post  D > S 3/3 about S:53 > D:4000         => K > S about S:53 > K:4000         U2",
    ),
    "a router before the relay, second half": (
        UDP_FLOW_RELAY,
        "post  Q > S 3/4 about S:53 > D:4000         => K > S about S:53 > K:4000         U2",
    ),
    "an answer too big for the link to the client": (
        UDP_FLOW_RELAY,
        "post  K > S 3/4 about S:53 > C:{other}      => K > S about S:53 > K:{other}      U2",
    ),
    "the server is gone, both halves at once": (
        UDP_FLOW_RELAY,
        "post  K > K 3/1 about K:{other} > S:53      => K > C about C:4000 > K:53   sent  U3 U4",
    ),
    "the client is gone, both halves at once": (
        UDP_FLOW_RELAY,
        "post  K > K 3/1 about K:53 > D:4000         => K > S about S:53 > K:4000   sent  U1 U2",
    ),
    "TCP keeps the relay's address": (
        TCP_FLOW_RELAY,
        "pre   R > K 3/4 about K:45678 > S:80 [.]    => R > K about K:45678 > S:80 [.]    T4",
    ),
    "TCP, the server is gone": (
        TCP_FLOW_RELAY,
        "post  K > K 3/1 about K:45678 > S:80 [S]    => K > K about K:45678 > S:80 [S]    T4",
    ),
    # direct conversations that were moved to another port
    "a direct connection's, to the client": (
        MOVED,
        "pre   S > C 3/4 about C:{moved} > S:80 [.]  => S > C about C:45678 > S:80 [.]    D2",
    ),
    "a direct connection's, made by the relay": (
        MOVED,
        "post  G > C 3/4 about C:{moved} > S:80 [.]  => G > C about C:45678 > S:80 [.]    D2",
    ),
    "a direct connection's, to the server": (
        MOVED,
        "pre   C > S 3/4 about S:80 > C:45678 [.]    => C > S about S:80 > C:{moved} [.]  D1",
    ),
    "a direct datagram's, to the client": (
        MOVED,
        "post  S > C 3/3 about C:{away} > S:53       => S > C about C:4000 > S:53         D2",
    ),
    "a direct datagram's, to the server": (
        MOVED,
        "pre   C > S 3/3 about S:53 > C:4000         => C > S about S:53 > C:{away}       D1",
    ),
}
UNTOUCHED = {
    "a flow that no row knows": (UDP_FLOW, "post  S > C 3/3 about C:4999 > S:53"),
    "to the client, but of the other protocol": (
        UDP_FLOW,
        "post  S > C 3/3 about C:4000 > S:53 [.]",
    ),
    "before the hook that knows it": (UDP_FLOW, "pre   S > C 3/3 about C:4000 > S:53"),
    "translated already": (UDP_FLOW, "post  K > C 3/3 about C:4000 > K:53"),
    "TCP's, translated already": (TCP_FLOW, "post  K > K 3/1 about K:45678 > S:80 [S]"),
    "the host's own flow": (TCP_FLOW, "pre   S > K 3/3 about K:50000 > S:53"),
    "what an answer to a client is on its way, where a direct one was moved": (
        MOVED,
        "post  K > S 3/4 about S:53 > C:4000",
    ),
    "somebody else pretends that we went in circles": (
        TCP_FLOW,
        "post  R > C 3/1 about C:45678 > S:80 [S]",
    ),
}


PORTS = {Step.T1: "other", Step.U1: "other", Step.U12: "second", Step.D1: "moved"}


def policy_of(flows: str) -> Policy:
    return RELAY if flows in (UDP_FLOW_RELAY, TCP_FLOW_RELAY) else policy()


def ready(flows: str) -> tuple[Worker, dict[str, str]]:
    """A worker with these flows, and the ports that were chosen for them, by name."""
    host = play(flows, on=policy_of(flows))
    names = {}
    for each in host.nat:
        for step, name in PORTS.items():
            rewrite = each.rewrites.get(step)
            if rewrite is not None and rewrite.src != each.client:
                udp_direct = step is Step.D1 and each.proto is Proto.UDP
                names["away" if udp_direct else name] = str(rewrite.src.port)
    return host.worker, names


ready_once = lru_cache(ready)
"""For what changes no flow."""


def split(case: str, ports: dict[str, str]) -> tuple[Hook, str, str, list[str]]:
    """Hook, error, the error it becomes, and what stands behind that."""
    line = case.format(**ports)
    before, _, after = line.partition("=>")
    hook, _, text = before.strip().partition(" ")
    kind = re.search(r"\d+/\d+", text)
    assert kind
    found = re.match(r"(\w > \w about \S+ > \S+(?: \[\S+\])?)\s+(.*)", after.strip())
    assert found, after
    expected = found[1].replace(" about", f" {kind[0]} about")
    return HOOKS[hook], text.strip(), expected, found[2].split()


@pytest.mark.parametrize("quote", [None, 28, 60])
@pytest.mark.parametrize("name", CASES)
def test_an_error_is_translated(name: str, quote: int | None) -> None:
    flows, case = CASES[name]
    worker, ports = ready(flows)
    hook, before, after, rest = split(case, ports)
    steps = [word for word in rest if word != "sent"]
    refreshed = [(flow.seen_at, flow.state, flow.id) for flow in worker.nat]
    packet = Template(flow("C:1 > S:1"), payload=bytes(range(200)))
    if "[" in before:
        packet = replace(
            packet, flow=flow("C:1 > S:1 [.]"), flags=template(before.split("about")[1]).flags
        )

    told: list[tuple[str, bytes, bytes]] = []
    worker.on_rewrite = lambda by, old, new: told.append((by.step.label, old, new))
    untouched: list[object] = []
    worker.on_untouched = lambda *what: untouched.append(what)

    got = worker.handle(error(before, quote=quote, packet=packet), hook, 100.0)

    wanted = error(after, quote=quote, packet=packet)
    if "sent" in rest:
        assert got is Verdict.DROP
        [got] = worker.answers
    else:
        assert not worker.answers
    assert got == wanted
    assert told == [(steps[-1], error(before, quote=quote, packet=packet), wanted)]
    assert not untouched, "told once"
    assert [s.label for s in Step if worker.counts.icmp[s]] == steps
    assert not worker.counts.dropped
    assert [(flow.seen_at, flow.state, flow.id) for flow in worker.nat] == refreshed


@pytest.mark.parametrize("name", UNTOUCHED)
def test_an_error_about_no_packet_of_ours_goes_on_untouched(name: str) -> None:
    flows, case = UNTOUCHED[name]
    worker, _ = ready(flows)
    hook, _, text = case.partition(" ")

    assert worker.handle(error(text), HOOKS[hook], 0) is Verdict.PASS
    assert worker.counts.passed == {"icmp_no_flow": 1}
    assert not worker.answers


@pytest.mark.parametrize("kind", range(256))
def test_no_other_kind_of_icmp_is_touched(kind: int) -> None:
    worker, _ = ready(UDP_FLOW)
    got = worker.handle(error(f"S > C {kind}/0 about C:4000 > S:53"), Hook.POSTROUTING, 0)

    if kind in (3, 11, 12):
        assert isinstance(got, bytes)
    else:
        assert got is Verdict.PASS
        assert worker.counts.passed == {"icmp_other": 1}


SERVERS = "S > C 3/3 about C:4000 > S:53"
"""What the damages below are done to, in a world with UDP_ROW."""


def at_servers(packet: bytes) -> tuple[bytes | Verdict, Worker]:
    worker, _ = ready(UDP_FLOW)
    return worker.handle(packet, Hook.POSTROUTING, 0), worker


def recomputed(packet: bytes) -> bytes:
    """The error with right checksums, but for those in the quote, and the right length."""
    head = IP(packet[:20])
    del head.chksum, head.len
    message = packet[20:22] + b"\0\0" + packet[24:]
    check = scapy_checksum(message).to_bytes(2)
    return bytes(head / Raw(message[:2] + check + message[4:]))


def flipped(packet: bytes, at: int) -> bytes:
    return packet[:at] + bytes([packet[at] ^ 0x10]) + packet[at + 1 :]


@pytest.mark.parametrize("at", [20 + 2, 20 + 4, 20 + 8 + 28, -1])
def test_a_bad_checksum_of_the_error_drops_it(at: int) -> None:
    good = error(SERVERS)
    got, worker = at_servers(flipped(good, at % len(good)))

    assert got is Verdict.DROP
    assert worker.counts.dropped == {"icmp_checksum": 1}
    assert not any(worker.counts.icmp)


@pytest.mark.parametrize("at", [1, 4, 8, 10, 11])
def test_a_bad_checksum_of_the_quoted_header_drops_it(at: int) -> None:
    got, worker = at_servers(recomputed(flipped(error(SERVERS), 28 + at)))

    assert got is Verdict.DROP
    assert worker.counts.dropped == {"icmp_quoted_checksum": 1}


@pytest.mark.parametrize("proto", ["", " [.]"])
def test_the_quoted_transport_checksum_is_updated_and_never_judged(proto: str) -> None:
    """RFC 5508, REQ-3c: what arrived wrong leaves wrong by as much."""
    flows, text = (TCP_FLOW, "S > C 3/4 about C:45678 > S:80 [.]") if proto else (UDP_FLOW, SERVERS)
    hook = Hook.PREROUTING if proto else Hook.POSTROUTING
    packet = Template(flow(f"C:1 > S:1{proto}"), flags=0x10, check_error=0x1234)
    worker, _ = ready(flows)
    after = "S > K 3/4 about K:45678 > S:80 [.]" if proto else "K > C 3/3 about C:4000 > K:53"

    assert worker.handle(error(text, packet=packet), hook, 0) == error(after, packet=packet)


def test_a_quoted_datagram_without_checksum_gets_none() -> None:
    packet = Template(flow("C:1 > S:1"), check=False)
    got, _ = at_servers(error(SERVERS, packet=packet))

    assert got == error("K > C 3/3 about C:4000 > K:53", packet=packet)


def test_ip_options_inside_and_outside_are_stepped_over() -> None:
    """RFC 5508, REQ-3b."""
    packet = Template(flow("C:1 > S:1"), payload=b"payload", ip_options=RECORD_ROUTE)
    before, after = SERVERS, "K > C 3/3 about C:4000 > K:53"
    option = IPOption(b"\x01" * 8)

    got, _ = at_servers(error(before, packet=packet, outer=[option]))

    assert got == error(after, packet=packet, outer=[option])


def test_extensions_behind_the_quote_are_left_as_they_are() -> None:
    """RFC 4884: 128 bytes are quoted, and an object follows; RFC 5508, REQ-3d: even if broken."""
    packet = Template(flow("C:1 > S:1"), payload=bytes(72))
    extension = bytes.fromhex("2000dead 00080101 00010203")
    before, after = (
        error(text, packet=packet, quote=None, extension=extension)
        for text in ("R > C 11/0 about C:4000 > S:53", "R > C 11/0 about C:4000 > K:53")
    )

    got, _ = at_servers(before)

    assert got == after
    assert got[-12:] == extension


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("seven bytes of ICMP", "icmp_other"),
        ("no quote", "icmp_quote"),
        ("nineteen bytes", "icmp_quote"),
        ("seven bytes of UDP", "icmp_quote"),
        ("options longer than the quote", "icmp_quote"),
        ("a short header length", "icmp_quote"),
        ("IPv6", "icmp_quote"),
        ("a total length that holds no ports", "icmp_quote"),
        ("a later fragment", "icmp_quote"),
        ("an echo", "icmp_quote"),
        ("a packet of somebody else's", "icmp_astray"),
    ],
)
def test_what_quotes_no_packet_goes_on_untouched_by_a_reason(what: str, reason: str) -> None:
    good = error(SERVERS)
    quote = bytearray(good[28:])
    match what:
        case "seven bytes of ICMP":
            packet = good[:2] + (27).to_bytes(2) + good[4:27]
        case "no quote":
            quote = bytearray()
        case "nineteen bytes":
            del quote[19:]
        case "seven bytes of UDP":
            del quote[27:]
        case "options longer than the quote":
            quote[0] = 0x4F
        case "a short header length":
            quote[0] = 0x44
        case "IPv6":
            quote[0] = 0x65
        case "a total length that holds no ports":
            quote[2:4] = (27).to_bytes(2)
        case "a later fragment":
            quote[7] = 1
        case "an echo":
            quote[9] = 1
        case "a packet of somebody else's":
            quote[15] ^= 1
    if what != "seven bytes of ICMP":
        packet = recomputed(good[:28] + bytes(quote))

    got, worker = at_servers(packet)

    assert got is Verdict.PASS
    assert worker.counts.passed == {reason: 1}


def test_the_first_fragment_of_a_datagram_is_a_quote_like_any_other() -> None:
    packet = Template(flow("C:1 > S:1"), fragment=0x2000, payload=bytes(64))
    got, _ = at_servers(error(SERVERS, packet=packet))

    assert got == error("K > C 3/3 about C:4000 > K:53", packet=packet)


def test_an_error_keeps_no_flow_alive() -> None:
    host = Host(policy())
    host.run(0, "pre", "C:4000 > K:53")
    for now in range(1, 20):
        assert isinstance(host.worker.handle(error(SERVERS), Hook.POSTROUTING, now), bytes)
    [flow] = host.nat
    assert flow.expires_at(host.nat.timeouts) == 20
    assert flow.state == "unreplied"
    for now in range(20, 40):  # flows are not all looked at in the second they end
        host.nat.expire(now)
    assert host.worker.handle(error(SERVERS), Hook.POSTROUTING, 40) is Verdict.PASS


def test_errors_end_no_connection() -> None:
    host = play(TCP_FLOW + "    0     pre   S:80 > C:45678 [S.]           => S:80 > K:45678\n")
    states = [flow.state for flow in host.nat]
    for code in range(16):  # RFC 5382, REQ-10
        text = f"S > C 3/{code} about C:45678 > S:80 [.]"
        assert isinstance(host.worker.handle(error(text), Hook.PREROUTING, 1), bytes)
    host.nat.expire(2)

    assert [flow.state for flow in host.nat] == states
    host.run(2, "pre", "S:80 > C:45678 [P.]")


# Any bytes


def checked(packet: bytes) -> bool:
    """Whether scapy finds the packet's checksums right, and those of its quote that can be told."""
    head, message = packet[: (packet[0] & 15) * 4], packet[(packet[0] & 15) * 4 :]
    quoted = message[8:]
    at = (quoted[0] & 15) * 4
    sums = [scapy_checksum(head), scapy_checksum(message)]
    if len(quoted) >= at:
        sums.append(scapy_checksum(quoted[:at]))
    has_check = quoted[9] == Proto.TCP or quoted[at + 6 : at + 8] != b"\0\0"
    if has_check and len(quoted) == int.from_bytes(quoted[2:4]):
        # Of the addresses alone: for scapy, options may name another destination (source routes).
        ends = IP(src=socket.inet_ntoa(quoted[12:16]), dst=socket.inet_ntoa(quoted[16:20]))
        sums.append(in4_chksum(quoted[9], ends, quoted[at:]))
    return not any(sums)


@given(name=st.sampled_from(list(CASES)), data=st.data())
def test_whatever_arrives_right_leaves_right_by_scapys_reckoning(
    name: str, data: st.DataObject
) -> None:
    flows, case = CASES[name]
    worker, ports = ready_once(flows)
    hook, before, _, _ = split(case, ports)
    text = before.split("about")[1]
    packet = Template(
        flow(text),
        payload=data.draw(st.binary(max_size=64)),
        flags=template(text).flags,
        ip_options=data.draw(options),
        tcp_options=data.draw(options),
        ident=data.draw(words),
        tos=data.draw(st.integers(0, 255)),
        check=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        packet = with_zero_ip_check(packet, packet.flow)
    original = error(before, packet=packet, quote=data.draw(st.integers(28, 200) | st.none()))
    assert checked(original)
    worker.answers.clear()

    got = worker.handle(original, hook, 0)

    got = worker.answers[0] if worker.answers else got
    if isinstance(got, bytes):
        assert checked(got)
        assert len(got) == len(original)
    else:
        assert got is Verdict.PASS  # too little was quoted


@given(st.binary(max_size=200), st.sampled_from(Hook))
def test_any_bytes_give_a_verdict(message: bytes, hook: Hook) -> None:
    worker, _ = ready_once(MOVED)
    packet = ipv4.build(icmp.PROTO, addr("S"), addr("C"), message)

    worker.handle(packet, hook, 0)

    header = ipv4.parse(packet)
    with suppress(BadPacket):
        icmp.quoted(packet, header)
    with suppress(BadPacket):
        icmperror.translate(packet, header, hook, worker.nat.tables, frozenset({addr("S")}))


@pytest.mark.serial
def test_a_hundred_thousand_damaged_errors_take_no_time_and_raise_nothing() -> None:
    rng = Random(5508)
    good = []
    for flows in (MOVED, UDP_FLOW_RELAY, TCP_FLOW_RELAY):
        worker, ports = ready(flows)
        good += [
            (worker, *split(case, ports)[:2]) for wanted, case in CASES.values() if wanted == flows
        ]
    built = [(worker, hook, error(text)) for worker, hook, text in good]
    slowest = 0.0
    for _ in range(100_000):
        worker, hook, packet = built[rng.randrange(len(built))]
        damaged = mutated(packet, rng)
        began = time.thread_time()
        got = worker.handle(damaged, hook, 0)
        slowest = max(slowest, time.thread_time() - began)
        if isinstance(got, bytes):
            assert len(got) == len(damaged)
        worker.answers.clear()
    assert slowest < 0.5  # a machine that is busy with others; none takes longer than others


@pytest.mark.serial
def test_the_largest_error_takes_milliseconds() -> None:
    before = error(SERVERS, packet=Template(flow("C:1 > S:1"), payload=bytes(65_479)))
    assert len(before) == 65_535
    worker, _ = ready(UDP_FLOW)
    began = time.thread_time()

    assert isinstance(worker.handle(before, Hook.POSTROUTING, 0), bytes)
    assert time.thread_time() - began < 0.5
