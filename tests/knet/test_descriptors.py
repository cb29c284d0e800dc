"""Descriptors that are handed over: taken, known, and closed without waiting for anybody."""

import array
import gc
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from knet import descriptors
from knet.loop import Loop
from knet.roles import ADMIN
from knet.socketdiag import SocketDiag
from knet.unixsock import Crowd, UnixListener
from krelay.nat.table import NatTable
from krelay.registration.gatewayports import GatewayPorts
from krelay.registration.messages import Close, Listening, NotListening, Refused, emit, parse_answer
from krelay.registration.registry import Relays
from krelay.registration.server import RelaySocket
from tests.tools.packets import at, policy

LINGER = 3
"""Seconds that closing takes."""
PROMPTLY = 1.0


def hand(link: socket.socket, data: bytes, *descriptors: int) -> None:
    rights = array.array("i", descriptors)
    link.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def listener(port: int = 0, address: str = "0.0.0.0", shared: bool = False) -> socket.socket:
    return socket.create_server((address, port), reuse_port=shared)


def lingering() -> tuple[int, socket.socket]:
    """A connection that takes LINGER to close, since its peer, the second, doesn't read."""
    with listener(address="127.0.0.1") as at_:
        one = socket.create_connection(at_.getsockname())
        two, _ = at_.accept()
    one.setblocking(False)
    try:
        while True:
            one.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
    return one.detach(), two


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class World:
    """A relay socket, and how many descriptors this process has."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "relay.sock"
        self.loop = Loop()
        self.diag = SocketDiag()
        self.gateways = GatewayPorts(
            descriptors.cookie_of_listener, self.diag.listeners, descriptors.close_all
        )
        self.relays = Relays(NatTable(rng=None), policy, lambda *_: None)  # type: ignore[arg-type]
        self.socket = RelaySocket(self.loop, directory, self.relays, self.gateways)

    def turn(self) -> None:
        self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
        self.loop.run()

    def connect(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.connect(str(self.path))
        link.settimeout(30)
        self.turn()
        return link

    def close(self) -> None:
        self.socket.close()
        self.loop.close()
        self.diag.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def is_free(world: World, port: int) -> bool:
    return world.diag.listeners(port) == []


def open_descriptors() -> int:
    gc.collect()  # what earlier tests have left must not go meanwhile
    return len(os.listdir("/proc/self/fd"))


# What a descriptor is


def test_a_listening_tcp_socket_is_known_by_its_cookie_and_by_no_number() -> None:
    with listener() as one, listener() as two:
        cookies = [descriptors.cookie_of_listener(each.fileno()) for each in (one, two)]
        copy = os.dup(one.fileno())
        assert descriptors.cookie_of_listener(copy) == cookies[0]
        os.close(copy)
        assert None not in cookies
        assert cookies[0] != cookies[1]


def test_what_is_no_such_socket_has_no_cookie() -> None:
    with (
        socket.socket() as bound,
        socket.socket(socket.AF_INET6) as v6,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        open("/dev/null") as file,
    ):
        bound.bind(("127.0.0.1", 0))
        v6.listen()
        for each in (bound, v6, udp, unix, file):
            assert descriptors.cookie_of_listener(each.fileno()) is None
    assert descriptors.cookie_of_listener(-1) is None


def test_the_kernel_tells_who_listens_and_whose_a_connection_is() -> None:
    diag = SocketDiag()
    with listener() as one, socket.socket(socket.AF_INET6) as six:
        port = one.getsockname()[1]
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::", port))
        six.listen()
        found = diag.listeners(port)
        assert found is not None
        assert [(each.address, each.is_v6_only) for each in found] == [
            (bytes(4), False),
            (bytes(16), True),
        ]
        assert found[0].cookie == descriptors.cookie_of_listener(one.fileno())
        assert found[0].inode == os.fstat(one.fileno()).st_ino
        client = socket.create_connection(("127.0.0.1", port))
        server, peer = one.accept()
        ends = at(f"127.0.0.1:{port}"), at(f"127.0.0.1:{peer[1]}")
        nowhere = at("127.0.0.1:1"), at("127.0.0.1:2")
        assert diag.carrier(*ends) == diag.carrier(ends[1], ends[0]) == os.getuid()
        whose = diag.carriers([nowhere, ends, (ends[1], ends[0]), nowhere])
        assert whose == [None, os.getuid(), os.getuid(), None]
        assert diag.carriers([]) == []
        client.close()
        assert diag.carrier(*ends) == os.getuid(), "half closed"
        server.close()
        assert diag.carrier(*ends) is None, "nobody has what is in TIME_WAIT"
        assert diag.carriers([ends]) == [None]
    assert diag.listeners(port) == []
    assert diag.carrier(at("127.0.0.1:1"), at("127.0.0.1:2")) is None
    diag.close()


# Who hands them over


def test_a_socket_is_held_until_it_is_given_up_or_its_link_is_lost(world: World) -> None:
    for ends in ("says so", "is lost"):
        link, sock = world.connect(), listener()
        port = sock.getsockname()[1]
        hand(link, emit(Listening(port, 1)), sock.fileno())
        world.turn()
        assert world.gateways.served == {port}
        sock.close()
        with pytest.raises(OSError, match="in use"):
            listener(port)
        if ends == "says so":
            link.send(emit(NotListening(port)))
        else:
            link.close()
        world.turn()
        assert world.gateways.served == frozenset()
        until(partial(is_free, world, port))
        listener(port).close()
        link.close()
        world.turn()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_of_those_who_share_a_port_all_must_be_known(world: World, address: str) -> None:
    world.gateways.is_own = frozenset({at("127.0.0.1:1").addr}).__contains__
    link, sock = world.connect(), listener(shared=True)
    port = sock.getsockname()[1]
    hand(link, emit(Listening(port, 1)), sock.fileno())
    world.turn()
    assert world.gateways.served == {port}
    with listener(port, address, shared=True):
        world.gateways.check()
        assert world.gateways.served == frozenset()
    world.gateways.check()

    assert world.gateways.served == {port}
    link.close()
    sock.close()


@pytest.mark.parametrize("what", ["file", "udp", "connection", "elsewhere", "none", "two"])
def test_what_is_not_the_socket_is_refused_and_closed(world: World, what: str) -> None:
    link, sock, other = world.connect(), listener(), listener()
    port = sock.getsockname()[1]
    with socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket() as unbound:
        numbers = {
            "file": [os.open("/dev/null", os.O_RDONLY)],
            "udp": [udp.fileno()],
            "connection": [unbound.fileno()],
            "elsewhere": [other.fileno()],
            "none": [],
            "two": [sock.fileno(), sock.fileno()],
        }[what]
        before = open_descriptors()
        if numbers:
            hand(link, emit(Listening(port, 9)), *numbers)
        else:
            link.send(emit(Listening(port, 9)))
        world.turn()
        answer = parse_answer(link.recv(4096))
        assert isinstance(answer, Refused)
        assert answer.id == 9
        assert world.gateways.served == frozenset()
        until(lambda: open_descriptors() == before)
    link.close()
    sock.close()
    other.close()


@pytest.mark.parametrize("message", [emit(Close(at("K:1"))), b"garbage", b""])
def test_a_descriptor_that_nobody_asked_for_ends_the_connection(
    world: World, message: bytes
) -> None:
    link, before = world.connect(), open_descriptors()
    with socket.socket() as sock:
        hand(link, message, sock.fileno(), sock.fileno())
        world.turn()
    until(lambda: open_descriptors() == before - 1)
    assert world.socket.pids == frozenset()
    link.close()


@pytest.mark.serial
@pytest.mark.parametrize(
    "message", [emit(Close(at("K:1"))), emit(Listening(16000, 1)), b"nonsense", b""]
)
def test_closing_what_lingers_holds_nobody_up(world: World, message: bytes) -> None:
    """close(2) of such a socket waits, also if it doesn't block."""
    link, (number, peer) = world.connect(), lingering()
    hand(link, message, number)
    os.close(number)
    began = time.monotonic()
    world.turn()

    assert time.monotonic() - began < PROMPTLY
    link.close()
    peer.close()


