"""What has been found out about the host so far, and what every part of it reads and runs."""

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path as FilePath
from typing import Any

from knet import children
from krelay.doctor.facts import Facts

TIMEOUT = 10.0
"""Seconds for one run of nft or iptables-save."""
SYS = FilePath("/proc/sys/net")
NET = FilePath("/proc/thread-self/net")


class Survey:
    """The facts so far; each part adds some.

    `root`: the file tree; `client`: one that was named; `asked`: values of settings (by file) to be
    checked instead of those in the tree; `cheap`: parts that cost much are left out.
    """

    def __init__(
        self,
        facts: Facts,
        root: FilePath,
        client: IPv4Address | None,
        asked: Mapping[str, Any],
        *,
        cheap: bool,
    ) -> None:
        self.facts = facts
        self.problems: list[tuple[str, str]] = []
        self.root = root
        self.client = client
        self.asked = asked
        self.cheap = cheap
        self.in_force = 0
        """The gateway port that a running krelay has; 0: there is none."""

    def add(self, **found: Any) -> None:
        """Facts by name."""
        self.facts = replace(self.facts, **found)

    def unseen(self, part: str, reason: str) -> None:
        """A part that couldn't be looked at, or wasn't."""
        self.add(unseen=(*self.facts.unseen, (part, reason)))


def number(path: FilePath) -> int:
    """The number that a file of /proc holds.  Raises OSError."""
    return int(path.read_text())


def run(*command: str) -> str:
    """What a command prints.  Raises OSError if it fails."""
    done = subprocess.run(
        command,
        env=children.environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise OSError(f"{' '.join(command)}: {lines[0] if lines else 'failed'}")
    return done.stdout
