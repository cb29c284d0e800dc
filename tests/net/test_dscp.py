"""What terminated TCP keeps beside the bytes: the DSCP of both ends, and urgent marks."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from krelay.steps import Step
from tests.net.world import PYTHON, World

pytestmark = pytest.mark.net
both_sources = pytest.mark.parametrize("source", ["client", "relay"])
PORT = 8080
"""Of servers of the tests' own."""
SERVICES = f"tcp/{PORT}"
EF, AF21, CS1 = 46 << 2, 18 << 2, 8 << 2
ECT0 = 2


@contextmanager
def tos_of(world: World, host: str, port: int, *, sent: bool, peer: int = 0) -> Iterator[set[int]]:
    """DSCP and ECN of what is sent to this port, or from it (`sent`), as this host's wire has it.

    `peer`: the other port, if only that is meant.
    """
    seen: set[int] = set()
    with world.lab.capture(host) as frames:
        frames.settimeout(0.2)
        over = threading.Event()

        def watch() -> None:
            while True:
                try:
                    frame = frames.recv(2000)
                except TimeoutError:
                    if over.is_set():  # and all that came before was read
                        return
                    continue
                ports = [int.from_bytes(frame[at : at + 2]) for at in (34, 36)]
                mine, other = ports if sent else ports[::-1]
                if frame[23] == 6 and mine == port and peer in (0, other):
                    seen.add(frame[15])

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()


def begin(shared: World, source: str = "client") -> None:
    """Relaying to such a server."""
    shared.put(services=SERVICES, source=source)


def listening(world: World, tos: int = 0) -> socket.socket:
    sock = world.open("server")
    mark(sock, tos)
    sock.bind(("", PORT))
    sock.listen()
    return sock


def mark(sock: socket.socket, tos: int) -> None:
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)


def connected(
    world: World, server: socket.socket, tos: int = 0, port: int = PORT
) -> tuple[socket.socket, socket.socket]:
    """A client's connection and the server's."""
    client = world.open("client")
    mark(client, tos)
    client.connect((world.relay, port))
    there, _ = server.accept()
    there.settimeout(10)
    return client, world._held.enter_context(there)


def converse(client: socket.socket, server: socket.socket, times: int = 10) -> None:
    for number in range(times):
        for one, other in ((client, server), (server, client)):
            one.sendall(bytes([number]) * 100)
            assert other.recv(1000) == bytes([number]) * 100


def marks_of(
    world: World, client: socket.socket, server: socket.socket
) -> tuple[set[int], set[int]]:
    """How some packets of both ends arrive: the client's at the server, the server's there."""
    port = server.getpeername()[1]
    with (
        tos_of(world, "server", PORT, sent=False, peer=port) as there,
        tos_of(world, "client", PORT, sent=True) as here,
    ):
        converse(client, server)
    return there, here


def handed(world: World) -> bool:
    """Whether the kernel has all four steps of the one connection, if it is to have any."""
    return not world.in_kernel or world.handed() >= 4


@both_sources
def test_clients_dscp_is_that_of_the_whole_server_leg(shared: World, source: str) -> None:
    begin(shared, source)
    server = listening(shared)
    with tos_of(shared, "server", PORT, sent=False) as seen:
        client, there = connected(shared, server, EF)
        converse(client, there)
        client.shutdown(socket.SHUT_WR)
        assert there.recv(10) == b""

    assert seen == {EF}


@both_sources
@pytest.mark.parametrize("early", [True, False])
def test_servers_dscp_is_that_of_the_client_leg(shared: World, source: str, early: bool) -> None:
    begin(shared, source)
    server = listening(shared, tos=AF21 if early else 0)
    client, there = connected(shared, server)
    mark(there, AF21)

    shared.until(lambda: marks_of(shared, client, there) == ({0}, {AF21}), "the mark")
    shared.until(lambda: handed(shared), "the kernel to have it")
    assert marks_of(shared, client, there) == ({0}, {AF21})


def test_dscp_that_changes_is_followed(shared: World) -> None:
    begin(shared)
    client, there = connected(shared, listening(shared), EF)
    for tos, answer in ((AF21, CS1), (CS1, EF), (0, 0), (EF, 0)):
        converse(client, there)
        shared.until(lambda: handed(shared), "the kernel to have it")
        mark(client, tos)
        mark(there, answer)

        def are_followed(wanted: tuple[set[int], set[int]] = ({tos}, {answer})) -> bool:
            return marks_of(shared, client, there) == wanted

        shared.until(are_followed, "both marks")


@pytest.mark.one_datapath
def test_marked_flows_are_the_kernels_too() -> None:
    with World() as world:
        world.begin(services=SERVICES)
        client, there = connected(world, listening(world), EF)
        mark(there, AF21)
        world.until(lambda: marks_of(world, client, there) == ({EF}, {AF21}), "the marks")
        world.until(lambda: world.handed() >= 4, "the kernel to have it")
        converse(client, there)
        found = {e.step: (e.tos, e.packets > 0) for e in world.offloaded()}
        assert found[Step.T1] == (EF, True)
        assert found[Step.T4] == (AF21, True)


