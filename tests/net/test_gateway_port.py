"""Whoever takes the gateway port gets no client: by any name, at any address, at any time."""

import signal
import sys
from collections.abc import Iterator

import pytest

from krelay_vm import Program
from tests.net.world import GPORT, PYTHON, SERVICES, World, greet

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
SQUAT = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
while True:
    s = socket.socket(family)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if "shared" in sys.argv:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        s.bind((sys.argv[1], int(sys.argv[2])))
        s.listen()
        break
    except OSError:
        s.close()
        time.sleep(0.0005)
print("took it", flush=True)
while True:
    c, peer = s.accept()
    print("got", *peer, flush=True)
    c.close()
"""


@pytest.fixture
def world(datapath: str) -> Iterator[World]:
    with World(datapath=datapath) as world:
        world.serve("server", "tcp/80", "udp/7")
        yield world


def squat(world: World, address: str = "0.0.0.0", port: int = GPORT, *more: str) -> Program:
    """A local user who takes that port as soon as it can be had."""
    command = (*NOBODY, *PYTHON, "-I", "-S", "-c", SQUAT, address, str(port), *more)
    return world.lab.start("relay", *command)


def took(world: World, program: Program) -> None:
    world.until(lambda: "took it" in program.output, "the port taken")


def refused(world: World) -> bool:
    """Whether a client of TCP is; it must not be served."""
    with pytest.raises(OSError, match=r"refused|reset|timed out"):
        greet(world.connect("client", 80))
    return True


def gateway(world: World) -> str:
    return str(world.values("status")["gateway_port"])


def end(world: World, *programs: Program) -> None:
    for program in programs:
        program.kill()
        program.wait()


def begin_with_two_workers(world: World) -> None:
    world.start_krelay()
    world.put(gport=GPORT, services=SERVICES, real_ip=world.server)
    world.start_tcp_relay("--workers", "2")
    world.put(start=1)
    world.until_state("running")
    world.until(lambda: world.values("status")["tcp_relays"] == 2, "both")
    world.until(lambda: gateway(world) == "served", "served")
    assert works(world)


def works(world: World) -> bool:
    return world.who("client", 80).startswith(f"{world.client}:")


@pytest.mark.parametrize("address", ["0.0.0.0", "relay's", "::"])
def test_who_takes_the_port_while_tcp_relay_is_away_gets_no_client(
    world: World, address: str
) -> None:
    world.begin()
    assert works(world)
    squatter = squat(world, world.relay if address == "relay's" else address)
    end(world, world.tcp_relay_process)
    took(world, squatter)
    assert refused(world)
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    world.until(lambda: f"port {GPORT} is in use by" in gateway(world), "a reason")
    assert world.read("status/state") == "running"

    end(world, squatter)
    world.start_tcp_relay()
    assert works(world)
    assert "got" not in squatter.output


def test_no_client_meets_another_while_tcp_relay_is_killed_again_and_again(world: World) -> None:
    """Clients that are in the middle of their handshake among them."""
    world.begin()
    squatters = []
    for _ in range(4):
        squatter = squat(world)
        clients = [world.open("client") for _ in range(40)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex((world.relay, 80))
        end(world, world.tcp_relay_process)
        took(world, squatter)
        for client in clients[::4]:
            client.close()
        assert refused(world)
        end(world, squatter)
        squatters.append(squatter)
        for client in clients:
            client.close()
        world.start_tcp_relay()
        assert works(world)

    assert not any("got" in squatter.output for squatter in squatters)


def test_a_program_named_tcp_relay_is_none(world: World) -> None:
    world.start_krelay()
    world.put(gport=GPORT, services="tcp/80 udp/7", real_ip=world.server)
    path = world.lab.directory / "tcp-relay"
    path.write_text(SQUAT)
    squatter = world.lab.start(
        "relay", *NOBODY, sys.executable, str(path), "0.0.0.0", str(GPORT), "--root", "x"
    )
    took(world, squatter)
    world.write("start", "1")
    world.until(lambda: world.read("status/state") == "running", "begun")
    assert refused(world)
    world.until(lambda: world.read("status/state").startswith("failed: port"), "failed")
    assert refused(world)

    end(world, squatter)
    world.until(lambda: world.read("status/state") == "running", "begun by itself")
    world.start_tcp_relay()
    assert works(world)
    assert "got" not in squatter.output


def test_who_takes_the_new_port_before_tcp_relay_leaves_clients_with_the_old(
    world: World,
) -> None:
    world.begin()
    new = GPORT + 1
    world.tcp_relay_process.signal(signal.SIGSTOP)
    world.write("gport", str(new))
    world.until(lambda: f"gport={new}" in world.read("status/applied"), "in force")
    squatter = squat(world, port=new)
    took(world, squatter)
    world.tcp_relay_process.signal(signal.SIGCONT)
    assert works(world)
    world.until(lambda: f"can't listen gport={new}" in world.tcp_relay_process.output, "told")
    assert works(world)

    end(world, squatter)
    world.until(lambda: f"listening gport={new}" in world.tcp_relay_process.output, "its turn")
    assert works(world)
    world.until(lambda: world.flows()[-1]["gport"] == new, "the new port in use")
    assert "got" not in squatter.output


def test_while_krelay_is_killed_and_back_the_port_stays_tcp_relays(world: World) -> None:
    world.begin()
    squatters = [squat(world, address) for address in ("0.0.0.0", world.relay, "::")]
    with world.connect("client", 80) as client:
        greet(client)
        for _ in range(3):
            world.kill(world.krelay_process)
            world.start_krelay()
            world.until(lambda: gateway(world) == "served", "served again")
            assert works(world)
            client.sendall(b"still here")
            assert client.recv(100) == b"still here"

    assert all(squatter.output == "" for squatter in squatters)


def test_one_of_the_same_user_who_shares_the_port_has_clients_refused(world: World) -> None:
    """tcp-relay's workers share a port; a socket for one address alone would come before theirs."""
    begin_with_two_workers(world)
    for address in ("0.0.0.0", world.relay):
        squatter = world.lab.start(
            "relay", sys.executable, "-c", SQUAT, address, str(GPORT), "shared"
        )
        took(world, squatter)
        world.until(lambda: f"port {GPORT} is in use by python" in gateway(world), "noticed")
        before = squatter.output.count("got")
        assert refused(world)
        assert squatter.output.count("got") == before
        end(world, squatter)
        world.until(lambda: gateway(world) == "served", "served again")
        assert works(world)


def test_a_worker_that_dies_leaves_clients_to_the_others(world: World) -> None:
    begin_with_two_workers(world)
    pid = int(world.tcp_relay_process.output.split("worker started worker=0 pid=")[1].split()[0])
    world.lab.run("relay", "kill", "-KILL", str(pid))
    world.until(lambda: "worker ended" in world.tcp_relay_process.output, "its death")
    for _ in range(20):
        assert works(world)
