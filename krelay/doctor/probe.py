"""Whether the server's answers to a client come back through this host: by asking it as the client.

An ICMP echo request with the client's address as its source is sent to the server, and a TCP
connection attempt at relayed ports, and on the link that leads there an answer is waited for,
S > C.  The same is asked in our own name: if nothing of that is answered either, the server's
silence means nothing.  So a client may see an answer that it never asked for; it discards it
(RFC 9293, section 3.10.7.1: by a reset, which also ends what was begun at the server).

Needs CAP_NET_RAW.
"""

import secrets
import select
import socket
import struct
import time
from contextlib import suppress

from knet.rawsocket import RawSender
from knet.wire import ipv4
from knet.wire.checksum import checksum
from krelay.doctor.facts import Facts, Returned

WITHIN = 1.0
"""Seconds for an answer; halfway the requests are sent again."""
TRIES = 2
MOST_PORTS = 3
MIN_TCP = 20
ETH_P_IP = 0x0800  # linux/if_ether.h
ICMP, TCP = 1, 6
ECHO_REQUEST, ECHO_REPLY = 8, 0  # RFC 792
SYN = 0x02


def is_needed(facts: Facts) -> bool:
    """Whether there is a question that a probe can answer."""
    return (
        facts.client is not None
        and facts.client.problem == ""
        and facts.server is not None
        and facts.server.link is not None
        and facts.server.source is not None
        and facts.server.problem == ""
        and facts.config.source == "client"
        and not facts.beside
        and not facts.redirects_leave  # our own question would bring one about
        and facts.net_raw
    )


def probe(facts: Facts) -> Returned:
    """Asks the server, as the client and as this host.  Raises OSError."""
    assert facts.client is not None
    assert facts.server is not None
    assert facts.server.link is not None
    assert facts.server.source is not None
    server = facts.config.real_ip.packed
    tcp = [service.first for service in facts.config.services if service.proto == "tcp"]
    questions = {
        source: [_Question(source, server, port) for port in (None, *tcp[:MOST_PORTS])]
        for source in (facts.client.to.packed, facts.server.source.packed)
    }
    answered = _ask(facts.server.link, [q for asked in questions.values() for q in asked])
    client = facts.client.to.packed in answered
    return Returned(answers=bool(answered), comes_back=client)


class _Question:
    """One request, and how its answer is known."""

    def __init__(self, source: bytes, server: bytes, port: int | None) -> None:
        self.source = source
        self._server = server
        self._port = port
        mark = secrets.randbelow(1 << 14) + 49152
        self._mark = mark.to_bytes(2)
        make = _echo(source, server, mark) if port is None else _syn(source, server, mark, port)
        self.packet = make

    def is_answered_by(self, packet: bytes) -> bool:
        """Whether these bytes, an IPv4 packet or not, are the answer."""
        if len(packet) < ipv4.MIN_HEADER or packet[12:20] != self._server + self.source:
            return False
        body = packet[(packet[0] & 15) * 4 :]
        if self._port is None:
            return packet[9] == ICMP and body[:1] == bytes([ECHO_REPLY]) and body[4:6] == self._mark
        ends = self._port.to_bytes(2) + self._mark
        return packet[9] == TCP and body[:4] == ends and len(body) >= MIN_TCP


def _ask(link: str, questions: list[_Question]) -> set[bytes]:
    """The sources of the requests that were answered.  Ends early when all sources were."""
    answered: set[bytes] = set()
    sources = {question.source for question in questions}
    sender = RawSender()
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire:
            wire.bind((link, ETH_P_IP))
            wire.setblocking(False)
            for _ in range(TRIES):
                for question in questions:
                    sender.send(question.packet)
                deadline = time.monotonic() + WITHIN / TRIES
                while answered != sources and (left := deadline - time.monotonic()) > 0:
                    if not select.select([wire], [], [], left)[0]:
                        break
                    with suppress(BlockingIOError):
                        packet, (_, _, kind, *_) = wire.recvfrom(1 << 16)
                        if kind == socket.PACKET_HOST:  # sent to this host's link address
                            answered |= {q.source for q in questions if q.is_answered_by(packet)}
                if answered == sources:
                    break
    finally:
        sender.close()
    return answered


def _echo(src: bytes, dst: bytes, mark: int) -> bytes:
    message = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, mark, 1) + b"krelay doctor"
    message = message[:2] + checksum(message).to_bytes(2) + message[4:]
    return ipv4.build(ICMP, src, dst, message)


def _syn(src: bytes, dst: bytes, mark: int, port: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", mark, port, mark, 0, 5 << 4, SYN, 1024, 0, 0)
    pseudo = src + dst + struct.pack("!BBH", 0, TCP, len(segment))
    segment = segment[:16] + checksum(pseudo + segment).to_bytes(2) + segment[18:]
    return ipv4.build(TCP, src, dst, segment)
