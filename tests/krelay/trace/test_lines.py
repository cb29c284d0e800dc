"""Lines of a trace, and the filters that choose them."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Proto, Source
from knet.wire import ipv4
from knet.wire.checksum import checksum
from krelay.datapath.verdict import Verdict
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.steps import Hook, Step
from krelay.trace.lines import Filter, Lines, Untouched, line, sight, untouched_line
from tests.tools.packets import addr, at, policy, template
from tests.tools.script import RECORD_ROUTE, Host


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (
            "C:40000 > K:80 [S]",
            "T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 1",
        ),
        (
            "K:16000 > C:40000 [S.]",
            "T2 192.168.0.2:16000 > 10.0.0.1:40000 [S.] => 192.168.0.2:80 > flow 1",
        ),
        (
            "K:45678 > S:80 [P.]",
            "T3 192.168.0.2:45678 > 192.168.0.1:80 [P.] 10 bytes => 10.0.0.1:45678 > flow 1",
        ),
        (
            "S:80 > C:45678 [.]",
            "T4 192.168.0.1:80 > 10.0.0.1:45678 [.] => > 192.168.0.2:45678 flow 1",
        ),
        (
            "C:4000 > K:53",
            "U1,U2 10.0.0.1:4000 > 192.168.0.2:53 10 bytes => > 192.168.0.1:53 flow 2",
        ),
        (
            "S:53 > C:4000",
            "U3,U4 192.168.0.1:53 > 10.0.0.1:4000 10 bytes => 192.168.0.2:53 > flow 2",
        ),
        (
            "C:40001 > K:80 [S]",  # its flow comes with it
            "T1 10.0.0.1:40001 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 3",
        ),
    ],
)
def test_a_line_shows_what_has_changed(packet: str, expected: str) -> None:
    for options in (b"", RECORD_ROUTE):
        host = Host(policy())
        host.run(0, "pre", "C:40000 > K:80 [S]")
        host.run(0, "open", "C:40000 @16000 from K:45678")
        host.run(0, "pre", "C:4000 > K:53")
        lines: list[str] = []
        host.worker.on_rewrite = lambda *what, lines=lines: lines.append(line(*what))
        for hook in Hook:
            host.worker.handle(template(packet, ip_options=options).build(), hook, 0)

        assert lines == [expected]


def test_a_line_shows_both_ends_where_both_have_changed_and_says_when_none_has() -> None:
    host = Host(policy(source=Source.RELAY))
    host.run(0, "post", "K:4000 > S:53")
    lines: list[str] = []
    host.worker.on_rewrite = lambda *what: lines.append(line(*what))
    host.run(0, "pre", "C:4000 > K:53")
    host.run(0, "pre", "C:40000 > K:80 [S]")
    host.run(0, "open", "C:40000 @16000 from K:45678")
    host.run(0, "post", "K:45678 > S:80 [S]")

    [moved] = [r.new for r in host.nat.tables[Hook.PREROUTING, Proto.UDP].values() if r.step == 4]
    port = int.from_bytes(moved[8:10])
    assert lines == [
        f"U1 10.0.0.1:4000 > 192.168.0.2:53 10 bytes => 10.0.0.1:{port} > 192.168.0.1:53 flow 1",
        "T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 2",
        "T3 192.168.0.2:45678 > 192.168.0.1:80 [S] => unchanged flow 2",
    ]


def test_bytes_that_are_no_packet_still_make_a_line() -> None:
    rewrite = flows()["tcp"].rewrites[Step.T1]

    for nonsense in (b"", b"\xff" * 40):
        assert line(rewrite, nonsense, nonsense) == f"T1 {len(nonsense)} bytes flow 1"
        told = Untouched(nonsense, Hook.PREROUTING, Verdict.DROP, "truncated")
        assert untouched_line(told) == f"drop truncated {len(nonsense)} bytes"


def test_a_line_of_an_icmp_error_shows_the_packet_it_is_about() -> None:
    host = Host(policy())
    host.run(0, "pre", "C:4000 > K:53")
    host.run(0, "pre", "C:40000 > K:80 [S]")
    host.run(0, "open", "C:40000 @16000 from K:45678")
    lines: list[str] = []
    host.worker.on_rewrite = lambda *what: lines.append(line(*what))
    for src, text, hook in (
        ("S", "C:4000 > S:53", Hook.POSTROUTING),
        ("Z", "C:4000 > S:53", Hook.POSTROUTING),
        ("Z", "C:45678 > S:80 [S]", Hook.PREROUTING),
    ):
        about = template(text).build()
        message = b"\x03\x03\0\0\0\0\0\0" + about
        message = message[:2] + checksum(message).to_bytes(2) + message[4:]
        packet = ipv4.build(1, addr(src), addr("C"), message)
        host.worker.handle(packet, hook, 0)

    assert lines == [
        "U3,U4 192.168.0.1 > 10.0.0.1 icmp 3/3 about 10.0.0.1:4000 > 192.168.0.1:53 "
        "=> 192.168.0.2 > about 10.0.0.1:4000 > 192.168.0.2:53 flow 1",
        "U3,U4 192.168.0.99 > 10.0.0.1 icmp 3/3 about 10.0.0.1:4000 > 192.168.0.1:53 "
        "=> about 10.0.0.1:4000 > 192.168.0.2:53 flow 1",
        "T4 192.168.0.99 > 10.0.0.1 icmp 3/3 about 10.0.0.1:45678 > 192.168.0.1:80 "
        "=> > 192.168.0.2 about 192.168.0.2:45678 > 192.168.0.1:80 flow 2",
    ]


SYN = template("C:40000 > K:16000 [S]").build()


@pytest.mark.parametrize(
    ("packet", "reason", "answers", "expected"),
    [
        (SYN, "recovering", (), "drop recovering 10.0.0.1:40000 > 192.168.0.2:16000 [S]"),
        (
            SYN,
            "gateway_port",
            (template("K:16000 > C:40000 [R.]").build(),),
            "drop gateway_port 10.0.0.1:40000 > 192.168.0.2:16000 [S] answered [R.]",
        ),
        (
            template("C:4000 > K:53").build(),
            "client_full",
            (ipv4.build(1, addr("K"), addr("C"), b"\x03\x0d" + bytes(6)),),
            "drop client_full 10.0.0.1:4000 > 192.168.0.2:53 10 bytes answered icmp 3/13",
        ),
        (
            SYN[:30],
            "truncated",
            (),
            "drop truncated 10.0.0.1:40000 > 192.168.0.2:16000 protocol 6 10 bytes",
        ),
        (SYN[:22], "truncated", (), "drop truncated 10.0.0.1 > 192.168.0.2 protocol 6 2 bytes"),
        (
            template("C:4000 > K:53", fragment=0x2003).build(),
            "fragment",
            (),
            "drop fragment 10.0.0.1 > 192.168.0.2 fragment from byte 24",
        ),
        (
            ipv4.build(47, addr("C"), addr("K"), bytes(4)),
            "other_protocol",
            (),
            "drop other_protocol 10.0.0.1 > 192.168.0.2 protocol 47 4 bytes",
        ),
    ],
)
def test_a_packet_that_was_not_rewritten_shows_its_verdict_and_reason(
    packet: bytes, reason: str, answers: tuple[bytes, ...], expected: str
) -> None:
    for verdict, word in ((Verdict.DROP, "drop"), (Verdict.PASS, "pass")):
        told = Untouched(packet, Hook.PREROUTING, verdict, reason, answers)
        assert untouched_line(told) == expected.replace("drop", word, 1)


@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda data: b"\x45" + data))
def test_any_bytes_can_be_looked_at(packet: bytes) -> None:
    seen = sight(packet)
    told = untouched_line(Untouched(packet, 0, Verdict.PASS, "no_flow", (packet,)))

    assert (seen is None) == (len(packet) < 20 or packet[0] >> 4 != 4)
    assert told.startswith("pass no_flow ")
    assert "\n" not in told
    for wanted in (Filter(), Filter(Proto.UDP), Filter(service=(Proto.TCP, 80))):
        assert wanted.admits_unmatched(packet) in (True, False)


def test_lines_tell_what_was_lost_before_the_next_or_when_all_is_read() -> None:
    lines = Lines()
    rewrite = flows()["tcp"].rewrites[Step.T1]
    told = Untouched(SYN, Hook.PREROUTING, Verdict.DROP, "recovering")
    lost = b"lost 2 lines: the reader is too slow\n"
    first = line(rewrite, SYN, SYN).encode() + b"\n"

    assert lines.begin() == lines.end(0) == lines.caught_up() == b""
    for missed in (rewrite, told):
        lines.missed(missed)
        lines.missed(missed)
        assert lines.rewritten(rewrite, SYN, SYN, 0) == lost + first
        lines.missed(missed)
        lines.missed(missed)
        assert lines.untouched(told, 0) == lost + untouched_line(told).encode() + b"\n"
        lines.missed(missed)
        lines.missed(missed)
        assert lines.caught_up() == lost
        assert lines.rewritten(rewrite, SYN, SYN, 0) == first


def flows() -> dict[str, Flow]:
    nat = NatTable(rng=Random(1))
    tcp = nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
    udp = nat.open_forwarded(Proto.UDP, at("C:4000"), at("K:53"), at("S:53"), Source.CLIENT, 0)
    other = nat.open_tcp(at("D:40000"), at("K:443"), at("S:443"), Source.CLIENT, 16000, 0)
    other.tracker.resumed()
    return {"tcp": tcp, "udp": udp, "other": other}


@pytest.mark.parametrize(
    ("wanted", "admitted"),
    [
        (Filter(), "tcp udp other"),
        (Filter(proto=Proto.TCP), "tcp other"),
        (Filter(proto=Proto.UDP), "udp"),
        (Filter(client_addr=addr("C")), "tcp udp"),
        (Filter(client_port=40000), "tcp other"),
        (Filter(client_addr=addr("C"), client_port=40000), "tcp"),
        (Filter(state="established"), "other"),
        (Filter(state="unreplied"), "udp"),
        (Filter(state="closed"), ""),
        (Filter(service=(Proto.TCP, 443)), "other"),
        (Filter(service=(Proto.UDP, 443)), ""),
        (Filter(proto=Proto.UDP, state="opening"), ""),
    ],
)
def test_a_filter_admits_what_all_its_parts_admit(wanted: Filter, admitted: str) -> None:
    assert [name for name, flow in flows().items() if wanted.admits(flow)] == admitted.split()


@pytest.mark.parametrize(
    ("wanted", "admitted"),
    [
        (Filter(), "tcp answer udp icmp nonsense"),
        (Filter(proto=Proto.TCP), "tcp answer"),
        (Filter(proto=Proto.UDP), "udp"),
        (Filter(client_addr=addr("C")), "tcp answer udp icmp"),
        (Filter(client_addr=addr("D")), ""),
        (Filter(client_addr=addr("C"), client_port=40000), "tcp answer"),
        (Filter(client_port=4000), "udp"),
        (Filter(service=(Proto.TCP, 80)), "tcp answer"),
        (Filter(service=(Proto.UDP, 80)), ""),
        (Filter(state="closed"), ""),
    ],
)
def test_a_filter_admits_a_packet_without_a_flow_that_could_be_of_one(
    wanted: Filter, admitted: str
) -> None:
    packets = {
        "tcp": template("C:40000 > K:80 [S]").build(),
        "answer": template("K:80 > C:40000 [S.]").build(),
        "udp": template("C:4000 > K:53").build(),
        "icmp": ipv4.build(1, addr("C"), addr("K"), bytes(8)),
        "nonsense": b"\xff" * 40,
    }
    found = [name for name, packet in packets.items() if wanted.admits_unmatched(packet)]
    assert found == admitted.split()
