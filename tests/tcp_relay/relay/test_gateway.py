"""Which listeners there are when the gateway port changes."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from knet.loop import Loop
from tcp_relay.engine.sockets import Socket
from tcp_relay.relay import gateway as module
from tcp_relay.relay.gateway import Gateway
from tests.tcp_relay.helpers import LOCALHOST, free_port, turns


class Nobody:
    """Who hears where is listened, and notes it."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []
        """Each port, and the descriptor; -1 when it is given up."""

    def listening(self, port: int, sock: Socket) -> None:
        self.heard.append((port, sock.fileno()))

    def not_listening(self, port: int) -> None:
        self.heard.append((port, -1))


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def accepted() -> list[int]:
    """The ports on which clients were accepted."""
    return []


@pytest.fixture
def gateway(loop: Loop, accepted: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(module, "LISTENER_LINGER", 0.05)
    monkeypatch.setattr(module, "RETRY", 0.01)

    def take(gport: int, client: Socket, server: Socket, _: tuple[Any, ...]) -> None:
        assert client.getsockname()[1] == gport
        accepted.append(gport)
        client.close()
        server.close()

    gateway = Gateway(loop, take, Nobody())
    yield gateway
    gateway.close()


def run(loop: Loop, seconds: float) -> None:
    loop.call_at(loop.clock() + seconds, loop.stop)  # `now` may be as old as the last run
    loop.run()


def knock(port: int) -> bool:
    try:
        socket.create_connection((LOCALHOST, port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_old_listener_lingers_and_then_closes(
    loop: Loop, gateway: Gateway, accepted: list[int]
) -> None:
    old, new = free_port(), free_port()
    gateway.listen_on(old)
    gateway.listen_on(new)
    assert gateway.port == new
    assert knock(old)
    assert knock(new)
    run(loop, 0.01)
    assert sorted(accepted) == sorted([old, new])
    run(loop, 0.1)
    assert not knock(old)
    assert knock(new)


def test_a_port_that_was_just_given_up_may_be_taken_a_little_longer(
    loop: Loop, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """krelay has that socket until it hears that it is to be closed."""
    first, second = free_port(), free_port()
    gateway.listen_on(first)
    assert gateway._current is not None
    with gateway._current.sock.dup() as krelays:
        gateway.listen_on(second)
        run(loop, 0.1)
        gateway.listen_on(first)
        assert gateway.port == second
        assert krelays.getsockname()[1] == first
    assert "can't listen" not in caplog.text
    run(loop, 0.1)
    assert gateway.port == first

    with socket.socket() as other:
        gateway.listen_on(second)
        run(loop, 0.1)
        other.bind((LOCALHOST, first))
        other.listen()
        gateway.listen_on(first)
        run(loop, 0.1)
    assert "can't listen" in caplog.text


def test_who_was_in_the_old_queue_is_accepted_before_it_closes(
    loop: Loop, gateway: Gateway, accepted: list[int]
) -> None:
    old, new = free_port(), free_port()
    gateway.listen_on(old)
    gateway.listen_on(new)
    [listener] = gateway._lingering
    for _ in range(5):
        assert knock(old)
    gateway._lingering.pop(listener).cancel()
    listener.close()
    assert accepted == [old] * 5
    assert loop is not None


def test_back_to_a_port_that_lingers(loop: Loop, gateway: Gateway) -> None:
    one, two = free_port(), free_port()
    for port in (one, two, one):
        gateway.listen_on(port)
    run(loop, 0.1)
    assert knock(one)
    assert not knock(two)


def test_a_taken_port_is_tried_again_until_another_is_asked_for(
    loop: Loop, gateway: Gateway
) -> None:
    first = free_port()
    gateway.listen_on(first)
    with socket.create_server((LOCALHOST, 0)) as other:
        taken = other.getsockname()[1]
        gateway.listen_on(taken)
        run(loop, 0.03)
        assert gateway.port == first
        gateway.listen_on(first)  # asked back
        assert gateway._retry is None
    run(loop, 0.05)
    assert gateway.port == first
    gateway.listen_on(taken)
    assert gateway.port == taken


def test_what_a_client_needs_is_inherited_from_the_listener(loop: Loop) -> None:
    options: list[tuple[int, ...]] = []

    def take(_: int, client: Socket, server: Socket, __: tuple[Any, ...]) -> None:
        for sock in (client, server):
            options.append(
                (
                    sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE),
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER),
                )
            )
            sock.close()

    gateway = Gateway(loop, take, Nobody())
    port = free_port()
    gateway.listen_on(port)
    assert knock(port)
    turns(loop)
    gateway.close()
    assert options == [(1, 1, 1, 1)] * 2


def test_a_gateway_that_is_closed_stays_closed_whoever_makes_room(
    loop: Loop, gateway: Gateway
) -> None:
    port = free_port()
    gateway.listen_on(port)
    gateway.close()
    gateway.resume()
    assert not knock(port)
    assert gateway.port is None
    assert loop is not None


def test_several_processes_may_listen_on_a_shared_gateway_port(loop: Loop) -> None:
    port = free_port()
    gateways = [Gateway(loop, lambda *_: None, Nobody(), shared=True) for _ in range(2)]
    for gateway in gateways:
        gateway.listen_on(port)
        assert gateway.port == port
    for gateway in gateways:
        gateway.close()
