"""What is decided for packets: the verdict, and for those that no flow claims what they begin.

A new packet goes through stages that hand on values (newflow.py): it is classified as one of the
decisions below, then the flow is created, then the packet is rewritten.
"""

from dataclasses import dataclass
from enum import Enum

from krelay.datapath.reasons import Reason


class Verdict(Enum):
    """What becomes of a packet that isn't rewritten.  A rewritten one is its new bytes."""

    PASS = "goes on untouched"
    DROP = "goes nowhere"


@dataclass(frozen=True, slots=True)
class NewTcp:
    """A connection that tcp-relay terminates begins."""


@dataclass(frozen=True, slots=True)
class NewForwarded:
    """A flow of UDP begins, or of TCP that is forwarded; perhaps by a midstream pickup."""


@dataclass(frozen=True, slots=True)
class Direct:
    """A client's own packet to a server.  Its conversation is moved if a flow has its port."""


@dataclass(frozen=True, slots=True)
class Own:
    """A packet of this host's own goes on.  `begins`: replies to it will come, and are noted."""

    begins: bool
    is_moved: bool = False
    """Whether it gets another port if a flow has its own, as in Direct."""


@dataclass(frozen=True, slots=True)
class OtherPort:
    """A datagram that may be an answer from another port than was asked; else it is unmatched."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """A datagram that may answer a query which the kernel has learnt; else it is OtherPort."""


@dataclass(frozen=True, slots=True)
class NotRewritten:
    """It begins nothing."""

    reason: Reason


class Refuse(NotRewritten):
    """No flow begins: the packet is dropped, and its sender is told so if it may be."""

    __slots__ = ()


class Pass(NotRewritten):
    """It goes on untouched."""

    __slots__ = ()


class Drop(NotRewritten):
    """It goes nowhere."""

    __slots__ = ()


Begun = NewTcp | NewForwarded | OtherPort | Direct | Own | Learnt
Decision = Begun | NotRewritten
