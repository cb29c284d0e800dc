"""What a process has relayed since it began, and its live connections as a table.

>>> counts = Counts()
>>> counts.accepted += 1
>>> counts.ended(End.STALLED)
>>> counts.as_dict()["accepted"], counts.as_dict()["stalled"]
(1, 1)
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tcp_relay.engine.session import End, Session


@dataclass(slots=True)
class Counts:
    """Totals; bytes are those that the receiving side took."""

    accepted: int = 0
    opened: int = 0
    moved: list[int] = field(default_factory=lambda: [0, 0])
    """Bytes from the client, from the server (Side)."""
    ends: dict[End, int] = field(default_factory=lambda: dict.fromkeys(End, 0))

    def ended(self, end: End) -> None:
        """One connection has."""
        self.ends[end] += 1

    def as_dict(self) -> dict[str, int]:
        """By name, in a fixed order."""
        return {
            "accepted": self.accepted,
            "opened": self.opened,
            **{str(end): count for end, count in self.ends.items()},
            "from_client": self.moved[0],
            "from_server": self.moved[1],
        }


class Row(NamedTuple):
    """One live connection, as people see it."""

    client: str
    server: str
    state: str
    age: float
    idle: float
    from_client: int
    from_server: int
    held: str  # from client / from server


def state_of(session: Session, is_connected: bool) -> str:
    """In a word or two."""
    if not is_connected:
        return "connecting"
    if session.is_resetting:
        return "resetting"
    if session.up.got_eof and session.down.got_eof:
        return "closing"
    if session.up.got_eof:
        return "client finished"
    return "server finished" if session.down.got_eof else "open"


def table(rows: Iterable[Row], counts: Counts) -> str:
    """The rows in aligned columns, and a line of totals."""
    head = ("CLIENT", "SERVER", "STATE", "AGE", "IDLE", "FROM CLIENT", "FROM SERVER", "HELD")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    totals = " ".join(f"{name}={count}" for name, count in counts.as_dict().items() if count)
    return "\n".join([*text, f"open={len(lines) - 1} {totals}".rstrip(), ""])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.client,
        row.server,
        row.state,
        f"{row.age:.1f}",
        f"{row.idle:.1f}",
        str(row.from_client),
        str(row.from_server),
        row.held,
    )
