"""What the worker has counted since the start."""

from collections import Counter
from dataclasses import dataclass, field

from krelay.steps import Step


@dataclass(slots=True)
class PacketCounts:
    """Packets since the start."""

    steps: list[int] = field(default_factory=lambda: [0] * len(Step))
    """By Step: rewritten."""
    icmp: list[int] = field(default_factory=lambda: [0] * len(Step))
    """ICMP errors translated, by the step that answers take where the error goes."""
    passed: Counter[str] = field(default_factory=Counter)
    """By reason (reasons.py): gone on untouched."""
    dropped: Counter[str] = field(default_factory=Counter)
    trace_lost: int = 0
    """Packets that were not shown, since the reader of a trace isn't fast enough."""
