"""Capture files, read back by the slow parser of the tests, by scapy and by tshark."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import PcapNgReader

from knet.wire import pcapng
from tests.tools.captures import Read, assert_sound, need_tshark, slow_read, tshark
from tests.tools.packets import template, with_zero_check

AT = 1_700_000_000_123_456_789
START = pcapng.section() + pcapng.interface("eth0")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
times = st.integers(0, 2**64 - 1)


def test_a_file_with_everything_in_it_reads_as_it_was_written() -> None:
    file = b"".join(
        (
            pcapng.section(hardware="x86_64", os="Linux 6", application="krelay", comment="trace"),
            pcapng.interface("client", link=pcapng.RAW_IP, description="the client's side"),
            pcapng.interface("server"),
            pcapng.names({b"\x0a\0\0\1": "client", bytes(15) + b"\1": "itself"}),
            pcapng.packet(
                0, b"abcde", AT, pcapng.options(False, "T1 before") + pcapng.packet_id(7)
            ),
            pcapng.packet(1, b"abcd", AT + 1, pcapng.options(True) + pcapng.lost_before(3, "why")),
            pcapng.packet(1, b"", AT + 2),
            pcapng.statistics(1, AT + 9, began=AT, received=5, dropped=3),
        )
    )

    assert slow_read(file) == [
        Read(
            "section",
            ["trace"],
            texts={"hardware": "x86_64", "os": "Linux 6", "application": "krelay"},
        ),
        Read(
            "interface",
            numbers={"link": 101, "tsresol": 9},
            texts={"name": "client", "description": "the client's side"},
        ),
        Read("interface", numbers={"link": 1, "tsresol": 9}, texts={"name": "server"}),
        Read("names", names=[(b"\x0a\0\0\1", "client"), (bytes(15) + b"\1", "itself")]),
        Read("packet", ["T1 before"], 0, AT, b"abcde", numbers={"flags": 1, "packetid": 7}),
        Read(
            "packet",
            ["3 lost before this: why"],
            1,
            AT + 1,
            b"abcd",
            numbers={"flags": 2, "dropcount": 3},
        ),
        Read("packet", [], 1, AT + 2),
        Read(
            "statistics",
            [],
            1,
            AT + 9,
            numbers={"starttime": AT, "endtime": AT + 9, "ifrecv": 5, "ifdrop": 3},
        ),
    ]


@given(st.binary(max_size=300), times, texts, st.none() | st.booleans(), times, times)
def test_any_packet_comes_back(
    data: bytes, at: int, comment: str, outbound: bool | None, packet_id: int, dropped: int
) -> None:
    options = pcapng.options(outbound, comment) + pcapng.packet_id(packet_id)
    options += pcapng.lost_before(dropped, "why")
    read = slow_read(START + pcapng.packet(0, data, at, options))[-1]

    assert (read.data, read.time) == (data, at)
    assert read.comments == [*([comment] if comment else []), f"{dropped} lost before this: why"]
    numbers = {"flags": None if outbound is None else outbound + 1}
    numbers |= {"packetid": packet_id, "dropcount": dropped}
    assert read.numbers == {name: n for name, n in numbers.items() if n is not None}


@given(texts, texts, texts, st.dictionaries(st.binary(min_size=4, max_size=4), texts, min_size=1))
def test_any_texts_come_back(name: str, os: str, comment: str, known: dict[bytes, str]) -> None:
    known = {address: text.replace("\0", "") for address, text in known.items()}
    file = pcapng.section(os=os, comment=comment) + pcapng.interface(name) + pcapng.names(known)
    section, interface, names = slow_read(file)

    assert (section.texts, section.comments) == (
        {"os": os} if os else {},
        [comment] * bool(comment),
    )
    assert interface.texts == ({"name": name} if name else {})
    assert names.names == list(known.items())


def test_no_names_are_no_block() -> None:
    assert pcapng.names({}) == b""


def test_a_text_that_is_too_long_is_cut() -> None:
    assert slow_read(pcapng.section(comment="x" * 70_000))[0].comments == ["x" * 0xFFFF]


# Reading blocks


FILE = START + b"".join(pcapng.packet(0, bytes(size), AT) for size in range(9))


@given(st.integers(0, len(FILE)))
def test_whole_blocks_end_where_a_block_ends(cut: int) -> None:
    ends = [0, *(block.end + 4 for block in pcapng.blocks(FILE))]

    assert ends[-1] == len(FILE)
    assert pcapng.whole(FILE[:cut]) == max(end for end in ends if end <= cut)


@given(st.lists(st.integers(0, len(FILE)), max_size=5))
def test_any_cut_of_the_stream_gives_the_same_blocks(cuts: list[int]) -> None:
    found: list[tuple[int, bytes]] = []
    held = b""
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(FILE)], strict=True):
        held += FILE[begin:end]
        done = pcapng.whole(held)
        found += _bodies(held[:done])
        held = held[done:]

    assert held == b""
    assert found == _bodies(FILE)


def _bodies(data: bytes) -> list[tuple[int, bytes]]:
    return [(kind, data[begin:end]) for kind, begin, end in pcapng.blocks(data)]


@given(st.binary(max_size=200))
def test_any_bytes_are_blocks_or_a_bad_capture(data: bytes) -> None:
    try:
        found = list(pcapng.blocks(data))
    except pcapng.BadCapture:
        return
    assert sum(block.end - block.begin + 12 for block in found) <= len(data)


@pytest.mark.parametrize("length", [0, 8, 11, 13, pcapng.MOST + 4])
def test_a_length_is_checked_before_it_is_believed(length: int) -> None:
    with pytest.raises(pcapng.BadCapture):
        pcapng.whole(b"\6\0\0\0" + length.to_bytes(4, "little"))


@given(times, times)
def test_the_dropped_are_read_from_statistics(received: int, dropped: int) -> None:
    block = pcapng.statistics(0, AT, began=AT, received=received, dropped=dropped)
    [(kind, body)] = _bodies(block)

    assert (kind, pcapng.dropped_by(body)) == (pcapng.STATISTICS, dropped)


@given(st.binary(max_size=60))
def test_statistics_of_any_bytes_do_no_harm(body: bytes) -> None:
    assert pcapng.dropped_by(body) >= 0


# Others' readers


def test_scapy_reads_frames_with_their_times_and_directions(tmp_path: Path) -> None:
    frames = [bytes(range(length)) for length in (60, 61, 62, 63)]
    times = [AT + n * 1_000_000_001 for n in range(4)]
    file = tmp_path / "capture.pcapng"
    with file.open("wb") as out:
        out.write(pcapng.section() + pcapng.interface("client eth0"))
        for number, (data, at) in enumerate(zip(frames, times, strict=True)):
            out.write(pcapng.packet(0, data, at, pcapng.options(number % 2 == 1)))

    with PcapNgReader(str(file)) as reader:
        packets = list(reader)
    assert [bytes(packet) for packet in packets] == frames
    assert [packet.sniffed_on for packet in packets] == ["client eth0"] * 4
    assert [packet.direction for packet in packets] == [1, 2, 1, 2]
    assert [round(packet.time * 10**9) for packet in packets] == times


def test_tshark_reads_the_same(tmp_path: Path) -> None:
    need_tshark()
    file = tmp_path / "capture.pcapng"
    sound = template("C:4000 > K:53").build()
    file.write_bytes(
        b"".join(
            (
                pcapng.section(hardware="x86_64", os="Linux 6", application="krelay"),
                pcapng.interface("client", link=pcapng.RAW_IP, description="the client's side"),
                pcapng.interface("server", link=pcapng.RAW_IP),
                pcapng.names({sound[12:16]: "client", sound[16:20]: "relay"}),
                pcapng.packet(0, sound, AT, pcapng.options(False, "U1,U2 before flow 1")),
                pcapng.packet(
                    1, sound, AT + 1, pcapng.options(True, "ünd") + pcapng.lost_before(3, "why")
                ),
                pcapng.statistics(1, AT + 9, began=AT, received=5, dropped=3),
            )
        )
    )

    shown = ("frame.time_epoch", "frame.interface_name", "frame.comment", "frame.drop_count")
    assert tshark(file, *shown, "frame.p2p_dir") == [
        ("1700000000.123456789", "client", "U1,U2 before flow 1", "", "1"),
        ("1700000000.123456790", "server", "ünd,3 lost before this: why", "3", "0"),
    ]
    [named, _] = tshark(file, "ip.src_host", "ip.dst_host", options=["-N", "n"])
    assert named == ("client", "relay")
    assert_sound(file)
    broken = bytearray(file.read_bytes())
    broken[broken.index(b"some bytes")] ^= 1
    file.write_bytes(broken)
    with pytest.raises(AssertionError):
        assert_sound(file)


def test_either_zero_is_a_right_checksum(tmp_path: Path) -> None:
    need_tshark()
    packet = template("C:40000 > K:80 [P.]")
    packet = with_zero_check(packet, packet.flow)
    built = packet.build()
    assert built[36:38] == b"\0\0"
    file = tmp_path / "capture.pcapng"
    file.write_bytes(
        pcapng.section()
        + pcapng.interface("client", link=pcapng.RAW_IP)
        + pcapng.packet(0, built, AT)
        + pcapng.packet(0, built[:36] + b"\xff\xff" + built[38:], AT)
    )

    assert_sound(file)
