"""The ten phases of tprox through krelay and tcp-relay: the tester's server on the server host, its
clients on the client host."""

import socket

import pytest

from tests.net.world import World
from tests.tprox.field import Field, Ground
from tests.tprox.plan import PHASES, STALL
from tests.tprox.runner import run

pytestmark = [pytest.mark.net, pytest.mark.slow]


def ground(world: World) -> Ground:
    """A relay is no proxy that could be set behind itself: the chain is one relay."""

    def listen() -> socket.socket:
        with world.lab.enter("server"):
            return socket.create_server(("0.0.0.0", 80), backlog=256)

    def connect() -> socket.socket:
        with world.lab.enter("client"):
            return socket.create_connection((world.relay, 80), timeout=10)

    return Ground(listen, connect, connect)


def test_all_phases_pass_through_the_relay(world: World) -> None:
    world.begin(services="tcp/80")
    world.put(timeouts__stall=10)  # as the phases have it
    with Field(ground(world)) as field:
        verdicts = list(run(field, PHASES, STALL))

    print(*verdicts, sep="\n")
    assert [str(verdict) for verdict in verdicts if verdict.failure] == []
