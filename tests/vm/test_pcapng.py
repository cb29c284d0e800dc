"""The capture file is read back by scapy."""

from pathlib import Path

from scapy.utils import PcapNgReader

from vm import pcapng


def test_frames_come_back_with_their_times_and_directions(tmp_path: Path) -> None:
    frames = [bytes(range(length)) for length in (60, 61, 62, 63)]
    times = [1_700_000_000_123_456_789 + n * 1_000_000_001 for n in range(4)]
    file = tmp_path / "capture.pcapng"
    with file.open("wb") as out:
        out.write(pcapng.header("client eth0"))
        for number, (data, at) in enumerate(zip(frames, times, strict=True)):
            out.write(pcapng.frame(data, at, outbound=number % 2 == 1))

    with PcapNgReader(str(file)) as reader:
        packets = list(reader)
    assert [bytes(packet) for packet in packets] == frames
    assert [packet.sniffed_on for packet in packets] == ["client eth0"] * 4
    assert [packet.direction for packet in packets] == [1, 2, 1, 2]
    assert [round(packet.time * 10**9) for packet in packets] == times


def test_every_block_has_its_length_at_both_ends() -> None:
    for block in (pcapng.header("x")[28:], pcapng.frame(b"abcde", 0, outbound=True)):
        assert len(block) % 4 == 0
        assert block[4:8] == block[-4:] == len(block).to_bytes(4, "little")
