"""Logs that nobody reads: a shipper that hangs, a terminal held by Ctrl-S, a gone reader."""

import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.net.world import GPORT, PYTHON, SERVICES, World

pytestmark = pytest.mark.net

ROOM = 4096
"""Bytes that wait in a pipe here: the least that Linux makes."""


class Pipe:
    """What a daemon writes its log to; this reads none of it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, ROOM)

    @property
    def waiting(self) -> int:
        """Bytes that nobody has read."""
        count: int = struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0]
        return count

    def read(self) -> str:
        """What waits."""
        return os.read(self.fd, 1 << 16).decode()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@pytest.fixture
def pipes(world: World, tmp_path: Path) -> Iterator[tuple[Pipe, Pipe]]:
    """krelay's log and tcp-relay's, while they relay."""
    world.serve("server", "tcp/80", "udp/7")
    with ExitStack() as stack:
        made = [Pipe(tmp_path / name) for name in ("krelay", "tcp-relay")]
        for pipe in made:
            stack.callback(pipe.close)
        daemons = []
        for pipe, module in zip(made, (("krelay", "daemon"), ("tcp_relay",)), strict=True):
            into = ("sh", "-c", 'log=$1; shift; exec "$@" 2> "$log"', "sh", str(pipe.path))
            command = (*PYTHON, "-m", *module, "--root", str(world.root))
            daemons.append(world.lab.start("relay", *into, *command))
            world.until(lambda: world.answers(world.root), "an answer")
        world.krelay_process, world.tcp_relay_process = daemons
        if world.datapath == "queue":
            world.put(datapath="queue")
        world.put(gport=GPORT, services=SERVICES, real_ip=world.server, start=1)
        world.until_state("running")
        world.until(lambda: world.values("status")["gateway_port"] == "served", "tcp-relay")
        yield made[0], made[1]


def fill(world: World, pipes: tuple[Pipe, Pipe]) -> None:
    """Gives both more to say than there is room for."""
    for _ in range(200):
        world.write("gport", "abc")
        world.until(lambda: world.read("gport") == str(GPORT), "the value put back")
        if world.values("counters")["log_lines_lost"]:
            break
    for _ in range(100):
        before = pipes[1].waiting
        world.who("client", 80)
        if before > ROOM - 200 and pipes[1].waiting == before:
            return
    raise AssertionError("there was room for all")


def test_relaying_goes_on_while_nobody_reads_the_logs(
    world: World, pipes: tuple[Pipe, Pipe]
) -> None:
    fill(world, pipes)

    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    assert world.values("status")["state"] == "running"
    assert world.values("counters")["log_lines_lost"] > 0

    for pipe in pipes:
        pipe.read()
    world.write("gport", "xyz")
    world.who("client", 80)
    for pipe, daemon in zip(pipes, ("krelay", "tcp-relay"), strict=True):
        said = world.until(lambda pipe=pipe: pipe.waiting and pipe.read(), f"a line of {daemon}'s")  # type: ignore[misc]
        assert "log lines were lost lost=" in said.splitlines()[0]


def test_relaying_goes_on_when_the_readers_of_the_logs_are_gone(
    world: World, pipes: tuple[Pipe, Pipe]
) -> None:
    for pipe in pipes:
        pipe.close()
    for text in ("abc", "xyz"):
        world.write("gport", text)
        world.until(lambda: world.read("gport") == str(GPORT), "the value put back")
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    assert world.krelay_process.poll() is None
    assert world.tcp_relay_process.poll() is None
