"""The peers' configurations: what the programs themselves say of them, and what must be in them."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import ground, peers
from benchmarks.peers import haproxy_config, nginx_config
from tests.benchmarks.needs import need

SERVER, PORTS = "127.0.0.1", (18080, 18081)


@pytest.mark.parametrize("transparent", [False, True])
def test_haproxy_takes_its_configuration_without_a_warning(
    transparent: bool, tmp_path: Path
) -> None:
    need("haproxy")
    file = tmp_path / "haproxy.cfg"
    file.write_text(haproxy_config(SERVER, PORTS, 100, transparent=transparent))
    checked = subprocess.run(["haproxy", "-c", "-f", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


@pytest.mark.parametrize("transparent", [False, True])
def test_nginx_takes_its_configuration_without_a_warning(transparent: bool, tmp_path: Path) -> None:
    need("nginx", peers.STREAM_MODULE)
    file = tmp_path / "nginx.conf"
    file.write_text(nginx_config(SERVER, PORTS, 100, tmp_path, transparent=transparent))
    command = ["nginx", "-t", "-c", str(file), "-e", str(tmp_path / "errors")]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "[emerg]" not in checked.stderr


def test_only_a_transparent_peer_takes_the_clients_address() -> None:
    for transparent in (False, True):
        for text, word in (
            (haproxy_config(SERVER, PORTS, 100, transparent=transparent), "usesrc clientip"),
            (nginx_config(SERVER, PORTS, 100, Path("/d"), transparent=transparent), "proxy_bind"),
        ):
            assert (word in text) == transparent


def test_every_port_is_served_by_one_worker() -> None:
    haproxy = haproxy_config(SERVER, PORTS, 100)
    nginx = nginx_config(SERVER, PORTS, 100, Path("/d"))
    assert all(f"bind :{port} " in haproxy for port in PORTS)
    assert all(f"proxy_pass {SERVER}:{port};" in nginx for port in PORTS)
    assert "nbthread 1\n" in haproxy
    assert "worker_processes 1;" in nginx


def test_a_peer_can_hold_what_is_asked_of_it_on_both_sides() -> None:
    assert "maxconn 12345\n" in haproxy_config(SERVER, PORTS, 12345)
    connections = nginx_config(SERVER, PORTS, 12345, Path("/d")).partition("worker_connections ")[2]
    assert int(connections.partition(";")[0]) >= 2 * 12345


def test_what_makes_bulk_faster_is_off_unless_asked_for() -> None:
    plain = haproxy_config(SERVER, PORTS, 100)
    splicing = haproxy_config(SERVER, PORTS, 100, splice=peers.ALWAYS_SPLICE)
    assert [line.split()[1] for line in plain.splitlines() if "splice" in line] == ["splice-auto"]
    assert "option splice-request\n    option splice-response\n" in splicing
    assert "splice-auto" not in splicing
    for size in (peers.DEFAULT_BUFFER, peers.LARGE_BUFFER):
        nginx = nginx_config(SERVER, PORTS, 100, Path("/d"), buffer=size)
        assert f"proxy_buffer_size {size};" in nginx


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    assert ground.missing(("sh", str(there))) == ""
    assert ground.missing(("sh", str(tmp_path / "gone"))) == str(tmp_path / "gone")
    assert ground.missing(("no-such-program", "sh")) == "no-such-program"


@pytest.mark.parametrize(("may_raise", "files"), [(True, 20_700), (False, 9000)])
def test_connections_are_as_many_as_the_limit_of_files_allows(
    may_raise: bool, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = (1024, 9000)

    def set_limit(_: int, wanted: tuple[int, int]) -> None:
        nonlocal limit
        if wanted[1] > 9000 and not may_raise:
            raise ValueError("not allowed to raise maximum limit")
        limit = wanted

    monkeypatch.setattr("resource.getrlimit", lambda _: limit)
    monkeypatch.setattr("resource.setrlimit", set_limit)
    assert peers.capacity() == (files - 300) // 2
    assert limit == (files, files)
