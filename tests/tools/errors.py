"""ICMP errors of tests, built by scapy; what they quote is a packet of packets.py."""

import re
from collections.abc import Sequence
from dataclasses import replace

from scapy.layers.inet import ICMP, IP, IPOption
from scapy.packet import Raw

from tests.tools.packets import HOSTS, Template, flow, template

MTU = 1300
"""That of the next hop, in those that say "fragmentation needed"."""


def error(
    text: str,
    *,
    packet: Template | None = None,
    quote: int | None = None,
    outer: Sequence[IPOption] = (),
    extension: bytes = b"",
) -> bytes:
    """The ICMP error `R > C 3/4 about C:4000 > S:53`, built by scapy.

    It quotes a packet of that flow, like `packet` in all else, whole or `quote` bytes of it.
    """
    found = re.fullmatch(r"(\S+) > (\S+) (\d+)/(\d+) about (.*)", " ".join(text.split()))
    assert found, text
    src, dst, kind, code, about = found.groups()
    quoted = replace(packet, flow=flow(about)) if packet else template(about)
    mtu = {"nexthopmtu": MTU} if (kind, code) == ("3", "4") else {}
    head = IP(src=HOSTS.get(src, src), dst=HOSTS.get(dst, dst), id=7, options=list(outer))
    message = ICMP(type=int(kind), code=int(code), **mtu)
    return bytes(head / message / Raw(quoted.build()[:quote] + extension))
