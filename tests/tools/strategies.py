"""Hypothesis strategies: endpoints, flows and packets, with corners that chance alone rarely hits.

For random packets by the hundred thousand, hypothesis is too slow: `mutated` takes a seeded Random.
"""

from dataclasses import replace
from random import Random

from hypothesis import strategies as st

from knet.endpoint import Endpoint, FiveTuple, Proto
from tests.tools.packets import Template, with_zero_check, with_zero_ip_check

CORNER_WORDS = (0, 1, 2, 0x00FF, 0x0100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)

words = st.sampled_from(CORNER_WORDS) | st.integers(0, 0xFFFF)
"""16-bit numbers, often those where carries and both zeros show."""
ports = st.sampled_from((1, 53, 80, 1023, 1024, 0xFFFF)) | st.integers(1, 0xFFFF)
addresses = st.sampled_from(
    (b"\x0a\0\0\x01", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xc0\xa8\0\x02")
) | st.binary(min_size=4, max_size=4)
endpoints = st.builds(Endpoint, addresses, ports)
payloads = st.sampled_from((b"", b"\0", b"\xff\xff", b"odd")) | st.binary(max_size=300)
options = st.integers(0, 10).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n))
"""Options of IP or TCP, any bytes: what is in them is not the relay's business."""


def flows(*protos: Proto) -> st.SearchStrategy[FiveTuple]:
    """Flows of these protocols, all if none is named."""
    return st.builds(FiveTuple, st.sampled_from(protos or tuple(Proto)), endpoints, endpoints)


def templates(*protos: Proto) -> st.SearchStrategy[Template]:
    """Packets with right checksums."""
    return st.builds(
        Template,
        flow=flows(*protos),
        payload=payloads,
        flags=st.integers(0, 0x3F),
        seq=st.integers(0, 2**32 - 1),
        ack=st.integers(0, 2**32 - 1),
        tos=st.integers(0, 255),
        ident=words,
        fragment=st.sampled_from((0, 0x4000, 0x8000)),
        ttl=st.integers(0, 255),
        ip_options=st.just(b"") | options,
        tcp_options=options,
        check=st.sampled_from((True, True, False)),
        padding=st.just(b"") | st.binary(max_size=6),
    )


@st.composite
def rewritings(draw: st.DrawFn, *protos: Proto) -> tuple[Template, FiveTuple]:
    """A packet and another flow to send it on; each checksum may be zero before or after."""
    packet = draw(templates(*protos))
    to = FiveTuple(packet.flow.proto, draw(endpoints), draw(endpoints))
    corner = draw(st.sampled_from((None, None, packet.flow, to)))
    if corner is not None:
        even = packet.payload + b"\0" * (2 - len(packet.payload) % 2)
        packet = with_zero_check(replace(packet, payload=even), corner)
    corner = draw(st.sampled_from((None, None, packet.flow, to)))
    if corner is not None:
        packet = with_zero_ip_check(packet, corner)
    return packet, to


def mutated(packet: bytes, rng: Random) -> bytes:
    """The packet, 33 bytes at least, with something wrong about it."""
    damaged = bytearray(packet)
    match rng.randrange(6):
        case 0:  # bits
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        case 1:  # its end
            del damaged[rng.randrange(len(damaged)) :]
        case 2:  # its end, and a total length that agrees
            del damaged[rng.randrange(len(damaged)) :]
            damaged[2:4] = len(damaged).to_bytes(2) if len(damaged) >= 4 else damaged[2:4]
        case 3:  # total length, or UDP's
            where = rng.choice((2, 24))
            damaged[where : where + 2] = rng.choice((*CORNER_WORDS, len(packet) - 1)).to_bytes(2)
        case 4:  # version and header length, TCP's offset
            damaged[rng.choice((0, 32))] = rng.randrange(256)
        case _:  # bytes too many
            damaged += rng.randbytes(rng.randint(1, 40))
    return bytes(damaged)
