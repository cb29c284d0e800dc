"""Where T1 leads: the listening sockets that tcp-relays have handed over.

A port number doesn't say which program listens there.  So a tcp-relay hands over its listening
socket with the message `listening`, and krelay keeps that descriptor:

- It is the socket itself, known by the kernel's cookie.  Only where every socket that could get a
  client's packets (sockdiag.Socket.may_accept_for) is one that was handed over are clients led
  there.  Otherwise they are refused, and `why_not` says why.
- As long as it is held, no other program can have the port, whatever becomes of the process: two
  sockets listen on a port only if both say SO_REUSEPORT and are of one user (inet_csk_get_port).
- When a tcp-relay's connection is lost, `on_change` is called first, which ends T1, and then the
  descriptor is closed: at no moment is a client led to a port that another could have.

A socket that is held accepts nothing, if its tcp-relay is gone; so it isn't held for longer.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from knet.netlink.sockdiag import Socket

MOST = 16
"""Sockets held for one tcp-relay: those that a few changes of gport within seconds leave."""

CLOSING_FOR = 2
"""Looks (`check`) for which a socket that krelay has let go of may still be there."""

Owner = Hashable


class Held(NamedTuple):
    """A descriptor that was handed over, and the socket's cookie."""

    descriptor: int
    cookie: int


class GatewayPorts:
    """The sockets that are held, and at which ports clients may be led to them."""

    def __init__(
        self,
        cookie_of: Callable[[int], int | None],
        listeners: Callable[[int], Sequence[Socket] | None],
        close: Callable[[list[int]], object],
    ) -> None:
        """`cookie_of` tells a listening TCP socket's cookie, `listeners` which sockets listen on a
        port.

        `listeners` is None where the kernel doesn't tell; then no client is led anywhere.  `close`
        closes descriptors.
        """
        self.on_change: Callable[[], object] = lambda: None
        """Called when `served` has changed, before a descriptor is closed for it."""
        self.is_own: Callable[[bytes], bool] = lambda address: False
        """Whether clients may come to this address of this host."""
        self.served: frozenset[int] = frozenset()
        """The ports that clients may be led to."""
        self._cookie_of = cookie_of
        self._listeners = listeners
        self._close = close
        self._held: dict[Owner, dict[int, Held]] = {}
        self._let_go: dict[int, int] = {}
        """By cookie, for how many looks more."""

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def listening(self, owner: Owner, port: int, descriptors: list[int]) -> str | None:
        """This tcp-relay says that it listens there; what is wrong with that, or None.

        The descriptors are taken over.
        """
        if len(descriptors) != 1:
            self._close(descriptors)
            return "listening comes with one descriptor, that of the socket"
        descriptor = descriptors[0]
        cookie = self._cookie_of(descriptor)
        if cookie is None:
            self._close(descriptors)
            return "the descriptor is no TCP socket over IPv4 that listens"
        found = self._listeners(port)
        if found is None:
            self._close(descriptors)
            return "the kernel doesn't tell who listens on a port (tcp_diag)"
        if not any(each.cookie == cookie and each.address == bytes(4) for each in found):
            self._close(descriptors)
            return f"that socket doesn't listen on port {port} of all addresses here"
        held = self._held.setdefault(owner, {})
        gone = [held.pop(port)] if port in held else []
        held[port] = Held(descriptor, cookie)
        if len(held) > MOST:
            gone.append(held.pop(next(iter(held))))
        self._changed(gone)
        return None

    def given_up(self, owner: Owner, port: int) -> None:
        """This tcp-relay says that it doesn't listen there any more."""
        held = self._held.get(owner, {})
        if port in held:
            self._changed([held.pop(port)])

    def lost(self, owner: Owner) -> None:
        """This tcp-relay is gone."""
        self._changed(list(self._held.pop(owner, {}).values()))

    def check(self) -> None:
        """Looks whether another program has begun or ceased to listen; call it once a second."""
        self._let_go = {cookie: left - 1 for cookie, left in self._let_go.items() if left > 1}
        self._changed([])

    def others(self, port: int) -> list[Socket] | None:
        """The sockets that could get clients led to this port, and that no tcp-relay handed over.

        None where the kernel doesn't tell.
        """
        found = self._listeners(port)
        if found is None:
            return None
        ours = {each[port].cookie for each in self._held.values() if port in each}
        ours |= self._let_go.keys()
        others = [each for each in found if each.cookie not in ours]
        return [each for each in others if each.may_accept_for(self.is_own)]

    def _changed(self, gone: list[Held]) -> None:
        self._let_go |= {held.cookie: CLOSING_FOR for held in gone}
        ports = {port for held in self._held.values() for port in held}
        served = frozenset(port for port in ports if self.others(port) == [])
        if served != self.served:
            self.served = served
            self.on_change()
        if gone:
            self._close([held.descriptor for held in gone])
