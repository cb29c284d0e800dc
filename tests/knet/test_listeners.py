"""Who listens on a port: asked about sockets of this very process."""

import errno
import os
import socket
from pathlib import Path
from typing import NoReturn

import pytest

from knet import listeners
from knet.listeners import holder, holds_any, listening

NO_INODE = 0


@pytest.fixture(autouse=True, params=["sock_diag", "proc"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's answers, and as it is where a kernel gives none."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EPROTONOSUPPORT, "no such family")

    if request.param == "proc":
        monkeypatch.setattr(listeners, "SocketDiag", refused)
    else:
        monkeypatch.delattr(listeners, "_in_tables")


def inode(of: socket.socket) -> int:
    return os.fstat(of.fileno()).st_ino


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_listening_socket_is_found_by_its_inode_and_named(
    family: socket.AddressFamily, address: str
) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind((address, 0))
        except OSError as error:
            pytest.skip(f"{address}: {error.strerror}")
        listener.listen()
        found = listening(listener.getsockname()[1])
        name = Path("/proc/self/comm").read_text().strip()

        assert found == {inode(listener)}
        assert holds_any(os.getpid(), found) is True
        who = holder(found)
        assert who is not None
        assert str(who) == f"{name} (pid {os.getpid()})"


def test_all_that_share_a_port_are_found() -> None:
    with socket.socket() as one, socket.socket() as two:
        for listener in (one, two):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", 0))
        two.bind(one.getsockname())
        one.listen()
        two.listen()

        assert listening(one.getsockname()[1]) == {inode(one), inode(two)}


def test_a_socket_that_does_not_listen_is_none() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))

        assert listening(bound.getsockname()[1]) == frozenset()


def test_connections_of_a_listener_that_has_closed_are_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        assert listening(port) == {inode(listener)}
    with client, server:
        assert listening(port) == frozenset()


def test_who_has_none_of_these_sockets_does_not_hold_them() -> None:
    with socket.socket() as other:
        assert holds_any(os.getpid(), [NO_INODE]) is False
        assert holds_any(os.getpid(), []) is False
        assert holds_any(os.getpid(), [NO_INODE, inode(other)]) is True
    assert holds_any(1 << 30, [NO_INODE]) is None  # no such process
    assert holder([NO_INODE]) is None
