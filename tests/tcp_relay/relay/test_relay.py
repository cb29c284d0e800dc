"""Which relay ports are tried, and what an answer without a connection does."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from knet.endpoint import Endpoint, Source
from knet.loop import Loop
from krelay.registration.messages import Abort, Answer, Opened, Refused, Resumed
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.relay.connection import Connection
from tcp_relay.relay.relay import Relay, _own_ports, _shuffled


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with Loop() as loop:
        relay = Relay(Engine(loop, SessionLimits()), tmp_path / "relay.sock")
        yield relay
        relay.close()


def test_relay_ports_go_round_the_hosts_own_range_and_come_again_as_late_as_can_be(
    relay: Relay,
) -> None:
    own = _own_ports(0, 1)
    laps = [[relay.next_port() for _ in own] for _ in range(2)]
    assert laps[0] == laps[1]
    assert sorted(laps[0]) == list(own)


def test_the_order_of_relay_ports_is_drawn_by_lot() -> None:
    ports = range(1024, 65536)
    orders = [list(_shuffled(ports)) for _ in range(2)]
    assert orders[0] != orders[1]
    for order in orders:
        followed = sum(after == before + 1 for before, after in pairwise(order))
        assert followed < 50  # one is to be expected


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


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_workers_share_the_relay_ports_without_one_being_two_s(of: int) -> None:
    shares = [_own_ports(index, of) for index in range(of)]
    ports = [port for share in shares for port in share]
    assert ports == list(_own_ports(0, 1))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_workers_than_ports_use_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "40000\t40001\n")
    assert [list(_own_ports(index, 4)) for index in range(4)] == [
        [40000, 40001],
        [40000],
        [40000, 40001],
        [40001],
    ]


def test_its_own_address_is_the_one_towards_the_server(relay: Relay) -> None:
    connection = cast(Connection, SimpleNamespace(host="10.9.9.9"))
    assert relay.own_address(connection) == "10.9.9.9"  # nothing is known yet
    relay.real_ip = "127.0.0.1"
    assert relay.own_address(connection) == "127.0.0.1"


def test_its_own_address_is_asked_for_again_when_it_has_gone(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = cast(Connection, SimpleNamespace(host="10.9.9.9"))
    relay.real_ip = "127.0.0.1"
    assert relay.own_address(connection) == "127.0.0.1"
    monkeypatch.setattr("tcp_relay.relay.relay._own_address", lambda real_ip: "127.0.0.2")
    assert relay.own_address(connection) == "127.0.0.1"
    relay.forget_address()
    assert relay.own_address(connection) == "127.0.0.2"


def test_reserved_ports_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "ip_local_port_range": "40000\t40009\n",
        "ip_local_reserved_ports": "40001,40003-40008\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: texts[path.name])
    assert list(_own_ports(0, 1)) == [40000, 40002, 40009]
    assert [list(_own_ports(index, 2)) for index in range(2)] == [[40000, 40002], [40009]]
