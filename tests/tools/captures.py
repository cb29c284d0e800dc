"""Captures read back: by a slow parser of our own, and by tshark.

The parser takes a file apart field by field as draft-ietf-opsawg-pcapng lays it out, and asserts
every rule on the way: nothing of knet.wire is used, so that both can't be wrong together.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

OPTIONS = {
    "section": {2: "hardware", 3: "os", 4: "application"},
    "interface": {2: "name", 3: "description", 9: "tsresol"},
    "names": {},
    "packet": {2: "flags", 4: "dropcount", 5: "packetid"},
    "statistics": {2: "starttime", 3: "endtime", 4: "ifrecv", 5: "ifdrop"},
}
KINDS = {0x0A0D0D0A: "section", 1: "interface", 4: "names", 5: "statistics", 6: "packet"}
SIZES = {"flags": 4, "tsresol": 1} | dict.fromkeys(
    ("dropcount", "packetid", "starttime", "endtime", "ifrecv", "ifdrop"), 8
)
CHECKS = ("ip", "tcp", "udp")


@dataclass
class Read:
    """A block, its fields by name; texts and numbers of options among them."""

    kind: str
    comments: list[str] = field(default_factory=list)
    interface: int = -1
    time: int = -1
    data: bytes = b""
    names: list[tuple[bytes, str]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def slow_read(file: bytes) -> list[Read]:
    """All blocks of a little-endian file of one section; fails at the first broken rule."""
    found: list[Read] = []
    interfaces = at = 0
    while at < len(file):
        kind = KINDS[_number(file[at : at + 4])]
        length = _number(file[at + 4 : at + 8])
        assert length % 4 == 0
        assert 12 <= length <= len(file) - at
        assert _number(file[at + length - 4 : at + length]) == length
        body = file[at + 8 : at + length - 4]
        at += length
        block = Read(kind)
        assert (kind == "section") == (not found)
        match kind:
            case "section":
                assert _number(body[:4]) == 0x1A2B3C4D
                assert (_number(body[4:6]), _number(body[6:8])) == (1, 0)
                assert body[8:16] == b"\xff" * 8
                rest = body[16:]
            case "interface":
                block.numbers["link"] = _number(body[:2])
                assert body[2:4] == b"\0\0"
                assert _number(body[4:8]) == 0  # no limit of length
                interfaces += 1
                rest = body[8:]
            case "packet":
                block.interface = _number(body[:4])
                block.time = _number(body[4:8]) << 32 | _number(body[8:12])
                size = _number(body[12:16])
                assert _number(body[16:20]) == size
                block.data, rest = _cut(body[20:], size)
            case "statistics":
                block.interface = _number(body[:4])
                block.time = _number(body[4:8]) << 32 | _number(body[8:12])
                rest = body[12:]
            case "names":
                rest = body
                while (record := _number(rest[:2])) != 0:
                    size = _number(rest[2:4])
                    value, rest = _cut(rest[4:], size)
                    width = {1: 4, 2: 16}[record]
                    assert value.endswith(b"\0")
                    block.names += [
                        (value[:width], name.decode()) for name in value[width:-1].split(b"\0")
                    ]
                assert rest[:4] == b"\0\0\0\0"
                rest = rest[4:]
        assert block.interface < interfaces
        _options(block, rest)
        found.append(block)
    return found


def _options(block: Read, rest: bytes) -> None:
    while rest:
        code, size = _number(rest[:2]), _number(rest[2:4])
        if code == 0:
            assert rest == b"\0\0\0\0"
            return
        value, rest = _cut(rest[4:], size)
        assert rest, "options end with opt_endofopt"
        if code == 1:
            block.comments.append(value.decode())
            continue
        name = OPTIONS[block.kind][code]
        if name in SIZES:
            assert size == SIZES[name]
            number = _number(value)
            if name.endswith("time"):
                number = _number(value[:4]) << 32 | _number(value[4:])
            block.numbers[name] = number
        else:
            block.texts[name] = value.decode()


def _cut(data: bytes, size: int) -> tuple[bytes, bytes]:
    """So many bytes, and what is behind them and their padding."""
    padded = (size + 3) // 4 * 4
    assert len(data) >= padded
    assert data[size:padded] == bytes(padded - size)
    return data[:size], data[padded:]


def _number(data: bytes) -> int:
    total = 0
    for i in range(len(data)):
        total += data[i] * 256**i
    return total


# tshark


def need_tshark() -> None:
    """Skips the test where there is no tshark."""
    if shutil.which("tshark") is None:
        pytest.skip("tshark isn't there")


def tshark(
    file: Path, *fields: str, only: str = "", options: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """These fields of each packet, as Wireshark reads them, all checksums looked at.

    `only` is a display filter.  Fails if tshark finds anything amiss with the file.
    """
    words = ["tshark", "-n", "-r", str(file), "-T", "fields", "-E", "separator=/t"]
    for proto in CHECKS:
        words += ["-o", f"{proto}.check_checksum:TRUE"]
    for name in fields:
        words += ["-e", name]
    if only:
        words += ["-Y", only]
    done = subprocess.run([*words, *options], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("Running as")]
    assert (done.returncode, complaints) == (0, [])
    return [tuple(line.split("\t")) for line in done.stdout.splitlines()]


def assert_sound(file: Path) -> None:
    """Every checksum in this capture of IP packets is right, by Wireshark's reckoning.

    But for one: it takes a TCP checksum of 0xFFFF for wrong, which is zero as Linux writes it
    (skb_checksum_help, net/core/dev.c).  What TCP and UDP carry is not looked into: by its port it
    may pass for anything, packets too.
    """
    status = [f"{proto}.checksum.status" for proto in CHECKS]
    wrong = tshark(
        file,
        *("frame.number", "frame.comment", *status, "_ws.col.Info"),
        only="!ip or !(ip.checksum.status == 1) or (tcp and "
        "!(tcp.checksum.status == 1 or tcp.checksum == 0xffff)) or "
        "(udp and !(udp.checksum.status == 1))",
        options=["-d", "tcp.port==0-65535,data", "-d", "udp.port==0-65535,data"],
    )
    assert wrong == []


def count(file: Path, filters: Sequence[str]) -> list[int]:
    """How many packets each of these display filters shows, all in one run.

    No filter may have a comma in it.
    """
    words = ["tshark", "-n", "-q", "-r", str(file), "-z", ",".join(["io,stat,0", *filters])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *_, last = (line for line in done.stdout.splitlines() if "<>" in line)
    return [int(cell) for cell in last.split("|")[2:-1:2]]  # frames; between them are bytes
