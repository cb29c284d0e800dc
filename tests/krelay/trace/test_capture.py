"""Captures of a worker's packets: two frames for each, at the right places, and what is told."""

from pathlib import Path
from random import Random

import pytest

from knet.endpoint import Proto, Source
from knet.wire import ipv4
from knet.wire.checksum import checksum
from krelay.datapath.verdict import Verdict
from krelay.nat.table import NatTable
from krelay.steps import Hook, Step
from krelay.trace.capture import MOST_NAMES, PLACES, WHERE, Capture
from krelay.trace.lines import Untouched, sight
from tests.tools.captures import Read, assert_sound, need_tshark, slow_read, tshark
from tests.tools.packets import addr, at, policy, template
from tests.tools.script import RECORD_ROUTE, Host

AT = 1_700_000_000_123_456_789
STORY = """
    pre  C:40000 > K:80 [S]
    post K:16000 > C:40000 [S.]
    open C:40000 @16000 from K:45678
    post K:45678 > S:80 [S]
    pre  S:80 > C:45678 [S.]
    pre  C:4000 > K:53
    post S:53 > C:4000
"""


class Recorded:
    """A host whose worker's packets go into a capture."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.capture = Capture(
            AT,
            hardware="x86_64",
            os="Linux 6.1",
            asked="trace pcap",
            is_own={addr("K"), addr("G")}.__contains__,
        )
        self.file = bytearray(self.capture.begin())
        self.now = AT
        host.worker.on_rewrite = lambda rewrite, before, after: self._add(
            self.capture.rewritten(rewrite, before, after, self._tick())
        )
        host.worker.on_untouched = lambda packet, hook, verdict, reason: self._add(
            self.capture.untouched(
                Untouched(packet, hook, verdict, reason, tuple(host.worker.answers)),
                self._tick(),
            )
        )

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def _add(self, data: bytes) -> None:
        self.file += data

    def play(self, story: str) -> None:
        for line in story.strip().splitlines():
            verb, rest = line.split(None, 1)
            self.host.run(0, verb, rest)

    @property
    def blocks(self) -> list[Read]:
        return slow_read(bytes(self.file))

    def frames(self) -> list[tuple[str, str, str, int | None]]:
        """Place, comments, packet and direction of each frame."""
        found = []
        for block in self.blocks:
            if block.kind == "packet":
                place = PLACES[block.interface][0]
                flags = block.numbers.get("flags")
                found.append((place, "; ".join(block.comments), _text(block.data), flags))
        return found


def _text(packet: bytes) -> str:
    seen = sight(packet)
    assert seen is not None
    return " > ".join(seen.ends)


def recorded(story: str, **changes: object) -> Recorded:
    """The story, in a capture."""
    found = Recorded(Host(policy(**changes)))
    found.play(story)
    return found


def test_each_packet_is_there_before_and_after_where_it_was_so() -> None:
    frames = recorded(STORY).frames()

    assert frames == [
        ("client side", "T1 before flow 1", "10.0.0.1:40000 > 192.168.0.2:80", 1),
        ("inside", "T1 after flow 1", "10.0.0.1:40000 > 192.168.0.2:16000", None),
        ("inside", "T2 before flow 1", "192.168.0.2:16000 > 10.0.0.1:40000", None),
        ("client side", "T2 after flow 1", "192.168.0.2:80 > 10.0.0.1:40000", 2),
        ("inside", "T3 before flow 1", "192.168.0.2:45678 > 192.168.0.1:80", None),
        ("server side", "T3 after flow 1", "10.0.0.1:45678 > 192.168.0.1:80", 2),
        ("server side", "T4 before flow 1", "192.168.0.1:80 > 10.0.0.1:45678", 1),
        ("inside", "T4 after flow 1", "192.168.0.1:80 > 192.168.0.2:45678", None),
        ("client side", "U1,U2 before flow 2", "10.0.0.1:4000 > 192.168.0.2:53", 1),
        ("server side", "U1,U2 after flow 2", "10.0.0.1:4000 > 192.168.0.1:53", 2),
        ("server side", "U3,U4 before flow 2", "192.168.0.1:53 > 10.0.0.1:4000", 1),
        ("client side", "U3,U4 after flow 2", "192.168.0.2:53 > 10.0.0.1:4000", 2),
    ]


@pytest.mark.parametrize("options", [b"", RECORD_ROUTE])
def test_the_bytes_are_those_that_came_and_went(options: bytes) -> None:
    found = Recorded(Host(policy(), options))
    worker = found.host.worker
    packets = []
    for text in ("C:40000 > K:80 [S]", "C:4000 > K:53"):
        packet = template(text, ip_options=options).build()
        packets += [packet, worker.handle(packet, Hook.PREROUTING, 0)]

    assert [block.data for block in found.blocks if block.kind == "packet"] == packets


def test_both_frames_of_a_packet_have_its_number_and_time() -> None:
    blocks = [block for block in recorded(STORY).blocks if block.kind == "packet"]

    numbers = [block.numbers["packetid"] for block in blocks]
    assert numbers == [n for n in range(1, 7) for _ in range(2)]
    assert [block.time - AT for block in blocks] == numbers


def test_the_file_says_on_what_and_for_what_it_was_made() -> None:
    section, *interfaces = recorded("").blocks

    assert section.texts == {"hardware": "x86_64", "os": "Linux 6.1", "application": "krelay"}
    assert section.comments == ["trace pcap"]
    assert [each.texts["name"] for each in interfaces] == ["client side", "inside", "server side"]
    assert {each.numbers["link"] for each in interfaces} == {101}


def test_hosts_are_named_once_before_their_first_packet() -> None:
    found = recorded(STORY + "pre  D:40000 > K:80 [S]\npre D:40001 > K:80 [S]")

    order = [block for block in found.blocks if block.kind in ("names", "packet")]
    names = [block for block in order if block.kind == "names"]
    assert order[0].names == [
        (addr("K"), "relay"),
        (addr("S"), "server"),
        (addr("C"), "client"),
    ]
    assert [block.names for block in names[1:]] == [[(addr("D"), "client-2")]]
    at_ = order.index(names[1])
    assert order[at_ + 1].data[12:16] == addr("D")


def test_the_server_as_its_own_client_is_called_server() -> None:
    found = recorded("pre S:4000 > K:53")

    [names] = [block.names for block in found.blocks if block.kind == "names"]
    assert names == [(addr("K"), "relay"), (addr("S"), "server")]


def test_with_source_relay_each_step_is_seen_and_what_is_unchanged_once() -> None:
    found = recorded(
        """
        pre  C:4000 > K:53
        pre  C:40000 > K:80 [S]
        open C:40000 @16000 from K:45678
        post K:45678 > S:80 [S]
        pre  S:80 > K:45678 [S.]
        """,
        source=Source.RELAY,
    )
    table = found.host.nat.tables[Hook.POSTROUTING, Proto.UDP]
    [port] = {int.from_bytes(key[8:10]) for key in table if key[4:8] == addr("S")}
    found.play(f"post C:{port} > S:53\npre S:53 > K:{port}\npost S:53 > C:{port}")
    places = [(place, comment, flags) for place, comment, _, flags in found.frames()]

    assert places == [
        ("client side", "U1 before flow 1", 1),
        ("inside", "U1 after flow 1", None),
        ("client side", "T1 before flow 2", 1),
        ("inside", "T1 after flow 2", None),
        ("server side", "T3 unchanged flow 2", 2),
        ("server side", "T4 unchanged flow 2", 1),
        ("inside", "U2 before flow 1", None),
        ("server side", "U2 after flow 1", 2),
        ("server side", "U3 before flow 1", 1),
        ("inside", "U3 after flow 1", None),
        ("inside", "U4 before flow 1", None),
        ("client side", "U4 after flow 1", 2),
    ]


def test_every_step_has_its_places_and_each_flow_both_directions_at_each() -> None:
    assert set(WHERE) == set(Step)
    for there, back in ((Step.T1, Step.T2), (Step.T3, Step.T4), (Step.U1, Step.U4),
                        (Step.U2, Step.U3), (Step.U12, Step.U34), (Step.D1, Step.D2)):  # fmt: skip
        assert WHERE[there] == WHERE[back][::-1]


def test_what_was_not_rewritten_is_there_with_the_reason_and_its_answers() -> None:
    found = recorded(
        """
        pre  D:5000 > K:16000 [S]
        pre  D:5000 > K:22 [S]
        post K:16000 > D:5001 [.]
        """
    )

    assert found.frames() == [
        ("client side", "drop gateway_port", "10.0.0.9:5000 > 192.168.0.2:16000", 1),
        ("client side", "answer to drop gateway_port", "192.168.0.2:16000 > 10.0.0.9:5000", 2),
        ("client side", "pass no_flow", "10.0.0.9:5000 > 192.168.0.2:22", 1),
        ("inside", "drop no_flow", "192.168.0.2:16000 > 10.0.0.9:5001", None),
    ]
    packet = template("S:80 > K:5000 [R]").build()
    told = Untouched(packet, Hook.PREROUTING, Verdict.DROP, "recovering", from_server=True)
    found.file += found.capture.untouched(told, AT)
    assert found.frames()[-1][:2] == ("server side", "drop recovering")


def test_an_error_that_the_relay_made_was_on_no_wire_before() -> None:
    found = recorded("pre C:4000 > K:53")
    about = template("C:4000 > S:53").build()
    message = b"\x03\x04\0\0\0\0\5\x14" + about
    message = message[:2] + checksum(message).to_bytes(2) + message[4:]
    for src in ("Z", "K"):
        error = ipv4.build(1, addr(src), addr("C"), message)
        assert isinstance(found.host.worker.handle(error, Hook.POSTROUTING, 0), bytes)
    sent = [(place, comment, flags) for place, comment, _, flags in found.frames()[2:]]

    after = ("client side", "U3,U4 after flow 1", 2)
    assert sent == [
        ("server side", "U3,U4 before flow 1", 1),
        after,
        ("inside", "U3,U4 before flow 1", None),
        after,
    ]


def test_what_is_lost_stands_in_the_next_frame_of_each_place_and_at_the_end() -> None:
    found = recorded("pre C:40000 > K:80 [S]")
    rewrites = found.host.nat.mappings.accepted(at("C:40000"), 16000).rewrites  # type: ignore[union-attr]
    for _ in range(3):
        found.capture.missed(rewrites[Step.T1])
    dropped = Untouched(b"", Hook.PREROUTING, Verdict.DROP, "truncated", from_server=True)
    found.capture.missed(dropped)
    found.play("post K:16000 > C:40000 [S.]\npre C:40000 > K:80 [.]")
    found.file += found.capture.end(AT + 99)

    told = [(place, comment) for place, comment, _, _ in found.frames() if "lost" in comment]
    lost = "3 lost before this: the reader is too slow"
    assert told == [
        ("inside", f"T2 before flow 1; {lost}"),
        ("client side", f"T2 after flow 1; {lost}"),
    ]
    packets = [block for block in found.blocks if block.kind == "packet"]
    assert [block.numbers.get("dropcount") for block in packets] == [None, None, 3, 3, None, None]
    statistics = [block for block in found.blocks if block.kind == "statistics"]
    both = {"starttime": AT, "endtime": AT + 99}
    assert [block.numbers for block in statistics] == [
        both | {"ifrecv": 6, "ifdrop": 3},
        both | {"ifrecv": 6, "ifdrop": 3},
        both | {"ifrecv": 1, "ifdrop": 1},
    ]
    assert [block.interface for block in statistics] == [0, 1, 2]


def test_an_unchanged_packet_is_missed_where_it_would_have_been_seen() -> None:
    capture = Capture(AT)
    nat = NatTable(rng=Random(1))
    flow = nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), Source.RELAY, 16000, 0)
    nat.attach(flow, at("K:45678"), 0)
    capture.missed(flow.rewrites[Step.T3])
    blocks = slow_read(capture.begin() + capture.end(AT))

    assert [block.numbers["ifdrop"] for block in blocks[-3:]] == [0, 0, 1]


def test_names_and_what_is_remembered_of_flows_are_bounded() -> None:
    found = Recorded(Host(policy()))
    found.host.nat.limits = found.host.nat.limits._replace(flows=10**6)
    clients = MOST_NAMES + 100
    for number in range(clients):
        text = f"10.1.{number // 250}.{number % 250 + 1}:4000 > K:53"
        found.host.worker.handle(template(text).build(), Hook.PREROUTING, 0)

    blocks = found.blocks
    named = [name for block in blocks if block.kind == "names" for name in block.names]
    assert len(named) == MOST_NAMES
    assert len({name for _, name in named}) == len(named)
    assert sum(block.kind == "packet" for block in blocks) == 2 * clients
    assert len(found.capture._options) <= 4096


def test_tshark_shows_each_side_as_a_capture_on_its_wire_would(tmp_path: Path) -> None:
    need_tshark()
    found = recorded(STORY + "pre D:5000 > K:16000 [S]")
    file = tmp_path / "trace.pcapng"
    file.write_bytes(found.file + found.capture.end(found.now))

    assert_sound(file)
    ends = ("ip.src_host", "ip.dst_host")
    sides = {
        name: tshark(file, *ends, only=f'frame.interface_name == "{name}"', options=["-N", "n"])
        for name, _ in PLACES.values()
    }
    client, relay, server = ("client", "relay", "server")
    both = [(client, relay), (relay, client)]
    refused = [("10.0.0.9", relay), (relay, "10.0.0.9")]
    assert sides["client side"] == both + both + refused
    assert sides["inside"] == [*both, (relay, server), (server, relay)]
    assert sides["server side"] == [(client, server), (server, client)] * 2
    [told] = tshark(file, "frame.comment", only='frame.comment == "drop gateway_port"')
    assert told == ("drop gateway_port",)


@pytest.mark.parametrize("source", Source)
def test_tshark_takes_no_packet_for_one_sent_twice(tmp_path: Path, source: Source) -> None:
    need_tshark()
    found = Recorded(Host(policy(source=source)))
    found.play("pre C:40000 > K:80 [S]\nopen C:40000 @16000 from K:45678")
    y = "C:45678" if source is Source.CLIENT else "K:45678"
    for hook, text, seq, ack in (
        (Hook.POSTROUTING, "K:45678 > S:80 [S]", 10, 0),
        (Hook.PREROUTING, f"S:80 > {y} [S.]", 20, 11),
        (Hook.POSTROUTING, "K:45678 > S:80 [.]", 11, 21),
        (Hook.POSTROUTING, "K:45678 > S:80 [P.]", 11, 21),
        (Hook.PREROUTING, f"S:80 > {y} [.]", 21, 21),
        (Hook.PREROUTING, f"S:80 > {y} [P.]", 21, 21),
    ):
        packet = template(text, seq=seq, ack=ack).build()
        assert isinstance(found.host.worker.handle(packet, hook, 0), bytes)
    file = tmp_path / "trace.pcapng"
    file.write_bytes(found.file)

    assert_sound(file)
    assert tshark(file, "frame.number", "_ws.expert", only="tcp.analysis.flags") == []
    frames = 2 + 6 * (2 if source is Source.CLIENT else 1)
    assert len(tshark(file, "frame.number")) == frames
