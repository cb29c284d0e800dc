"""The checks of the demo: each takes good evidence as good, and says no to what is wrong."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Endpoint, Source
from knet.wire import icmp, ipv4, tcp, udp
from krelay.demo import evidence as evidence
from krelay.demo.evidence import Cast, Check, Seen, ShownStep, Traced
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.steps import Step as NatStep
from krelay.trace import lines

CAST = Cast(client="10.0.0.1", relay="192.168.0.2", server="192.168.0.1", gport=16000)
C, K, S = (Endpoint.of(host, 0).addr for host in (CAST.client, CAST.relay, CAST.server))
TCP_FLOW = {"proto": "tcp", "client": "10.0.0.1:40000", "relay": "192.168.0.2:45678"}
UDP_FLOW = {"proto": "udp", "client": "10.0.0.1:50000"}
STEPS = evidence.steps(CAST, TCP_FLOW, UDP_FLOW)
LINK = bytes(12) + evidence.ETHERTYPE_IPV4

# A whole story, as the trace tells it, and what the wires show of it.
STORY = """
T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 2
T2 192.168.0.2:16000 > 10.0.0.1:40000 [S.] => 192.168.0.2:80 > flow 2
T1 10.0.0.1:40000 > 192.168.0.2:80 [P.] 75 bytes => > 192.168.0.2:16000 flow 2
T3 192.168.0.2:45678 > 192.168.0.1:80 [S] => 10.0.0.1:45678 > flow 2
T4 192.168.0.1:80 > 10.0.0.1:45678 [S.] => > 192.168.0.2:45678 flow 2
U1,U2 10.0.0.1:50000 > 192.168.0.2:53 57 bytes => > 192.168.0.1:53 flow 1
U3,U4 192.168.0.1:53 > 10.0.0.1:50000 61 bytes => 192.168.0.2:53 > flow 1
"""


@dataclass(frozen=True, slots=True)
class Told:
    """The evidence that a check is given."""

    trace: Sequence[Traced]
    wires: Mapping[str, Sequence[Seen]]


def traced(text: str) -> list[Traced]:
    """The lines of a trace, all of which must be understood."""
    lines = [evidence.traced(line) for line in text.split("\n") if line]
    assert None not in lines
    return [line for line in lines if line is not None]


def packet(text: str, *, arrived: bool = False, sound: bool = True) -> Seen:
    """What was seen of a packet `tcp SRC > DST FLAGS`."""
    proto, src, _, dst, *flags = text.split()
    number = {"tcp": 6, "udp": 17, "icmp": 1}[proto]
    ends = (Endpoint.parse(src), Endpoint.parse(dst))
    return Seen(number, *ends, "".join(flags), arrived, sound)


def wires(client: str, server: str) -> dict[str, list[Seen]]:
    """Both wires, a packet a line."""
    return {
        "client": [packet(line) for line in client.split("\n") if line.strip()],
        "server": [packet(line) for line in server.split("\n") if line.strip()],
    }


GOOD = Told(
    traced(STORY),
    wires(
        """tcp 10.0.0.1:40000 > 192.168.0.2:80 S
           tcp 192.168.0.2:80 > 10.0.0.1:40000 S.
           tcp 10.0.0.1:40000 > 192.168.0.2:80 P.
           udp 10.0.0.1:50000 > 192.168.0.2:53
           udp 192.168.0.2:53 > 10.0.0.1:50000""",
        """tcp 10.0.0.1:45678 > 192.168.0.1:80 S
           tcp 192.168.0.1:80 > 10.0.0.1:45678 S.
           udp 10.0.0.1:50000 > 192.168.0.1:53
           udp 192.168.0.1:53 > 10.0.0.1:50000""",
    ),
)


def step(label: str) -> ShownStep:
    """The step of that name."""
    return next(step for step in STEPS if step.label == label)


# Reading


def test_the_steps_are_those_of_the_design() -> None:
    def line(step: ShownStep) -> str:
        before, after = step.before, step.after
        return f"{step.label} {before.src} > {before.dst} => {after.src} > {after.dst}"

    assert [line(step) for step in STEPS] == [
        "T1 10.0.0.1:40000 > 192.168.0.2:80 => 10.0.0.1:40000 > 192.168.0.2:16000",
        "T2 192.168.0.2:16000 > 10.0.0.1:40000 => 192.168.0.2:80 > 10.0.0.1:40000",
        "T3 192.168.0.2:45678 > 192.168.0.1:80 => 10.0.0.1:45678 > 192.168.0.1:80",
        "T4 192.168.0.1:80 > 10.0.0.1:45678 => 192.168.0.1:80 > 192.168.0.2:45678",
        "U1,U2 10.0.0.1:50000 > 192.168.0.2:53 => 10.0.0.1:50000 > 192.168.0.1:53",
        "U3,U4 192.168.0.1:53 > 10.0.0.1:50000 => 192.168.0.2:53 > 10.0.0.1:50000",
    ]


@given(
    label=st.sampled_from([NatStep.T1, NatStep.T2, NatStep.T3, NatStep.T4]),
    flags=st.integers(0, 63),
    payload=st.binary(max_size=3),
)
def test_the_lines_of_the_trace_are_read_as_they_are_written(
    label: NatStep, flags: int, payload: bytes
) -> None:
    flow = tcp_flow()
    rewrite = flow.rewrites[label]
    before, after = (
        tcp.build(src.addr, dst.addr, src.port, dst.port, flags, payload=payload)
        for _, src, dst in (step(label.label).before, step(label.label).after)
    )

    found = evidence.traced(lines.line(rewrite, before, after))

    ends = step(label.label).before[1:]
    assert found == Traced(label.label, *ends, rewrite.src, rewrite.dst)


def tcp_flow() -> Flow:
    """The flow of the story's connection, of a real NAT table."""
    nat = NatTable(rng=random.Random(1))
    ends = (Endpoint(C, 40000), Endpoint(K, 80), Endpoint(S, 80))
    flow = nat.open_tcp(*ends, Source.CLIENT, CAST.gport, 0.0)
    nat.attach(flow, Endpoint(K, 45678), 0.0)
    return flow


