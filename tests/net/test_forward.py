"""TCP that is forwarded, `tcp/443=forward`, by real programs: no daemon has a part in it."""

import hashlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from knet.wire import tcp
from tests.net.conftest import SharedWorlds, prepared_world
from tests.net.routed import MTU, routed, send
from tests.net.test_icmp import IP_MTU
from tests.net.world import World, control_socket, echo, greet, upload

pytestmark = pytest.mark.net

PORT = 443
SERVICES = "tcp/80 tcp/443=forward tcp/8000-8003=forward udp/7"
BIG = 20_000_000


@pytest.fixture(scope="module")
def shared_worlds(datapath: str) -> Iterator[SharedWorlds]:
    """Relaying both kinds of TCP."""
    with SharedWorlds(
        lambda: prepared_world(datapath, lambda world: world.put(services=SERVICES))
    ) as worlds:
        yield worlds


@contextmanager
def undisturbed(world: World) -> Iterator[World]:
    """With a terminated connection beside that nothing may disturb."""
    with world.connect("client", 80) as beside:
        greet(beside)
        yield world
        if world.read("status/state") == "running":
            echo(beside, b"undisturbed")
    assert world.values("counters")["errors"] == 0


@pytest.fixture
def through(shared: World) -> Iterator[World]:
    """The shared world, which relays both kinds of TCP."""
    with undisturbed(shared):
        yield shared


