"""Where the programs of the data path are attached: the links of this host, by netlink.

A link gets `clsact` if it has none, and two filters of ours, named as the rules are.  Whatever else
is there stays; `clsact` is taken away with our filters only if nothing else uses it.

Links that belong to another one (of a bridge, a bond) have none: their packets are seen on that
one.  Nor has loopback, what this host says to itself is relayed by no step.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2s

from knet import netlink
from knet.bpf import kernel
from knet.bpf.kernel import BpfProgram
from knet.netlink import Message, rtnetlink, tc
from knet.netlink.rtnetlink import HostLink
from knet.netlink.socket import NetlinkSocket
from krelay.rules.spec import instance_of

PATIENCE = 5.0
"""Seconds for an answer of the kernel's."""
_GONE = (errno.ENODEV, errno.ENOENT, errno.EINVAL)
"""What is said of a link, or a filter, that is there no more."""
_ETHERNET = 1
"""ARPHRD_ETHER (linux/if_arp.h)."""
_GRE = 778
_IP = (65534, 512, 768, 776, _GRE)
"""ARPHRD_NONE (tun, WireGuard), PPP, TUNNEL, SIT, IPGRE: packets begin with the IP header."""
_GROUPS = 0x1 | 0x8 | 0x40
"""RTMGRP_LINK, RTMGRP_TC, RTMGRP_IPV4_ROUTE (linux/rtnetlink.h)."""
_OWNERS = ("bridge", "bond", "team", "openvswitch")
_FIRST, _PRIORITIES = 0x4000, 0x4000


