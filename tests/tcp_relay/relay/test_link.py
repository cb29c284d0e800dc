"""The link against a relay socket that this test holds."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from knet.endpoint import Endpoint
from knet.loop import Loop
from krelay.registration.messages import (
    MAX_MESSAGE,
    Answer,
    BadMessage,
    Close,
    Resumed,
    emit,
    parse_request,
)
from tcp_relay.relay.link import RelayLink
from tests.tcp_relay.helpers import BOUND


class Talk:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str | Answer] = []
        self.at_link_up: Callable[[], None] = lambda: None

    def link_up(self) -> None:
        self.told.append("up")
        self.at_link_up()

    def link_down(self) -> None:
        self.told.append("down")

    def answered(self, answer: Answer) -> None:
        if answer == Resumed(666):
            raise BadMessage("unheard of")
        self.told.append(answer)


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def krelay(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "relay.sock"))
        listening.listen()
        listening.settimeout(BOUND)
        yield listening


def run_until(loop: Loop, condition: Callable[[], object]) -> None:
    deadline = loop.now + BOUND

    def look() -> None:
        assert loop.now < deadline
        if condition():
            loop.stop()
        else:
            loop.call_at(loop.now + 0.001, look)

    look()
    loop.run()


def test_what_doesnt_fit_waits_and_arrives_in_order(
    loop: Loop, krelay: socket.socket, tmp_path: Path
) -> None:
    talk = Talk()
    link = RelayLink(loop, tmp_path / "relay.sock", talk)
    messages = [Close(Endpoint.of("10.0.0.1", port)) for port in range(1, 5001)]

    def tell_all() -> None:
        for message in messages:
            link.send(message)

    talk.at_link_up = tell_all
    run_until(loop, lambda: link.is_up)
    peer, _ = krelay.accept()
    with peer:
        peer.setblocking(False)
        got = []

        def pull() -> bool:
            try:
                while packet := peer.recv(MAX_MESSAGE):
                    got.append(parse_request(packet))
            except BlockingIOError:
                pass
            return len(got) >= len(messages)

        run_until(loop, pull)
        assert got == messages
        assert loop._epoll.poll(0) == []  # nothing is left to be ready for
        link.close()


def test_it_connects_again_and_says_so(loop: Loop, krelay: socket.socket, tmp_path: Path) -> None:
    talk = Talk()
    link = RelayLink(loop, tmp_path / "relay.sock", talk)
    for _ in range(3):
        run_until(loop, lambda: link.is_up)
        peer, _ = krelay.accept()
        with peer:
            peer.send(emit(Resumed(7)))
        run_until(loop, lambda: not link.is_up)
    assert talk.told == ["up", Resumed(7), "down"] * 3
    link.close()


@pytest.mark.parametrize("packet", [b"{", b"x" * 5000, emit(Resumed(666))])
def test_a_malformed_message_ends_the_connection(
    loop: Loop, krelay: socket.socket, tmp_path: Path, packet: bytes
) -> None:
    talk = Talk()
    link = RelayLink(loop, tmp_path / "relay.sock", talk)
    run_until(loop, lambda: link.is_up)
    peer, _ = krelay.accept()
    with peer:
        peer.send(packet)
        run_until(loop, lambda: not link.is_up)
        peer.settimeout(BOUND)
        assert peer.recv(100) == b""
    assert talk.told == ["up", "down"]
    link.close()


def test_what_is_said_to_nobody_is_forgotten(loop: Loop, tmp_path: Path) -> None:
    talk = Talk()
    link = RelayLink(loop, tmp_path / "relay.sock", talk)
    link.send(Close(Endpoint.of("10.0.0.1", 1)))
    loop.call_at(loop.clock() + 0.01, loop.stop)
    loop.run()
    assert not link.is_up
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "relay.sock"))
        listening.listen()
        run_until(loop, lambda: link.is_up)
        peer, _ = listening.accept()
        with peer:
            peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                peer.recv(100)
            link.send(Close(Endpoint.of("10.0.0.1", 2)))
            link.close()  # what was said before is still said
            assert parse_request(peer.recv(100)) == Close(Endpoint.of("10.0.0.1", 2))
            assert peer.recv(100) == b""
