"""ICMP errors about relayed packets, translated (RFC 5508, section 4; RFC 4787, REQ-12).

An error quotes the beginning of the packet that it is about, as that packet read where the error
was made, and goes where the packet came from.  So it is translated by the rule of the packets that
go its way, the answers: the rewriting that an answer to the quoted packet would get at this hook,
read backwards, says what the quoted packet was before.

    U3,U4 of a flow         192.168.0.1:53 > 10.0.0.1:4000  =>  192.168.0.2:53 > 10.0.0.1:4000
    an error about         10.0.0.1:4000 > 192.168.0.1:53
    becomes one about      10.0.0.1:4000 > 192.168.0.2:53

Outside, the destination becomes the quoted packet's source (REQ-4c): for tcp-relay's own packets,
which left as C:y, that is the relay, whose kernel finds the socket.  The source changes if it is
where the quoted packet was going to: a server's "port unreachable" comes from the relay.  A
router's error keeps the router's address, which is what traceroute is for; but with source=relay
client and server know nothing of each other's networks, and the relay stands for all of them
(REQ-5c).

The relay host itself makes errors about packets on their way through it.  They are met when they go
out, in POSTROUTING, and are of two kinds:

    made before the packet's own POSTROUTING: too big for the next link, time to live over.  What
        they quote is what an answer meets in POSTROUTING; nothing is special.
    made behind it: no host on the link has that address.  They quote the packet as it left, and go
        where it seems to come from: to the client, though it was tcp-relay's, or to this host,
        though it was forwarded.  An answer would be met in PREROUTING.  The error is translated as
        if it had come in and gone through, and sent anew to where that leads.

No error makes a flow, ends one or keeps one alive (RFC 4787 REQ-12, RFC 5382 REQ-10).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from knet.endpoint import Proto, Source, key_addrs, key_dst, key_ports, key_src, reverse_key
from knet.wire import BadPacket, icmp, ipv4, udp
from knet.wire.checksum import difference, updated
from krelay.nat.flow import Rewrite
from krelay.steps import Hook, Step

BROKEN = frozenset({"icmp_checksum", "icmp_quoted_checksum"})
"""Reasons for which an error is dropped (RFC 5508, REQ-3); for all others it goes on untouched."""

Tables = Mapping[tuple[Hook, Proto], Mapping[bytes, Rewrite]]


class Translation(NamedTuple):
    """What has become of an error."""

    packet: bytes
    by: tuple[Rewrite, ...]
    """The rewritings, of answers, that were read backwards, in this order."""
    sent_anew: bool
    """Whether it goes elsewhere than the error was on its way to, and has to be sent from here."""


def translate(
    packet: bytes,
    header: ipv4.Header,
    hook: int,
    tables: Tables,
    own: frozenset[bytes],
    adopts: Callable[[bytes], bool] = lambda key: False,
) -> Translation | None:
    """The error as it goes on; None if it is about no packet of a flow.

    `packet` is an ICMP packet, `header` its own, `own` the addresses of this host; `adopts` is
    asked whether an unknown flow key is of a datagram that the kernel has relayed, and whose flow
    is in the tables from then on.  Raises
    BadPacket: `icmp_other` if it is no error that is translated, `icmp_quote` if it quotes no TCP
    or UDP packet, `icmp_astray` if it doesn't go to the sender of what it quotes; and, of those
    about packets of ours, `icmp_checksum` and `icmp_quoted_checksum`.
    """
    if header.total < header.length + icmp.HEADER or packet[header.length] not in icmp.ERRORS:
        raise BadPacket("icmp_other")
    quote = icmp.quoted(packet, header)
    if quote.src != header.dst:
        raise BadPacket("icmp_astray")
    proto, is_own = Proto(quote.proto), header.src in own
    for is_adopted in (False, True):
        if is_adopted and not (proto is Proto.UDP and adopts(quote.answers)):
            return None
        hooks = [Hook(hook)]
        rewrite = tables[hooks[0], proto].get(quote.answers)
        if rewrite is None and is_own and hook == Hook.POSTROUTING:
            hooks = [Hook.PREROUTING, Hook.POSTROUTING]
            rewrite = tables[Hook.PREROUTING, proto].get(quote.answers)
            # D1 is a client's own packet from a port that a flow has towards the server: what this
            # error quotes is the flow's, on its way to POSTROUTING.
            if rewrite is not None and rewrite.step is Step.D1:
                rewrite = None
        if rewrite is not None:
            break
    if rewrite is None:
        return None
    icmp.verify(packet, header, quote)

    destination, by = header.dst, []
    for at in hooks:
        rewrite = tables[at, proto].get(quote.answers)
        if rewrite is None:
            break
        packet = _reversed(packet, header, quote, rewrite, is_own)
        by.append(rewrite)
        header = ipv4.parse(packet)
        quote = icmp.quoted(packet, header)
    anew = hook == Hook.POSTROUTING and header.dst != destination
    return Translation(packet, tuple(by), anew)


def _reversed(
    packet: bytes, header: ipv4.Header, quote: icmp.Quote, rewrite: Rewrite, is_own: bool
) -> bytes:
    """The error as one about what the quoted packet was before; `rewrite` is that of its answers.

    All checksums are updated, none is made anew.
    """
    was = reverse_key(rewrite.new)
    src, dst = key_src(was), key_dst(was)
    hidden = rewrite.flow.source is Source.RELAY and dst != quote.dst and not is_own
    sender = dst if header.src == quote.dst or hidden else header.src
    changed = bytearray(packet)

    check = quote.at + ipv4.CHECK.start
    _update(changed, check, updated, rewrite.ip_delta)
    changed[quote.at + 12 : quote.at + 20] = key_addrs(was)
    changed[quote.l4 : quote.l4 + 4] = key_ports(was)
    if quote.check is not None:
        update = udp.updated_check if quote.proto == udp.PROTO else updated
        _update(changed, quote.check, update, rewrite.l4_delta)

    end = quote.l4 + 4 if quote.check is None else quote.check + 2
    quoted = slice(quote.at, end)
    delta = difference(packet[quoted], bytes(changed[quoted]))
    _update(changed, header.length + icmp.CHECK, updated, delta)

    delta = difference(packet[ipv4.ADDRESSES], sender + src)
    _update(changed, ipv4.CHECK.start, updated, delta)
    changed[ipv4.ADDRESSES] = sender + src
    return bytes(changed)


def _update(packet: bytearray, at: int, update: Callable[[int, int], int], delta: int) -> None:
    packet[at : at + 2] = update(int.from_bytes(packet[at : at + 2]), delta).to_bytes(2)