class Attachment:
    """The filters of one krelay.  Raises OSError without privilege, or without tc."""

    def __init__(self, name: str) -> None:
        """`name`: that of its rules."""
        self._name = name
        self._route_mtus: dict[int | None, int] | None = None
        """The smallest that routes over each link have; None: not looked at yet."""
        self._socket = NetlinkSocket(rtnetlink.FAMILY, timeout=PATIENCE)
        try:
            self._news = NetlinkSocket(rtnetlink.FAMILY, groups=_GROUPS, timeout=0)
        except OSError:
            self._socket.close()
            raise
        digest = blake2s(name.encode(), digest_size=2).digest()
        self._priority = _FIRST + int.from_bytes(digest) % _PRIORITIES

    def close(self) -> None:
        """Filters stay."""
        self._socket.close()
        self._news.close()

    def fileno(self) -> int:
        """Readable when links or filters have changed."""
        return self._news.fileno()

    def drain(self) -> bool:
        """Forgets what was told; whether it was of links, of filters, or of a route with a size of
        packets of its own."""
        matters = False
        for data in self._news.waiting():
            told = list(netlink.messages(data)) if data is not None else []
            if data is None or any(rtnetlink.route_mtus(told)):  # None: something was lost
                self._route_mtus = None
                matters = True
            matters = matters or not all(map(rtnetlink.is_of_route, told))
        return matters

    def attach_all(self, programs: Mapping[str, BpfProgram]) -> dict[int, int]:
        """Puts the filters where they are missing, and takes them from links that belong to another
        one since; the links that have them, and where what goes out meets ours whatever others
        say, by number, each with the bytes of its longest packet.  Raises OSError."""
        numbers = {kernel.program_number(each.descriptor) for each in programs.values()}
        attached, links = self.attached(), self.links()
        there = {at for at, number in attached.items() if number in numbers}
        for index in attached.keys() - {each.number for each in links}:
            self._detach(index)
        return {
            each.number: self._longest(each)
            for each in links
            if (each.number in there or self.attach(each, programs)) and self._is_met(each.number)
        }

    def _longest(self, link: HostLink) -> int:
        """Bytes of the longest packet that leaves whole by it: a route may take less than the link
        (ip_dst_mtu_maybe_forward, include/net/ip.h)."""
        if self._route_mtus is None:
            self._route_mtus = {}
            for over, size in rtnetlink.route_mtus(self._dump(rtnetlink.get_routes(self._next()))):
                self._route_mtus[over] = min(size, self._route_mtus.get(over, size))
        routes = self._route_mtus
        return min(link.mtu, *(routes.get(each, link.mtu) for each in (link.number, None)))

    def links(self) -> list[HostLink]:
        """Those that get filters.  Raises OSError."""
        return fit(rtnetlink.links(self._dump(rtnetlink.get_links(self._socket.next_sequence()))))

    def attach(self, link: HostLink, programs: Mapping[str, BpfProgram]) -> bool:
        """Puts our filters there, in place of former ones of ours; False if the link has gone, or
        another program has put `ingress` in the place of `clsact`: no filter sees what goes out by
        there, but the kernel takes one (ingress_tcf_block, net/sched/sch_ingress.c).

        Raises OSError.
        """
        layer = "ip" if link.kind in _IP else "ethernet"
        try:
            try:
                self._carry_out(tc.add_clsact(self._next(), link.number))
            except FileExistsError:
                if link.number not in self._with_clsact():
                    return False
            for parent, way in ((tc.OUT, "out"), (tc.IN, "in")):
                program = programs[f"{way}_{layer}"].descriptor
                self._carry_out(
                    tc.set_filter(
                        self._next(), link.number, parent, self._priority, program, self._name
                    )
                )
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            self._detach(link.number)
            raise
        return True

    def detach_all(self) -> list[str]:
        """Takes all filters of this name away, and `clsact` where nothing else is left.

        The names of the links that had any.  Raises OSError.
        """
        there = self._with_clsact()
        if not there:
            return []
        listed = rtnetlink.links(self._dump(rtnetlink.get_links(self._next())))
        names = {each.number: each.name for each in listed}
        return [names.get(index, str(index)) for index in there if self._detach(index)]

    def attached(self) -> dict[int, int]:
        """The links that have both filters of ours, each with the number of the program of what
        comes in.  Raises OSError."""
        found: dict[int, int] = {}
        for index in self._with_clsact():
            ours = {
                each.parent: each.program for each in self._filters(index) if self._is_ours(each)
            }
            if tc.IN in ours and tc.OUT in ours:
                found[index] = ours[tc.IN]
        return found

    def _detach(self, index: int) -> bool:
        """Whether there were any."""
        others = ours = False
        for parent in (tc.IN, tc.OUT):
            for each in self._filters(index, parent):
                if not self._is_ours(each):
                    others = True
                    continue
                ours = True
                with _gone():
                    self._carry_out(tc.delete_filter(self._next(), index, parent, each.priority))
        if ours and not others and not self._any_filter(index):
            with _gone():
                self._carry_out(tc.delete_clsact(self._next(), index))
        return ours

    def _is_met(self, index: int) -> bool:
        """Whether no filter stands before ours that may end the row of those for what goes out;
        another krelay's doesn't."""
        krelays, found = set[int](), list[int]()
        with _gone():
            told = list(self._dump(tc.get_filters(self._next(), index, tc.OUT)))
            krelays = {each.priority for each in tc.filters(told) if instance_of(each.name)}
            found = list(tc.priorities(told))
        return all(each >= self._priority or each in krelays for each in found)

    def _is_ours(self, each: tc.TcFilter) -> bool:
        return each.name == self._name

    def _with_clsact(self) -> list[int]:
        return list(tc.clsacts(self._dump(tc.get_qdiscs(self._next()))))

    def _filters(self, index: int, *parents: int) -> list[tc.TcFilter]:
        found: list[tc.TcFilter] = []
        for parent in parents or (tc.IN, tc.OUT):
            with _gone():
                found += tc.filters(self._dump(tc.get_filters(self._next(), index, parent)))
        return found

    def _any_filter(self, index: int) -> bool:
        """Whether any filter is there, of whatever kind."""
        for parent in (tc.IN, tc.OUT):
            with _gone():
                if list(self._dump(tc.get_filters(self._next(), index, parent))):
                    return True
        return False

    def _next(self) -> int:
        return self._socket.next_sequence()

    def _carry_out(self, request: bytes) -> None:
        self._socket.carry_out(request, 1, self._socket.sequence)

    def _dump(self, request: bytes) -> Iterator[Message]:
        """The messages of a list.  Raises OSError."""
        self._socket.send(request)
        while True:
            for message in netlink.messages(self._socket.recv(1 << 16)):
                if message.sequence != self._socket.sequence:
                    continue
                if (message.subsystem, message.kind) == (0, netlink.DONE):
                    return
                if message.error:
                    raise OSError(message.error, os.strerror(message.error))
                yield message


def detach(name: str) -> list[str]:
    """Takes away what a krelay with rules of this name has attached: the names of the links.

    Raises OSError; without tc there is nothing.
    """
    try:
        attachment = Attachment(name)
    except OSError:
        return []
    try:
        return attachment.detach_all()
    finally:
        attachment.close()


def fit(links: Iterable[HostLink]) -> list[HostLink]:
    """Those of them that get filters."""
    found = list(links)
    owners = {each.number for each in found if each.driver in _OWNERS}
    return [
        each
        for each in found
        if (each.kind == _ETHERNET or each.kind in _IP)
        and not each.is_loopback
        and each.master not in owners
        and each.driver != "vrf"
        and not (each.kind == _GRE and _has_many_ends(each))
    ]


def _has_many_ends(tunnel: HostLink) -> bool:
    """Then what goes out by it begins with the tunnel's own header (ipgre_header,
    net/ipv4/ip_gre.c)."""
    other = tunnel.broadcast
    return len(other) != 4 or other == bytes(4) or other[0] >> 4 == 0xE


@contextmanager
def _gone() -> Iterator[None]:
    """What is there no more needn't be taken away."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
