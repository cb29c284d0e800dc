"""What is seen of listeners and the queue, at moments that the real thing seldom shows."""

from pathlib import Path

import pytest

from knet import listeners
from krelay.control import client as control
from krelay.datapath import nfqueue
from krelay.doctor import seenkernel
from krelay.doctor.facts import Facts
from krelay.doctor.seen import Survey
from krelay.host import processes

ROOT = Path("/run/krelay")
GPORT, INODE, PID = 16000, 4711, 77


@pytest.mark.parametrize(
    ("command", "is_named"),
    [
        ("python3 -m tcp_relay", False),
        ("python3 -m krelay daemon", False),
        ("python3 -m krelay daemon --root /run/other", True),
        ("python3 -m http.server 16000", True),
    ],
)
def test_a_listener_that_came_after_krelay_was_asked(
    monkeypatch: pytest.MonkeyPatch, command: str, is_named: bool
) -> None:
    """tcp-relay's: krelay, whose process is met first, holds its socket too."""
    process = processes.RunningProgram(PID, tuple(command.split()))
    monkeypatch.setattr(seenkernel, "_sockets", lambda: iter([("tcp", None, GPORT, INODE)]))
    monkeypatch.setattr(listeners, "holder", lambda inodes: listeners.Holder(PID, "python3"))
    monkeypatch.setattr(processes, "look", lambda pid: process)
    seen = Survey(Facts(served=True, tcp_relays=0), ROOT, None, {}, cheap=False)

    seenkernel.listening(seen)

    assert [one.pid for one in seen.facts.listeners] == [PID] * is_named


@pytest.mark.parametrize(
    ("before", "now", "is_taken"),
    [
        ("running", "running", False),
        ("stopped", "running", False),
        ("", "running", False),  # nothing served the tree yet
        ("stopped", "stopped", True),
        ("", "", True),
    ],
)
def test_a_queue_that_came_after_krelay_was_asked(
    monkeypatch: pytest.MonkeyPatch, before: str, now: str, is_taken: bool
) -> None:
    def ask(root: Path, request: str) -> list[dict[str, str]]:
        if not now:
            raise control.NoDaemon("no krelay serves it")
        return [{"state": now}]

    monkeypatch.setattr(seenkernel, "_QUEUES", Path("/"))
    monkeypatch.setattr(nfqueue, "figures_shown", lambda: True)
    monkeypatch.setattr(nfqueue, "figures", lambda number: nfqueue.Figures(0, 0, 0, 0, 0))
    monkeypatch.setattr(control, "ask_json", ask)
    seen = Survey(Facts(served=bool(before), state=before), ROOT, None, {}, cheap=False)

    seenkernel.queue(seen)

    assert seen.facts.queue_taken is is_taken