@pytest.mark.serial
def test_what_lingers_in_a_connection_that_is_lost_holds_nobody_up(world: World) -> None:
    link, (number, peer) = world.connect(), lingering()
    for _ in range(3):
        link.send(b"nonsense")
    hand(link, b"unread", number)
    os.close(number)
    began = time.monotonic()
    world.turn()
    link.close()
    world.turn()

    assert time.monotonic() - began < PROMPTLY
    assert world.socket.pids == frozenset()
    peer.close()


@pytest.mark.serial
@pytest.mark.parametrize("old_kernel", [False, True])
def test_nobody_holds_up_the_control_socket_by_what_he_hands_over(
    tmp_path: Path, old_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel can be told, nothing arrives; where not, it is closed apart."""
    if old_kernel:
        monkeypatch.setattr(descriptors, "_SO_PASSRIGHTS", 9999)
    came: list[socket.socket] = []
    with Loop() as loop:
        listening = UnixListener(
            loop,
            tmp_path,
            ADMIN,
            socket.SOCK_STREAM,
            lambda connection, _: came.append(connection),
            str.encode,
            Crowd(9, 9),
        )
        client, (number, peer) = socket.socket(socket.AF_UNIX), lingering()
        client.connect(str(listening.path))
        began = time.monotonic()
        try:
            hand(client, b"help\n", number)
            hand(client, b"unread\n", number)
        except PermissionError:
            assert not old_kernel
            peer.close()  # nothing keeps this test's own from lingering
        os.close(number)
        loop.call_soon(lambda: loop.call_soon(loop.stop))
        loop.run()
        (server,) = came
        if old_kernel:
            assert descriptors.read(server, 100) == b"help\n"
        descriptors.hang_up(server)
        assert time.monotonic() - began < PROMPTLY
        listening.close()
    client.close()
    peer.close()


def test_a_socket_that_never_is_handed_anything_says_so() -> None:
    one, two = socket.socketpair()
    descriptors.refuse_descriptors(two)
    with one, two:
        try:
            hand(one, b"hello", one.fileno())
        except PermissionError:
            return
    pytest.skip("this kernel can't be told (SO_PASSRIGHTS, Linux 6.16)")
