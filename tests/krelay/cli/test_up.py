"""`krelay up`: when it begins, and what keeps it from that.  What it runs: tests/net."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from krelay.cli import up
from krelay.cli.up import TAKEN_FOR, UpFailed

TAKEN = "port 16000 is in use by nginx (pid 812); end that, or set gport"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], bool]]:
    """Made of (second, gateway_port, tcp_relays): what krelay says at those times."""

    def make(*answers: tuple[float, str, int]) -> Callable[[], bool]:
        coming: Iterator[tuple[float, str, int]] = iter(answers)
        now = [0.0]

        def status(_: Path) -> dict[str, Any]:
            now[0], port, relays = next(coming)
            return {"gateway_port": port, "tcp_relays": relays}

        monkeypatch.setattr(up, "_status", status)
        monkeypatch.setattr("krelay.cli.up.time.monotonic", lambda: now[0])
        return up._served(Path("/nowhere"))

    return make


def test_a_socket_that_is_about_to_be_handed_over_is_no_other_program(
    said: Callable[..., Callable[[], bool]],
) -> None:
    is_served = said((0.0, TAKEN, 0), (0.1, TAKEN, 1), (0.2, "served", 1))

    assert [is_served() for _ in range(3)] == [False, False, True]


def test_a_port_that_stays_taken_is_told(said: Callable[..., Callable[[], bool]]) -> None:
    is_served = said((0.0, TAKEN, 1), (TAKEN_FOR, TAKEN, 1), (TAKEN_FOR + 0.1, TAKEN, 1))

    assert not is_served()
    assert not is_served()
    with pytest.raises(UpFailed, match="in use by nginx"):
        is_served()


def test_a_port_that_is_taken_now_and_then_is_waited_for(
    said: Callable[..., Callable[[], bool]],
) -> None:
    free = "no tcp-relay listens on port 16000"
    is_served = said((0.0, TAKEN, 1), (0.9, free, 1), (1.5, TAKEN, 1), (2.4, TAKEN, 1))

    assert not any(is_served() for _ in range(4))


def test_where_nothing_needs_tcp_relay_its_connection_is_enough(
    said: Callable[..., Callable[[], bool]],
) -> None:
    is_served = said((0.0, "unused", 0), (0.1, "unused", 1))

    assert [is_served() for _ in range(2)] == [False, True]