def test_dscp_may_be_left_to_each_leg(world: World) -> None:
    world.start_krelay()
    world.put(gport=18000, services=SERVICES, real_ip=world.server)
    world.start_tcp_relay("--dscp", "none")
    world.put(start=1)
    world.until_state("running")
    server = listening(world)
    with (
        tos_of(world, "server", PORT, sent=False) as seen,
        tos_of(world, "client", PORT, sent=True) as answers,
    ):
        client, there = connected(world, server, EF)
        mark(there, AF21)
        for _ in range(5):
            converse(client, there)
        world.until(lambda: handed(world), "the kernel to have it")
        converse(client, there)

    assert (seen, answers) == ({0}, {0})


def test_dscp_outlives_a_killed_krelay(world: World) -> None:
    world.begin(services=SERVICES)
    client, there = connected(world, listening(world), EF)
    mark(there, AF21)
    world.until(lambda: marks_of(world, client, there) == ({EF}, {AF21}), "the marks")
    world.kill(world.krelay_process)
    world.start_krelay()
    world.until_state("running")
    world.until(lambda: world.flows("proto=tcp"), "it to be resumed")

    world.until(lambda: marks_of(world, client, there) == ({EF}, {AF21}), "the marks")
    world.until(lambda: handed(world), "the kernel to have it")
    assert marks_of(world, client, there) == ({EF}, {AF21})


def test_each_connection_has_its_own_dscp(shared: World) -> None:
    begin(shared)
    server = listening(shared)
    marks = [EF, 0, AF21, CS1] * 3
    pairs = [connected(shared, server, tos) for tos in marks]
    for (client, there), tos in zip(pairs, marks, strict=True):
        port = there.getpeername()[1]
        with tos_of(shared, "server", PORT, sent=False, peer=port) as seen:
            converse(client, there, 3)
        assert seen == {tos}


@contextmanager
def ecn_asked_for(world: World, host: str) -> Iterator[None]:
    """By connections that this host begins meanwhile."""
    name = "net.ipv4.tcp_ecn"
    before = world.run(host, "sysctl", "-n", name).strip()
    world.run(host, "sysctl", "-qw", f"{name}=1")
    try:
        yield
    finally:
        world.run(host, "sysctl", "-qw", f"{name}={before}")


def test_ecn_belongs_to_each_leg(shared: World) -> None:
    begin(shared)
    with ecn_asked_for(shared, "client"), ecn_asked_for(shared, "relay"):
        client, there = connected(shared, listening(shared), EF)
    with (
        tos_of(shared, "client", PORT, sent=False) as seen,
        tos_of(shared, "server", PORT, sent=False) as behind,
    ):
        for _ in range(5):
            converse(client, there)

    assert seen <= {EF, EF | ECT0}
    assert EF | ECT0 in behind  # its own leg's, by the server's tcp_ecn
    assert behind <= {EF, EF | ECT0}


# Urgent marks


def urgent(world: World, sock: socket.socket) -> bytes:
    """The urgent byte, once it is there."""

    def come() -> bytes:
        sock.setblocking(False)  # with a timeout Python would wait for bytes in the stream
        try:
            return sock.recv(1, socket.MSG_OOB)
        except OSError:
            return b""
        finally:
            sock.settimeout(10)

    return world.until(come, "the urgent byte")


@both_sources
@pytest.mark.parametrize("who", ["client", "server"])
def test_urgent_byte_is_out_of_band_for_who_keeps_it_so(
    shared: World, source: str, who: str
) -> None:
    begin(shared, source)
    pair = connected(shared, listening(shared))
    sender, receiver = pair if who == "client" else pair[::-1]
    for number in range(5):
        sender.sendall(b"ab")
        sender.send(bytes([number]), socket.MSG_OOB)
        got = b""
        while len(got) < 2:
            got += receiver.recv(10)
        assert got == b"ab"

        assert urgent(shared, receiver) == bytes([number])
        sender.sendall(b"cd")
        assert receiver.recv(10) == b"cd"


def test_urgent_byte_in_the_stream_is_where_it_was(shared: World) -> None:
    begin(shared)
    client, there = connected(shared, listening(shared))
    there.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sent = b""
    for number in range(30):
        data = bytes([number]) * (number * 3000)
        client.sendall(data)
        client.send(b"!", socket.MSG_OOB)
        sent += data + b"!"
    client.shutdown(socket.SHUT_WR)
    got = b""
    while data := there.recv(1 << 16):
        got += data
    assert got == sent


@pytest.mark.one_datapath
def test_plain_proxy_carries_urgent_marks(world: World) -> None:
    server = listening(world)
    command = (*PYTHON, "-m", "tcp_relay.tcpproxy", world.server, str(PORT), "80")
    world.lab.start("relay", *command)
    world.lab.wait_listening("relay", "tcp", 80, world.patience)
    client, there = connected(world, server, port=80)
    client.send(b"x!", socket.MSG_OOB)
    assert there.recv(10) == b"x"

    assert urgent(world, there) == b"!"
