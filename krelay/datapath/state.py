"""What the stages of the worker share: what is relayed, what is counted and answered."""

from collections.abc import Callable

from knet.endpoint import Endpoint
from krelay.datapath.counters import PacketCounts
from krelay.datapath.policy import Policy
from krelay.nat.table import NatTable


class WorkerState:
    """Set from outside, read by every stage; `policy` is None before anything is to be relayed."""

    def __init__(self, nat: NatTable) -> None:
        self.nat = nat
        self.policy: Policy | None = None
        self.recovering_until = 0.0
        """Until then, flows of a killed krelay may still be resumed."""
        self.waiting_until = 0.0
        """Until then, clients are refused for want of a tcp-relay in silence."""
        self.counts = PacketCounts()
        self.answers: list[bytes] = []
        """Packets of our own that refusals gave rise to; the shell sends them and empties this."""
        self.asks_host: Callable[[bytes, float], bool | None] = lambda address, now: False
        """Whether this host has an address that isn't among the known ones (Policy.own), as the
        rules see it at this moment; None if that can't be known."""
        self.has_connection: Callable[[Endpoint, Endpoint], bool] = lambda own, peer: False
        """Whether a program of this host has a TCP connection between its own end and that peer's:
        asked before a midstream pickup."""
