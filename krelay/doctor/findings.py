"""What a check says."""

from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How well it is."""

    OK = "ok"
    NOT_TRIED = "not tried"
    """It couldn't be looked at, or wasn't asked for; the text says why."""
    WARNING = "warning"
    FAILED = "failed"


class Finding(NamedTuple):
    """One line of the doctor's."""

    check: str
    level: Level
    text: str
    fix: str = ""
    """A command for a shell of root's, or empty if there is none."""
    safe: bool = False
    """Whether `--fix` runs the fix: it changes nothing of anybody else's."""
    fatal: bool = False
    """Whether relaying can't even begin."""

    def __str__(self) -> str:
        return f"{self.text}; fix: {self.fix}" if self.fix else self.text


OK, WARNING, FAILED = Level.OK, Level.WARNING, Level.FAILED


def not_tried(check: str, reason: str) -> Finding:
    """A check that couldn't be made, or wasn't asked for, and why."""
    return Finding(check, Level.NOT_TRIED, reason)
