"""Servers that answer from another port than they were asked at, as TFTP's do (RFC 1350)."""

import socket

import pytest

from tests.net.world import World, control_socket

pytestmark = pytest.mark.net
both_sources = pytest.mark.parametrize("source", ["client", "relay"])


def asked(
    world: World, sock: socket.socket, server: socket.socket, port: int = 69
) -> tuple[str, int]:
    """The client's query has arrived; as whom the server knows the client."""
    sock.sendto(b"read", (world.relay, port))
    query, (host, number) = server.recvfrom(100)
    assert query == b"read"
    return host, number


def listening(world: World, port: int = 69, host: str = "server") -> socket.socket:
    sock = world.open(host, socket.SOCK_DGRAM)
    sock.bind(("", port))
    return sock


def converses(
    world: World, sock: socket.socket, other: socket.socket, client: tuple[str, int]
) -> None:
    """The server's other port and the client hear each other, the client at the relay's address."""
    port = other.getsockname()[1]
    for number in range(8):  # more than what a flow has before the kernel is handed it
        data = bytes((number,)) * 600
        other.sendto(data, client)
        assert sock.recvfrom(1000) == (data, (world.relay, port))
        sock.sendto(b"ack" + data, (world.relay, port))
        assert other.recvfrom(1000) == (b"ack" + data, client)


@both_sources
def test_tftp_file_arrives(shared: World, source: str) -> None:
    files = shared.lab.directory / "tftp"
    files.mkdir(mode=0o755, exist_ok=True)
    (files / "boot").write_bytes(bytes(range(256)) * 300)
    shared.lab.start(
        "server", "dnsmasq", "-k", "-C", "/dev/null", "--port=0", "-u", "root", "--enable-tftp",
        f"--tftp-root={files}", f"--pid-file={files}.pid",
    )  # fmt: skip
    shared.lab.wait_listening("server", "udp", 69, shared.patience)
    shared.put(services="udp/69+any-port", source=source)
    got = files / "got"
    for _ in range(2):
        url = f"tftp://{shared.relay}/boot"
        shared.lab.run("client", "curl", "-sS", "-m", "10", "-o", str(got), url)
        assert got.read_bytes() == (files / "boot").read_bytes()
        got.unlink()


@both_sources
def test_answer_from_another_port_begins_a_flow_of_its_own(shared: World, source: str) -> None:
    shared.put(services="udp/69+any-port", source=source)
    server, other = listening(shared), listening(shared, 4321)
    sock = shared.open("client", socket.SOCK_DGRAM)
    client = asked(shared, sock, server)

    converses(shared, sock, other, client)

    mine = f"{shared.client}:{sock.getsockname()[1]}"
    flows = {flow["service"]: flow for flow in shared.flows("proto=udp")}
    assert set(flows) == {f"{shared.relay}:69", f"{shared.relay}:4321"}
    assert {flow["client"] for flow in flows.values()} == {mine}
    assert flows[f"{shared.relay}:4321"]["server"] == f"{shared.server}:4321"
    assert flows[f"{shared.relay}:4321"]["packets"] == [8, 8]
    assert flows[f"{shared.relay}:69"]["state"] == "unreplied"
    assert client[0] == (shared.client if source == "client" else shared.relay)


@both_sources
def test_clients_with_one_port_are_told_apart(shared: World, source: str) -> None:
    shared.put(services="udp/69+any-port udp/70+any-port", source=source)
    server, server70 = listening(shared), listening(shared, 70)
    first, second = (
        shared.open("client", socket.SOCK_DGRAM),
        shared.open("client2", socket.SOCK_DGRAM),
    )
    for sock in (first, second):
        sock.bind(("", 5000))
    clients = [asked(shared, sock, server) for sock in (first, second)]
    others = [listening(shared, port) for port in (4321, 4322)]
    assert clients[0] != clients[1]

    for sock, other, client in zip((first, second), others, clients, strict=True):
        converses(shared, sock, other, client)
    again = asked(shared, second, server70, 70)  # the other service, from the same port
    converses(shared, second, listening(shared, 4323), again)
    converses(shared, first, others[0], clients[0])