@pytest.mark.parametrize("line", ["", "lost 3 lines: the reader is too slow", "T1 what > ever"])
def test_lines_that_are_no_packet_are_passed_over(line: str) -> None:
    assert evidence.traced(line) is None


def test_a_tcp_frame_is_read() -> None:
    frame = LINK + tcp.build(C, K, 40000, 80, tcp.SYN)

    assert evidence.seen(frame, outgoing=True) == packet("tcp 10.0.0.1:40000 > 192.168.0.2:80 S")


def test_a_udp_frame_is_read_and_its_padding_is_not() -> None:
    frame = LINK + udp.build(K, C, 53, 50000, b"x") + bytes(17)

    found = evidence.seen(frame, outgoing=False)

    assert found == packet("udp 192.168.0.2:53 > 10.0.0.1:50000", arrived=True)


def test_a_packet_of_another_protocol_has_no_ports() -> None:
    about = udp.build(C, K, 1, 2, b"")
    frame = LINK + icmp.prohibited(about, ipv4.parse(about))

    assert evidence.seen(frame, outgoing=True) == packet("icmp 192.168.0.2:0 > 10.0.0.1:0")


def test_arp_is_not_looked_at() -> None:
    assert evidence.seen(bytes(12) + b"\x08\x06" + bytes(28), outgoing=True) is None


@pytest.mark.parametrize("at", [8, 12, 20, 24, -1])  # ttl, address, port, sequence number, payload
def test_a_changed_byte_makes_a_packet_unsound(at: int) -> None:
    built = bytearray(tcp.build(C, K, 40000, 80, tcp.ACK, payload=b"data"))
    built[at] ^= 1

    found = evidence.seen(LINK + bytes(built), outgoing=False)

    assert found is not None
    assert not found.sound


def test_a_datagram_without_checksum_is_sound() -> None:
    found = evidence.seen(LINK + udp.build(C, K, 1, 2, b"data", check=False), outgoing=False)

    assert found is not None
    assert found.sound


@given(st.binary(max_size=80), st.booleans())
def test_no_bytes_raise_an_exception(frame: bytes, ip: bool) -> None:
    evidence.seen((LINK if ip else b"") + frame, outgoing=False)


def test_a_flow_is_found_if_there_is_one_and_only_then() -> None:
    assert evidence.flow_of([TCP_FLOW, UDP_FLOW], "tcp") == TCP_FLOW
    assert evidence.flow_of([TCP_FLOW], "udp") is None
    assert evidence.flow_of([UDP_FLOW, UDP_FLOW], "udp") is None


# The checks: good evidence is good


