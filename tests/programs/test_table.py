"""The table of programs: what it must be so that the runner can work with it."""

import re
import shutil
import subprocess
from typing import get_args

import pytest

from procfs_sim.tree import parse
from tests.programs.packages import needed
from tests.programs.runner import PEERS
from tests.programs.table import CLIENTS, PYPI, SERVERS, Client, Server, Transport
from tests.programs.ways import KINDS, port, services

LEAST = 30
"""As many programs are promised."""


def test_there_are_enough_programs() -> None:
    assert len({client.package for client in CLIENTS}) >= LEAST
    assert len(CLIENTS) == len({client.name for client in CLIENTS})


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_asks_a_server_that_serves_its_protocol(client: Client) -> None:
    server = SERVERS[client.server]

    assert client.transport in get_args(Transport)
    assert client.transport in {port(service)[0] for service in server.services}
    assert "$TO" in client.ask
    assert client.shows
    for pattern in (*client.shows, *client.hides):
        re.compile(pattern.replace("$TO", "TO"))
    assert 0 < client.seconds <= 60


@pytest.mark.parametrize("name", SERVERS)
def test_the_relay_takes_a_servers_services(name: str) -> None:
    for kind in KINDS:
        parse("services", services(SERVERS[name], kind))
    assert any(client.server == name for client in CLIENTS), "nobody asks it"


@pytest.mark.parametrize("name", SERVERS)
def test_what_a_server_is_waited_for_can_come(name: str) -> None:
    server = SERVERS[name]
    for word in server.services if server.ready is None else server.ready:
        if "/" not in word:
            assert f"touch $DIR/{word}" in server.serve
    assert 0 < server.seconds <= 60


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
@pytest.mark.parametrize("entry", [*SERVERS.values(), *CLIENTS], ids=lambda entry: entry.package)
def test_the_shell_can_read_the_commands(entry: Server | Client) -> None:
    match entry:
        case Server():
            texts = (entry.setup, entry.serve)
        case Client():
            texts = (entry.ask, entry.needs)
    for text in texts:
        done = subprocess.run(("sh", "-n", "-c", text), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_our_own_peers_are_there() -> None:
    said = " ".join([*(s.serve for s in SERVERS.values()), *(c.ask for c in CLIENTS)])

    named = set(re.findall(r"\$PEERS/(\w+\.py)", said))
    assert named == {path.name for path in PEERS.glob("*.py")} - {"__init__.py"}


def test_packages_are_named_as_debian_does() -> None:
    for client in CLIENTS:
        for name in needed(client):
            assert name in PYPI or re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name)