@both_sources
def test_client_of_two_of_the_relays_addresses_is_answered_by_the_right_one(
    shared: World, source: str
) -> None:
    shared.put(services="udp/69+any-port", source=source)
    server = listening(shared)
    sock = shared.open("client", socket.SOCK_DGRAM)
    addresses = shared.relay, shared.lab.address("relay", towards="client")
    assert len(set(addresses)) == 2
    seen = []
    for address in addresses:
        sock.sendto(b"read", (address, 69))
        seen.append(server.recvfrom(100)[1])
    assert seen[0] != seen[1]

    for number, (address, client) in enumerate(zip(addresses, seen, strict=True)):
        other = listening(shared, 4321 + number)
        for _ in range(3):
            other.sendto(b"data", client)
            assert sock.recvfrom(100) == (b"data", (address, 4321 + number))
            sock.sendto(b"ack", (address, 4321 + number))
            assert other.recvfrom(100) == (b"ack", client)


@both_sources
def test_nobody_elses_port_is_answered(shared: World, source: str) -> None:
    shared.put(services="udp/69+any-port udp/7", source=source)
    server, other = listening(shared), listening(shared, 4321)
    sock, bystander = (
        shared.open("client", socket.SOCK_DGRAM),
        shared.open("client", socket.SOCK_DGRAM),
    )
    bystander.bind(("", 0))
    asked(shared, sock, server)

    other.sendto(b"own", (shared.client, bystander.getsockname()[1]))  # the server's own business
    assert bystander.recvfrom(100) == (b"own", (shared.server, 4321))
    bystander.sendto(b"guess", (shared.relay, 4321))  # this client has asked nothing
    other.settimeout(0.5)
    with pytest.raises(TimeoutError):
        other.recv(100)
    (flow,) = shared.flows("proto=udp")
    assert flow["service"] == f"{shared.relay}:69"


def test_client_beside_the_server_is_answered(shared: World) -> None:
    shared.put(services="udp/69+any-port")
    server, other = listening(shared), listening(shared, 4321)
    sock = shared.open("neighbour", socket.SOCK_DGRAM)
    client = asked(shared, sock, server)
    assert client[0] == shared.relay

    converses(shared, sock, other, client)


@both_sources
def test_changed_settings_leave_an_exchange_alone(shared: World, source: str) -> None:
    shared.put(services="udp/69+any-port udp/53", source=source)
    server, other = listening(shared), listening(shared, 4321)
    sock = shared.open("client", socket.SOCK_DGRAM)
    client = asked(shared, sock, server)
    converses(shared, sock, other, client)

    shared.put(limits__flows=5000, timeouts__udp_dns=7)  # the kernel's maps are made anew
    converses(shared, sock, other, client)
    shared.put(services="udp/53")
    converses(shared, sock, other, client)
    shared.put(services="udp/69 udp/53")
    converses(shared, sock, other, client)


def test_silent_client_is_forgotten(shared: World) -> None:
    shared.put(services="udp/69+any-port")
    shared.put(timeouts__udp=1)
    server, other = listening(shared), listening(shared, 4321)
    sock = shared.open("client", socket.SOCK_DGRAM)
    client = asked(shared, sock, server)
    shared.until(lambda: not shared.flows(), "the flow to expire")

    def goes_on_untouched() -> bool:
        other.sendto(b"late", client)
        return sock.recvfrom(100) == (b"late", (shared.server, 4321))

    shared.until(goes_on_untouched, "the kernel to forget, too")


@both_sources
def test_without_the_kind_answers_are_counted_and_told(world: World, source: str) -> None:
    world.begin(services="udp/69 udp/7", source=source)
    server, other = listening(world), listening(world, 4321)
    sock = world.open("client", socket.SOCK_DGRAM)
    with control_socket(world.root) as trace, trace.makefile() as lines:
        trace.sendall(b"trace verdict=pass\n")
        world.until(lambda: world.values("status")["traces"] == 1, "the trace")
        client = asked(world, sock, server)

        other.sendto(bytes(100), client)

        world.until(lambda: world.values("counters").get("passed_other_port") == 1, "a count")
        assert world.values("status")["other_port"] == {"udp/69": 1}
        line = f"pass other_port {world.server}:4321 > {client[0]}:{client[1]} 100 bytes"
        assert any(line in told for told in lines)
    world.until(lambda: "answers from another port" in world.krelay_process.output, "a warning")
    assert f"service=udp/69 server={world.server}:4321" in world.krelay_process.output
    done = world.krelay("doctor", check=False)
    assert "udp/69: the server answers from other ports" in done.stdout
    assert "'udp/69+any-port udp/7'" in done.stdout