def test_all_holds_of_a_good_story() -> None:
    checks = [
        *(evidence.rewritten(step, GOOD.trace, GOOD.wires) for step in STEPS),
        evidence.only_between("", GOOD.wires["client"], CAST.client, CAST.relay),
        evidence.only_between("", GOOD.wires["server"], CAST.server, CAST.client),
        evidence.unseen("", GOOD.wires, CAST.gport),
        evidence.sound("", arriving(GOOD.wires)),
        evidence.answers("", "192.0.2.80\n", "192.0.2.80"),
        evidence.logged("", '10.0.0.1:45678 "GET / HTTP/1.1" 200', "10.0.0.1:45678"),
        evidence.tabled("", {"state": "closed", "id": 2}, {"state": "closed"}),
        evidence.no_rules("", ["", "# Warning: a comment\n\n"]),
        evidence.no_rules("", ["*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [7:9]\nCOMMIT\n"]),
        evidence.refused("", 7, REFUSED, CAST.relay, 80),
    ]

    assert evidence.failures(checks) == []
    assert evidence.settled(STEPS, GOOD.trace, GOOD.wires)


def arriving(story: Mapping[str, Sequence[Seen]]) -> dict[str, list[Seen]]:
    """The same, as if all of it had come in."""
    return {name: [seen._replace(arrived=True) for seen in wire] for name, wire in story.items()}


REFUSED = [
    packet("tcp 10.0.0.1:40001 > 192.168.0.2:80 S"),
    packet("tcp 192.168.0.2:80 > 10.0.0.1:40001 R.", arrived=True),
]


# The checks: wrong evidence is seen


def changed(old: str, new: str) -> Told:
    """The story with a line of its trace changed."""
    assert old in STORY
    return Told(traced(STORY.replace(old, new)), GOOD.wires)


def extra(wire: str, text: str) -> Told:
    """The story with one more packet on a wire."""
    more = {name: [*seen, *([packet(text)] * (name == wire))] for name, seen in GOOD.wires.items()}
    return Told(GOOD.trace, more)


def missing(wire: str, text: str) -> Told:
    """The story without those packets on a wire."""
    assert packet(text) in GOOD.wires[wire]
    fewer = {
        name: [p for p in seen if name != wire or p != packet(text)]
        for name, seen in GOOD.wires.items()
    }
    return Told(GOOD.trace, fewer)


@pytest.mark.parametrize(
    ("label", "told", "found"),
    [
        pytest.param(
            "T1",
            Told([line for line in GOOD.trace if line.step != "T1"], GOOD.wires),
            "no packet of this step",
            id="no packet was rewritten",
        ),
        pytest.param(
            "T3",
            changed("=> 10.0.0.1:45678 >", "=> 10.0.0.1:40000 >"),
            "instead of 192.168.0.2:45678 > 192.168.0.1:80 => 10.0.0.1:45678 > 192.168.0.1:80",
            id="another source port",
        ),
        pytest.param(
            "T1",
            changed("[P.] 75 bytes => > 192.168.0.2:16000", "[P.] 75 bytes => > 192.168.0.2:17000"),
            "192.168.0.2:17000 instead of",
            id="only a later packet goes wrong",
        ),
        pytest.param(
            "T1",
            extra("client", "tcp 10.0.0.1:40000 > 192.168.0.2:80 ."),
            "2 rewritten, 3 on the client's wire",
            id="a packet that was not rewritten",
        ),
        pytest.param(
            "T2",
            missing("client", "tcp 192.168.0.2:80 > 10.0.0.1:40000 S."),
            "1 rewritten, 0 on the client's wire",
            id="a packet that never came out",
        ),
        pytest.param(
            "T3",
            extra("server", "tcp 192.168.0.2:45678 > 192.168.0.1:80 ."),
            "192.168.0.2:45678 > 192.168.0.1:80: 1 rewritten, 1 on the server's wire",
            id="a packet that went out as it was",
        ),
        pytest.param(
            "U3,U4",
            extra("client", "udp 192.168.0.1:53 > 10.0.0.1:50000"),
            "1 rewritten, 1 on the client's wire",
            id="an answer that came from the server itself",
        ),
    ],
)
def test_a_step_that_went_otherwise_is_told(label: str, told: Told, found: str) -> None:
    check = evidence.rewritten(step(label), told.trace, told.wires)

    assert not check.held
    assert found in check.found
    assert not evidence.settled(STEPS, told.trace, told.wires)


