"""Which relay ports are tried, and what an answer without a connection does."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from krelay.flow import Endpoint, Source
from krelay.loop import Loop
from krelay.relaymsg import Abort, Answer, Opened, Refused, Resumed
from tcp_relay.relay import PORT_GAP, Relay


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with Loop() as loop:
        relay = Relay(loop, tmp_path / "relay.sock", lambda: None)
        yield relay
        relay.close("the test is over")


def test_relay_ports_go_round_the_hosts_own_range_and_come_again_late(relay: Relay) -> None:
    low, high = relay._ports[0], relay._ports[-1]
    size = high - low + 1
    ports = [relay.next_port() for _ in range(2 * size)]
    assert all(low <= port <= high for port in ports)
    gaps = {(after - before) % size for before, after in pairwise(ports)}
    assert gaps == set(range(1, PORT_GAP + 1))
    lap = size // PORT_GAP
    assert len(set(ports[:lap])) == lap


@pytest.mark.parametrize(
    "answer",
    [
        Opened(7, Endpoint.parse("192.168.0.1:80"), Source.CLIENT),
        Resumed(7),
        Refused(7, "no row"),
        Refused(None, "not a JSON object"),
        Abort(Endpoint.parse("192.168.0.2:45678")),
    ],
)
def test_an_answer_about_nobody_is_ignored(relay: Relay, answer: Answer) -> None:
    relay.answered(answer)
    assert len(relay) == 0
