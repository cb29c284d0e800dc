"""tcpproxy's command line, and that it listens where it was asked to."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcp_relay.tcpproxy import main
from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    Server,
    TcpProxy,
    echo,
    exactly,
    free_port,
)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(echo) as server:
        yield server


def echoes(proxy: TcpProxy, host: str = LOCALHOST) -> bool:
    with proxy.dial(host) as client:
        client.sendall(b"ping")
        return exactly(client, 4) == b"ping"


def refuses(proxy: TcpProxy, host: str) -> bool:
    try:
        proxy.dial(host).close()
    except ConnectionRefusedError:
        return True
    return False


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    assert "example:\n  tcpproxy 192.168.0.1 80 8080" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required"),
        (["192.168.0.1"], "the following arguments are required"),
        (["192.168.0.1", "80"], "the following arguments are required: LISTEN-PORT"),
        (["192.168.0.1", "0", "8080"], "'0' is not a port from 1 to 65535"),
        (["192.168.0.1", "80", "65536"], "'65536' is not a port from 1 to 65535"),
        (["192.168.0.1", "80", "8080", "more"], "unrecognized arguments: more"),
        (["192.168.0.1", "80", "8080", "--stall", "never"], "is not a number of seconds"),
        (["192.168.0.1", "80", "8080", "--workers", "0"], "is not a number from 1 to 256"),
        (["192.168.0.1", "80", "8080", "--log-level", "loud"], "invalid choice"),
    ],
)
def test_wrong_usage_is_said_in_words(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 2
    assert words in capsys.readouterr().err


def said(*arguments: str) -> tuple[int, list[str]]:
    """The exit status and the lines on stderr of one that should end by itself."""
    command = [sys.executable, "-m", "tcp_relay.tcpproxy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert not done.stdout
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("taken", ["0.0.0.0", LOCALHOST, "::"])
def test_a_port_that_is_taken_is_refused_in_one_clear_line(workers: str, taken: str) -> None:
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as other:
        port = other.getsockname()[1]
        status, lines = said(LOCALHOST, "80", str(port), "--workers", workers)
    assert status == 1
    assert lines == [
        f"tcpproxy: can't listen on port {port}: address already in use; "
        "end the program that listens there, or take another port"
    ]


@pytest.mark.parametrize("first", ["1", "2"])
@pytest.mark.parametrize("second", ["1", "2"])
def test_a_second_proxy_on_the_same_port_is_refused(
    tmp_path: Path, server: Server, first: str, second: str
) -> None:
    """Several workers share the port, but not with those of another program."""
    host, port = server.endpoint.host, str(server.endpoint.port)
    with TcpProxy(tmp_path, host, int(port), "--workers", first) as proxy:
        proxy.ready()
        status, lines = said(host, port, str(proxy.port), "--workers", second)
        assert (status, len(lines)) == (1, 1)
        assert f"port {proxy.port}: address already in use" in lines[0]
        assert echoes(proxy)
        assert proxy.end() == 0


def test_an_address_that_isnt_ours_is_refused_in_one_clear_line() -> None:
    port = free_port()
    status, lines = said(LOCALHOST, "80", str(port), "--listen", "192.0.2.1")
    assert status == 1
    assert lines == [
        f"tcpproxy: can't listen on port {port} of 192.0.2.1: cannot assign requested address; "
        "this host has no such address (ip address)"
    ]


@pytest.mark.parametrize(
    ("listen", "served", "refused"),
    [
        (None, [LOCALHOST, "127.0.0.2", "::1"], []),
        (LOCALHOST, [LOCALHOST], ["127.0.0.2", "::1"]),
        ("0.0.0.0", [LOCALHOST, "127.0.0.2"], ["::1"]),
        ("::1", ["::1"], [LOCALHOST]),
    ],
)
def test_it_listens_where_it_was_asked_to(
    tmp_path: Path, server: Server, listen: str | None, served: list[str], refused: list[str]
) -> None:
    where = ("--listen", listen) if listen else ()
    with TcpProxy(tmp_path, server.endpoint.host, server.endpoint.port, *where) as proxy:
        proxy.ready()
        assert all(echoes(proxy, host) for host in served)
        assert all(refuses(proxy, host) for host in refused)
        assert proxy.end() == 0
        destination = f"{server.endpoint.host}:{server.endpoint.port}"
        assert f"address={listen or 'all'} port={proxy.port}" in proxy.log
        assert f"destination={destination}" in proxy.log
        if listen is None:  # each client under its own address
            assert "client=127.0.0.1:" in proxy.log
            assert 'client="[::1]:' in proxy.log or "client=[::1]:" in proxy.log


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_destination_may_be_of_ipv6(tmp_path: Path, host: str) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
        listening.settimeout(BOUND)
        with TcpProxy(tmp_path, host, listening.getsockname()[1]) as proxy:
            with proxy.ready().dial() as client:
                client.sendall(b"from IPv4")
                peer, _ = listening.accept()
                with peer:
                    assert exactly(peer, 9) == b"from IPv4"
                    peer.sendall(b"to IPv4")
                    assert exactly(client, 7) == b"to IPv4"
            assert proxy.end() == 0


def test_the_destination_may_be_a_name(tmp_path: Path, server: Server) -> None:
    with TcpProxy(tmp_path, "localhost", server.endpoint.port) as proxy:
        assert echoes(proxy.ready())
        assert proxy.end() == 0


def test_two_workers_serve(tmp_path: Path, server: Server) -> None:
    with TcpProxy(tmp_path, server.endpoint.host, server.endpoint.port, "--workers", "2") as proxy:
        proxy.wait_for_log("all workers are ready workers=2")
        assert all(echoes(proxy) for _ in range(40))
        proxy.wait_for_log("connection ended", times=40)
        assert proxy.end() == 0
        shares = [
            int(line.partition("accepted=")[2].split()[0])
            for line in proxy.log.splitlines()
            if " stopped accepted=" in line
        ]
        assert len(shares) == 2  # the kernel deals them by lot: none has all, but for 1 in 2**39
        assert sum(shares) == 40


def test_two_workers_drain(tmp_path: Path, server: Server) -> None:
    with TcpProxy(tmp_path, server.endpoint.host, server.endpoint.port, "--workers", "2") as proxy:
        proxy.wait_for_log("all workers are ready workers=2")
        with proxy.dial() as client:
            client.sendall(b"ping")
            assert exactly(client, 4) == b"ping"
            proxy.process.send_signal(signal.SIGTERM)
            proxy.wait_for_log("draining connections=1")
            client.sendall(b"pong")
            assert exactly(client, 4) == b"pong"
        assert proxy.process.wait(BOUND) == 0


def test_it_logs_json_if_asked(tmp_path: Path, server: Server) -> None:
    host, port = server.endpoint.host, server.endpoint.port
    with TcpProxy(tmp_path, host, port, "--log-json") as proxy:
        proxy.wait_for_log('"listening"')
        assert proxy.end() == 0
        assert all(line.startswith("{") for line in proxy.log.splitlines())
