"""The server's cable is pulled, and put in again: who is told, and when."""

import re
import time
from collections.abc import Iterator

import pytest

from krelay_vm import Program
from tests.net.world import Download, World, echo, greet

pytestmark = [pytest.mark.net, pytest.mark.slow]

MB = 1 << 20
STALL = 4.0
"""Seconds: the least for which the kernel's probes can tell within the limit."""
SLACK = 2.5


@pytest.fixture
def relay(datapath: str) -> Iterator[World]:
    """Relaying with a short stall limit."""
    with World(datapath=datapath) as world:
        world.serve("server", "tcp/80")
        world.start_krelay()
        world.put(services="tcp/80", real_ip=world.server)
        world.start_tcp_relay("--stall", f"{STALL:g}")
        world.put(start=1)
        world.until_state("running")
        yield world


def told_within(world: World, download: Download) -> OSError | None:
    """The error that ends a download, after the cable was pulled a moment ago."""
    began = time.monotonic()
    error = download.join(STALL + SLACK)
    assert time.monotonic() - began > STALL / 4  # not because of the cable itself
    world.until(lambda: not open_flows(world), "the rows to end")
    return error


def open_flows(world: World) -> list[str]:
    """The states of flows that have not ended."""
    states = [str(flow["state"]) for flow in world.flows("proto=tcp")]
    return [state for state in states if state != "closed"]


def reason(program: Program) -> str:
    """Why the last connection has ended, as the log says."""
    return str(re.findall(r"connection ended .*", program.output)[-1])


def test_a_download_is_reset_within_the_stall_limit(relay: World) -> None:
    download = relay.download("client", 80, 1, 64 * MB, rate=MB)
    relay.until(lambda: download.received > MB, "the first bytes")
    relay.lab.link_down("server")
    assert isinstance(told_within(relay, download), ConnectionResetError)
    relay.until(lambda: "connection ended" in relay.tcp_relay_process.output, "a line of the log")
    assert "the server has acknowledged nothing for 4 s" in reason(relay.tcp_relay_process)


def test_a_request_in_flight_is_reset_within_the_stall_limit(relay: World) -> None:
    sock = relay.connect("client", 80)
    greet(sock)
    relay.lab.link_down("server")
    began = time.monotonic()
    sock.sendall(b"nobody will hear this")
    sock.settimeout(STALL * 1.25 + SLACK)
    with pytest.raises(ConnectionResetError):
        sock.recv(100)
    assert time.monotonic() - began > STALL / 2
    relay.until(lambda: "connection ended" in relay.tcp_relay_process.output, "a line of the log")
    assert "the server has acknowledged nothing for 4 s" in reason(relay.tcp_relay_process)


def test_an_upload_is_reset_within_the_stall_limit(relay: World) -> None:
    sock = relay.connect("client", 80)
    sock.sendall(b"upload\n")
    sock.settimeout(STALL + SLACK)
    sock.sendall(bytes(MB))
    relay.lab.link_down("server")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        sock.sendall(bytes(256 * MB))
    relay.until(lambda: not open_flows(relay), "the rows to end")
    assert "reason=stalled" in reason(relay.tcp_relay_process)


def keepalive(world: World) -> str:
    """The timer of the server leg, as ss(8) shows it: `keepalive,3.1sec,0`."""
    shown = world.run("relay", "ss", "-tnoH", "dst", world.server)
    return shown.partition("timer:(")[2].partition(")")[0]


def test_who_rests_is_left_alone_and_only_who_moves_is_probed(relay: World) -> None:
    sock = relay.connect("client", 80)
    greet(sock)
    relay.until(lambda: re.match(r"keepalive,[\d.]+(sec|ms),", keepalive(relay)), "the watch")
    relay.until(lambda: "min" in keepalive(relay), "rest", STALL * 3)
    assert int(re.findall(r"keepalive,(\d+)min", keepalive(relay))[0]) > 100
    relay.lab.link_down("server")
    sock.settimeout(STALL * 2)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    relay.lab.link_up("server")
    sock.settimeout(10)
    echo(sock, b"still there")
    relay.until(lambda: "min" not in keepalive(relay), "the watch again")


def test_a_server_that_is_back_in_time_is_not_lost(relay: World) -> None:
    download = relay.download("client", 80, 1, 8 * MB, rate=MB)
    relay.until(lambda: download.received > MB, "the first bytes")
    relay.lab.link_down("server")
    relay.until(lambda: keepalive(relay).endswith(",1"), "a probe without an answer", STALL)
    before = download.received
    relay.lab.link_up("server")
    download.finish()
    assert download.received > before
