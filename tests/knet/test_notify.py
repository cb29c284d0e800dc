"""READY=1 for the service manager, where there is one."""

import os
import socket
from pathlib import Path

import pytest

from knet.notify import ready


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_arrives_at_a_path_and_at_an_abstract_name(
    abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"@krelay-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0") if abstract else address)
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)

        assert ready() is None
        assert manager.recv(100) == b"READY=1"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1234"])
def test_without_an_address_that_is_understood_nothing_is_sent(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr("socket.socket", None)

    assert ready() is None


def test_a_manager_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert ready() == "No such file or directory"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))

    assert ready() == "Connection refused"


def test_a_name_that_is_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/" + "x" * 200)

    assert ready() == "AF_UNIX path too long"