@pytest.mark.parametrize(
    ("wire", "stranger"),
    [
        ("server", "tcp 192.168.0.2:45678 > 192.168.0.1:80 S"),
        ("server", "icmp 192.168.0.2:0 > 192.168.0.1:0"),
        ("client", "udp 192.168.0.1:53 > 10.0.0.1:50000"),
    ],
)
def test_a_stranger_on_a_wire_is_told(wire: str, stranger: str) -> None:
    other = {"client": CAST.relay, "server": CAST.server}[wire]

    check = evidence.only_between("", extra(wire, stranger).wires[wire], CAST.client, other)

    assert (check.held, check.found) == (False, f"there was {packet(stranger)}")


@pytest.mark.parametrize("wire", ["client", "server"])
@pytest.mark.parametrize(
    "ends", ["10.0.0.1:1 > 192.168.0.2:16000", "192.168.0.2:16000 > 10.0.0.1:1"]
)
def test_the_gateway_port_on_a_wire_is_told(wire: str, ends: str) -> None:
    check = evidence.unseen("", extra(wire, f"tcp {ends} S").wires, CAST.gport)

    assert (check.held, check.found) == (False, f"{ends} on the {wire}'s wire")


def test_a_wrong_checksum_is_told_of_what_arrives_and_only_of_that() -> None:
    sent = packet("udp 10.0.0.1:1 > 192.168.0.2:53", sound=False)
    came = packet("udp 192.168.0.2:53 > 10.0.0.1:1", arrived=True)

    assert evidence.sound("", {"client": [sent, came]}).held
    assert not evidence.sound("", {"client": [sent, came._replace(sound=False)]}).held


NOTHING: dict[str, list[Seen]] = {"client": [], "server": []}


@pytest.mark.parametrize(
    "check",
    [
        evidence.only_between("", [], CAST.client, CAST.relay),
        evidence.unseen("", NOTHING, CAST.gport),
        evidence.unseen("", {**NOTHING, "client": GOOD.wires["client"]}, CAST.gport),
        evidence.sound("", NOTHING),
        evidence.sound("", GOOD.wires),  # where nothing arrived
        evidence.refused("", 7, [], CAST.relay, 80),
        evidence.logged("", "", "10.0.0.1:45678"),
        evidence.answers("", "", "192.0.2.80"),
        evidence.tabled("", None, {}),
    ],
)
def test_without_evidence_nothing_is_shown(check: Check) -> None:
    assert not check.held
    assert check.found


@pytest.mark.parametrize("printed", ["192.0.2.81\n", "192.0.2.80\n192.0.2.81\n", ";; timed out"])
def test_another_answer_is_told(printed: str) -> None:
    assert not evidence.answers("", printed, "192.0.2.80").held


@pytest.mark.parametrize("who", ["192.168.0.2:45678", "10.0.0.1:40000", "110.0.0.1:45678"])
def test_another_address_in_the_log_is_told(who: str) -> None:
    assert not evidence.logged("", f'{who} "GET / HTTP/1.1" 200', "10.0.0.1:45678").held


def test_a_flow_with_another_value_is_told() -> None:
    flow: dict[str, Any] = {"state": "established", "source": "client"}

    check = evidence.tabled("", flow, {"state": "closed", "source": "client", "gport": 16000})

    assert (check.held, check.found) == (False, "state=established gport=None")


@pytest.mark.parametrize(
    "rule",
    [
        "table ip krelay {",
        "-A PREROUTING -j krelay-pre",
        ":krelay-pre - [0:0]",
        ":INPUT DROP [0:0]",
    ],
)
def test_a_rule_that_is_left_is_told(rule: str) -> None:
    check = evidence.no_rules("", ["# a comment\n", f"# another\n{rule}\n"])

    assert (check.held, check.found) == (False, f"there is {rule!r}")


@pytest.mark.parametrize(
    ("status", "wire"),
    [
        (0, REFUSED),  # it was answered
        (28, REFUSED),  # nothing came in time
        (7, REFUSED[:1]),  # no route, say
        (7, [*REFUSED, packet("tcp 192.168.0.2:80 > 10.0.0.1:40001 S.", arrived=True)]),
        (7, [packet("tcp 192.168.0.1:80 > 10.0.0.1:40001 R.", arrived=True)]),
    ],
)
def test_whatever_is_no_refusal_by_the_host_is_told(status: int, wire: list[Seen]) -> None:
    assert not evidence.refused("", status, wire, CAST.relay, 80).held


def test_without_a_listing_nobody_can_say_that_there_is_no_rule() -> None:
    assert not evidence.no_rules("", []).held


def test_failures_say_what_was_claimed_and_what_was_found() -> None:
    checks = [Check("water is wet", True), Check("snow is black", False, "it is white")]

    assert evidence.failures(checks) == ["snow is black: it is white"]
