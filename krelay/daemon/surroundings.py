"""This host as relaying sees it: addresses, the link to the server, connections of its own."""

from collections.abc import Callable
from ipaddress import IPv4Address

from knet.endpoint import Endpoint
from knet.log import Failures, Log
from knet.loop import Loop
from knet.socketdiag import SocketDiag
from krelay.doctor import checks
from krelay.doctor.facts import Facts, Path
from krelay.host.hostview import LOOPBACK, HostView
from krelay.host.links import LocalAddresses, Looker
from procfs_sim.tree import Config

RETRY = 1.0
"""Seconds until the host is looked at again, if it couldn't be."""

_log = Log("relaying")


class Surroundings:
    """How the host was when it was last looked at.

    `again` is called when it couldn't be looked at, and is to be once more.
    """

    def __init__(
        self,
        loop: Loop,
        looker: Looker,
        addresses: LocalAddresses,
        again: Callable[[], object],
        failures: Failures,
    ) -> None:
        self.view = HostView(frozenset(), (), None, False)
        """As it is taken to be: who looks decides whether to take over what is seen."""
        self.sockets = SocketDiag()
        self._loop = loop
        self._looker = looker
        self._addresses = addresses
        self._again = again
        self._failures = failures

    def look(self, server: IPv4Address) -> HostView:
        """The host as it is now; as it was before if it can't be looked at: then once more soon."""
        try:
            return self._looker.look(server)
        except OSError as error:
            self._failures.tell(
                self._loop.now, "the host's links can't be looked at; trying again", error
            )
            self._loop.call_at(self._loop.now + RETRY, self._again)
            return self.view

    def has(self, address: bytes, now: float) -> bool | None:
        """Whether this host has this address, as LocalAddresses says it."""
        return self._addresses.has(address, now)

    def may_be_asked(self, address: bytes) -> bool:
        """Whether clients may come to this address: it is this host's, for all that is known."""
        if address[0] == LOOPBACK:
            return False
        return address in self.view.own or self.has(address, self._loop.now) is not False

    def has_connection(self, own: Endpoint, peer: Endpoint) -> bool:
        """Whether a program of this host has a TCP connection between these ends."""
        try:
            return self.sockets.carrier(own, peer) is not None
        except OSError:
            return False  # the kernel doesn't tell: as if there were none

    def warn(self, config: Config) -> None:
        """What would make relaying fail quietly, told before the first packet is lost."""
        towards = IPv4Address(self.view.towards) if self.view.towards is not None else None
        path = Path(config.real_ip, "" if towards else None, towards)
        for finding in checks.surroundings(
            Facts(config=config, forwards=self.view.forwards, server=path)
        ):
            _log.warning(finding.text, fix=finding.fix)