@pytest.fixture
def of_its_own(world: World) -> Iterator[World]:
    """The same in a new one, for tests that kill."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7")
    world.begin(services=SERVICES)
    with undisturbed(world):
        yield world


def forwarded(world: World, filters: str = "") -> list[dict[str, object]]:
    return world.flows(f"service=tcp/{PORT} {filters}".strip())


def is_reset(sock: socket.socket) -> bool:
    """Whether the connection has been reset by its other end; waits until something has come."""
    try:
        return bool(sock.recv(1)) and False
    except ConnectionResetError:
        return True


def established(world: World, host: str = "server") -> str:
    """The connections of a host at the forwarded port, as `ss` lists them."""
    return world.run(host, "ss", "-Htn", "state", "established", f"( sport = :{PORT} )")


def test_the_server_sees_the_client_and_the_flow_says_so(through: World) -> None:
    with through.connect("client", PORT) as sock:
        mine = f"{through.client}:{sock.getsockname()[1]}"
        assert greet(sock) == mine
        assert mine in established(through)
        [flow] = forwarded(through)
        assert (flow["client"], flow["server"]) == (mine, f"{through.server}:{PORT}")
        assert (flow["source"], flow["state"]) == ("client", "established")
        assert "gport" not in flow
        assert "relay" not in flow
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    [flow] = through.until(lambda: forwarded(through, "state=closing"), "both FINs")
    assert flow["expires"] <= 240  # type: ignore[operator]
    through.soon(lambda: through.counted()["U1"] > 3, "its packets counted")


def test_with_source_relay_the_server_sees_a_relay_port(shared: World) -> None:
    world = shared
    world.put(source="relay")
    with world.connect("client", PORT) as sock, world.connect("client2", PORT) as other:
        address = world.lab.address("relay", towards="server")
        seen = greet(sock)
        assert seen.startswith(f"{address}:")
        assert greet(other).startswith(f"{address}:")
        [flow] = [r for r in forwarded(world) if r["relay"] == seen]
        assert (flow["source"], flow["client"]) == (
            "relay",
            f"{world.client}:{sock.getsockname()[1]}",
        )
        world.ask(f"kill {flow['id']}")
        assert is_reset(sock)
        world.until(lambda: seen not in established(world), "the server's end reset")
        echo(other, b"undisturbed")
    upload(world.connect("client", PORT), 3, BIG)
    world.download("client", PORT, 4, BIG).finish()


def test_curl_keeps_a_connection_and_moves_files_both_ways(world: World) -> None:
    nginx = world.nginx("server", PORT, 80)
    world.begin(services=SERVICES)
    base = f"http://{world.relay}:{PORT}"
    told = world.run(
        "client", "curl", "-s", "-w", "%{num_connects}\n", f"{base}/a", f"{base}/b", f"{base}/c"
    )
    assert told.split() == ["/a", "1", "/b", "0", "/c", "0"]
    [flow] = forwarded(world)
    assert flow["client"].split(":")[0] == world.client  # type: ignore[attr-defined]
    assert nginx.read_text().startswith(f"{world.client} {PORT} /a")

    file, back = world.lab.directory / "file", world.lab.directory / "back"
    file.write_bytes(bytes(range(251)) * (BIG // 251))
    where = f"{base}/files/up"
    world.run("client", "curl", "-sS", "-T", str(file), where)
    world.run("client", "curl", "-sS", "-o", str(back), where)
    sums = {hashlib.sha256(one.read_bytes()).hexdigest() for one in (file, back)}
    sums.add(hashlib.sha256((nginx.parent / "www/files/up").read_bytes()).hexdigest())
    assert len(sums) == 1


def test_bulk_arrives_right_both_ways_at_once(through: World) -> None:
    download = through.download("client", PORT, 1, BIG)
    upload(through.connect("client2", PORT), 2, BIG)
    download.finish()


def test_half_closed_the_other_direction_goes_on(through: World) -> None:
    with through.connect("client", PORT) as sock:
        sock.sendall(b"download 9 3000000 2000000\n")
        sock.shutdown(socket.SHUT_WR)
        assert sum(iter(lambda: len(sock.recv(1 << 16)), 0)) == 3_000_000


def test_a_rst_passes_in_both_directions(through: World) -> None:
    with through.connect("client", PORT) as sock:
        mine = greet(sock)
        assert mine in established(through)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    through.until(lambda: mine not in established(through), "the server's end reset")
    through.soon(
        lambda: [flow["state"] for flow in forwarded(through)] == ["closing"], "the RST seen"
    )
    with through.connect("client", PORT) as sock:
        mine = greet(sock)
        through.run("server", "ss", "-K", "dst", through.client, "dport", mine.partition(":")[2])
        assert is_reset(sock)


def test_a_port_that_nobody_serves_is_refused_by_the_server(through: World) -> None:
    with through.open("client") as sock, pytest.raises(ConnectionRefusedError):
        sock.connect((through.relay, 8001))


def test_the_same_client_port_opens_again_and_again(through: World) -> None:
    """The server's end is in TIME_WAIT, or the client's, as it happens."""
    for turn in range(6):
        sock = through.open("client")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", 40123))
        sock.connect((through.relay, PORT))
        assert greet(sock) == f"{through.client}:40123"
        if turn % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:  # the server ends first, so that it is in TIME_WAIT
            sock.close()
            sock = through.open("client")
        sock.close()
        through.until(lambda: not forwarded(through, "state=established"), "its end")
        if not turn % 2:
            time_wait = through.run("client", "ss", "-Htn", "state", "time-wait")
            if "40123" in time_wait:
                through.run("client", "ss", "-K", "sport", "40123")


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_connection_is_reset_at_both_ends_at_once(through: World, busy: bool) -> None:
    with through.connect("client", PORT) as sock, through.connect("client", PORT) as other:
        mine = greet(sock)
        greet(other)
        if busy:
            echo(sock, b"x" * 100_000)
        [flow] = [r for r in forwarded(through) if r["client"] == mine]
        through.ask(f"kill {flow['id']}")
        assert is_reset(sock)
        through.until(lambda: mine not in established(through), "the server's end reset")
        echo(other, b"undisturbed")
        [flow] = [r for r in forwarded(through) if r["client"] == mine]
        assert flow["state"] == "closed"
    assert through.counted()["dropped_killed"] >= 2


def test_a_download_in_full_run_is_killed(through: World) -> None:
    download = through.download("client", PORT, 5, 500_000_000)
    through.until(lambda: download.received > 1_000_000, "a download under way")
    [flow] = forwarded(through)
    through.ask(f"kill {flow['id']}")
    assert isinstance(download.join(), ConnectionResetError)
    through.until(lambda: not established(through), "the server's end reset")


@pytest.mark.parametrize(
    ("refusal", "heard"), [("reset", ConnectionRefusedError), ("drop", TimeoutError)]
)
def test_beyond_the_limit_it_is_refused_as_it_is_set(
    through: World, refusal: str, heard: type[OSError]
) -> None:
    through.put(limits__refusal=refusal, limits__flows=len(through.flows()) + 1)
    with through.connect("client", PORT) as sock:
        greet(sock)
        with through.open("client2") as refused:
            if heard is TimeoutError:
                refused.settimeout(0.7)
            with pytest.raises(heard):
                refused.connect((through.relay, PORT))
        echo(sock, b"undisturbed")
    assert through.counted()["dropped_table_full"] >= 1


def test_a_trace_has_each_packet_by_its_steps(through: World) -> None:
    with control_socket(through.root) as trace, trace.makefile("r") as lines:
        trace.sendall(f"trace service=tcp/{PORT}\n".encode())
        with through.connect("client", PORT) as sock:
            greet(sock)
            assert next(lines)  # from now on all is traced
        with through.connect("client", PORT) as sock:
            mine = greet(sock)
        seen: list[str] = []
        while len(seen) < 2:
            seen += [line for line in [next(lines)] if mine in line]
    assert f"{mine} > {through.relay}:{PORT} [S] => > {through.server}:{PORT} flow" in seen[0]
    assert seen[0].startswith("U1,U2 ")
    assert f"{through.server}:{PORT} > {mine} [S.] => {through.relay}:{PORT} >" in seen[1]
    assert seen[1].startswith("U3,U4 ")


def test_the_narrow_link_behind_the_relay_is_found(datapath: str) -> None:
    with routed(datapath) as world:
        world.serve("server", "tcp/443", "tcp/80")
        world.begin(services="tcp/443=forward")
        with world.connect("client", PORT) as sock:
            sock.sendall(b"upload\n")
            sock.sendall(b"x" * 1_000_000)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(100).startswith(b"1000000 ")
            assert sock.getsockopt(socket.IPPROTO_IP, IP_MTU) == MTU
        world.download("client", PORT, 6, 2_000_000).finish()
        assert world.values("counters")["icmp_U3"] >= 1


def test_running_flows_stay_when_real_ip_changes_and_end_with_flush(shared: World) -> None:
    world = shared
    there = world.lab.address("server2")
    with world.connect("client", PORT) as sock, world.connect("client", PORT) as other:
        greet(sock)
        world.put(real_ip=there)
        echo(sock, b"as before")
        greet(other)
        with world.connect("client", PORT) as new:
            greet(new)
            servers = {flow["server"] for flow in forwarded(world)}
            assert servers == {f"{world.server}:{PORT}", f"{there}:{PORT}"}
            world.krelay("set", "real_ip", there, "--flush")
            assert is_reset(sock)
            assert is_reset(other)
            echo(new, b"undisturbed")
    world.until(lambda: not established(world), "the old server's ends reset")


def test_an_end_that_has_just_sent_an_ack_of_the_kind_is_reset_all_the_same(shared: World) -> None:
    """Linux sends one challenge ACK of a connection in half a second, so the first probe of a
    killed flow is not answered here (net.ipv4.tcp_invalid_ratelimit)."""
    world = shared
    with world.connect("client", PORT) as sock:
        greet(sock)
        [flow] = forwarded(world)
        relay, client = (socket.inet_aton(end) for end in (world.relay, world.client))
        send(world, "relay", tcp.build(relay, client, PORT, sock.getsockname()[1], tcp.SYN))
        world.ask(f"kill {flow['id']}")
        assert is_reset(sock)
    world.until(lambda: not established(world), "the server's end reset")


def test_stopping_ends_what_runs_and_leaves_the_host_as_before(world: World) -> None:
    before = world.rules()
    world.serve("server", "tcp/443", "tcp/80")
    world.begin(services=SERVICES)
    with world.connect("client", PORT) as sock:
        greet(sock)
        world.put(start=0)
        world.until_state("stopped")
        assert is_reset(sock)
        world.until(lambda: not established(world), "the server's end reset")
    assert not world.flows()
    assert world.rules() == before
    with world.open("client") as again, pytest.raises(ConnectionRefusedError):
        again.connect((world.relay, PORT))


@pytest.mark.parametrize("who", ["client", "server"])
def test_connections_survive_a_killed_krelay_whoever_speaks_first(
    of_its_own: World, who: str
) -> None:
    """An upload's packets are picked up; a download's have the client asked."""
    through = of_its_own
    if who == "client":
        sock = through.connect("client", PORT)
        greet(sock)
    else:
        download = through.download("client", PORT, 7, 3_000_000, rate=1_000_000)
        through.until(lambda: download.received > 500_000, "a download under way")
    through.kill(through.krelay_process)
    through.start_krelay()
    through.until_state("running")
    if who == "client":
        echo(sock, b"still there" * 1000)
    else:
        download.finish()
    [flow] = forwarded(through)
    assert flow["client"].startswith(through.client)  # type: ignore[attr-defined]


def test_no_gateway_port_is_needed_where_all_tcp_is_forwarded(world: World) -> None:
    world.serve("server", "tcp/443")
    world.serve("relay", "tcp/18000")
    world.start_krelay()
    world.put(gport=18001, services="tcp/443=forward udp/7", real_ip=world.server)
    world.put(start=1)
    world.until_state("running")
    assert world.who("client", PORT).startswith(world.client)
    told = world.krelay("doctor", check=False).stdout
    unused = "gateway port  not used: no service needs tcp-relay"
    assert f"ok       {unused}" in told
    assert "tcp-relay" not in told.replace(unused, "")
    world.put(gport=18002)
    assert world.who("client", 18000).startswith(world.client)
