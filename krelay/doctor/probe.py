"""Whether the server's answers to a client come back through this host: by asking it as the client.

An ICMP echo request with the client's address as its source is sent to the server, and on the link
that leads there the answer is waited for, S > C.  A server that keeps silent to that, and to our
own echo, gets a TCP connection attempt at a relayed port in the same two ways.  So a client may see
an answer that it never asked for; it discards it (RFC 9293, section 3.10.7.1: by a reset).

Needs CAP_NET_RAW.
"""

import secrets
import select
import socket
import struct
import time
from contextlib import suppress
from ipaddress import IPv4Address

from krelay.doctor.facts import Facts, Returned
from krelay.rawsend import RawSender
from krelay.wire import ipv4
from krelay.wire.checksum import checksum

WITHIN = 1.0
"""Seconds for an answer; the request is repeated once."""
ETH_P_IP = 0x0800  # linux/if_ether.h
ICMP, TCP = 1, 6
ECHO_REQUEST, ECHO_REPLY = 8, 0  # RFC 792
SYN, RST, ACK = 0x02, 0x04, 0x10


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
        and facts.net_raw
    )


def probe(facts: Facts) -> Returned:
    """Asks the server, as the client and as this host.  Raises OSError."""
    assert facts.client is not None
    assert facts.server is not None
    assert facts.server.link is not None
    assert facts.server.source is not None
    ports = [service.first for service in facts.config.services if service.proto == "tcp"]
    with _Asker(facts.server.link, facts.config.real_ip) as asker:
        answers = False
        for port in (None, *ports[:2]):
            if asker.ask(facts.client.to, port):
                return Returned(answers=True, comes_back=True)
            answers = answers or asker.ask(facts.server.source, port)
            if answers:
                break
        return Returned(answers, comes_back=False)


class _Asker:
    """Sends requests to the server and sees what comes from it on its link."""

    def __init__(self, link: str, server: IPv4Address) -> None:
        self._server = server.packed
        self._sender = RawSender()
        try:
            self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            self._wire.bind((link, ETH_P_IP))
            self._wire.setblocking(False)
        except OSError:
            self._sender.close()
            raise

    def __enter__(self) -> "_Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.close()
        self._sender.close()

    def ask(self, source: IPv4Address, port: int | None) -> bool:
        """Whether an answer to `source` came here; by echo, or at a TCP port."""
        mark = secrets.randbelow(1 << 14) + 49152
        for _ in range(2):
            if port is None:
                packet = _echo(source.packed, self._server, mark)
            else:
                packet = _syn(source.packed, self._server, mark, port)
            self._sender.send(packet)
            if self._came(source.packed, mark, port):
                return True
        return False

    def _came(self, to: bytes, mark: int, port: int | None) -> bool:
        deadline = time.monotonic() + WITHIN / 2
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._wire], [], [], left)[0]:
                return False
            with suppress(BlockingIOError):
                packet, (_, _, kind, *_) = self._wire.recvfrom(1 << 16)
                if kind == socket.PACKET_HOST and self._is_answer(packet, to, mark, port):
                    return True
        return False

    def _is_answer(self, packet: bytes, to: bytes, mark: int, port: int | None) -> bool:
        if (len(packet) < 40 and port is not None) or len(packet) < 28:
            return False
        body = packet[(packet[0] & 15) * 4 :]
        if packet[12:16] != self._server or packet[16:20] != to or len(body) < 8:
            return False
        if port is None:
            return packet[9] == ICMP and body[0] == ECHO_REPLY and body[4:6] == mark.to_bytes(2)
        ends = struct.pack("!HH", port, mark)
        return packet[9] == TCP and body[:4] == ends and bool(body[13] & (ACK | RST))


def _echo(src: bytes, dst: bytes, mark: int) -> bytes:
    message = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, mark, 1) + b"krelay doctor"
    message = message[:2] + checksum(message).to_bytes(2) + message[4:]
    return ipv4.build(ICMP, src, dst, message)


def _syn(src: bytes, dst: bytes, mark: int, port: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", mark, port, mark, 0, 5 << 4, SYN, 1024, 0, 0)
    pseudo = src + dst + struct.pack("!BBH", 0, TCP, len(segment))
    segment = segment[:16] + checksum(pseudo + segment).to_bytes(2) + segment[18:]
    return ipv4.build(TCP, src, dst, segment)
