"""Unix sockets: what lies at the path, with which mode, and who gets in."""

import grp
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE

import pytest

from krelay.loop import Loop
from krelay.unixsock import Peer, UnixListener

NOBODY = 65534
GROUP_ID = 4711
OURSELVES = 4712

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be made by root alone")


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture(autouse=True)
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have the group or not; here it hasn't unless a test says so."""
    monkeypatch.setattr("krelay.unixsock.GROUP", "no-such-group")


class Door:
    """A listener and those it let in."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.let_in: list[tuple[socket.socket, Peer]] = []
        self._loop = loop
        self._listener = UnixListener(
            loop, path, socket.SOCK_STREAM, lambda *both: self.let_in.append(both)
        )

    def turn(self) -> None:
        """One turn, with what is ready now."""
        self._loop.call_soon(lambda: self._loop.call_soon(self._loop.stop))
        self._loop.run()

    def close(self) -> None:
        self._listener.close()
        for connection, _ in self.let_in:
            connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "door.sock"


@pytest.fixture
def door(loop: Loop, path: Path) -> Iterator[Door]:
    door = Door(loop, path)
    yield door
    door.close()


def knock(path: Path) -> socket.socket:
    visitor = socket.socket(socket.AF_UNIX)
    visitor.connect(str(path))
    visitor.settimeout(5)
    return visitor


def mode(path: Path) -> int:
    return S_IMODE(path.stat().st_mode)


def test_who_may_connect_is_handed_over_with_its_process_and_does_not_block(
    door: Door, path: Path
) -> None:
    with knock(path):
        door.turn()
        ((connection, peer),) = door.let_in

        assert peer == Peer(os.getpid(), os.geteuid(), os.getegid())
        assert not connection.getblocking()


def test_without_the_group_the_socket_is_for_its_owner_alone(door: Door, path: Path) -> None:
    assert mode(path) == 0o600


@needs_root
def test_with_the_group_the_socket_is_for_its_members_too(
    loop: Loop, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = next(group for group in grp.getgrall() if group.gr_gid != os.getegid())
    monkeypatch.setattr("krelay.unixsock.GROUP", group.gr_name)
    door = Door(loop, path)

    assert (mode(path), path.stat().st_gid) == (0o660, group.gr_gid)
    door.close()


def test_a_stale_socket_is_replaced(loop: Loop, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.chmod(0o777)
    door = Door(loop, path)
    with knock(path):
        door.turn()

    assert len(door.let_in) == 1
    assert mode(path) == 0o600
    door.close()


def test_closing_removes_the_socket_and_leaves_connections_alone(loop: Loop, path: Path) -> None:
    door = Door(loop, path)
    with knock(path) as visitor:
        door.turn()
        door._listener.close()
        assert not path.exists()
        door.let_in[0][0].send(b"still here")
        assert visitor.recv(100) == b"still here"
    door.let_in[0][0].close()


def test_closing_when_somebody_has_removed_the_socket_is_fine(loop: Loop, path: Path) -> None:
    door = Door(loop, path)
    path.unlink()
    door.close()


def test_a_place_where_none_can_listen_is_an_error_and_leaves_nothing(
    loop: Loop, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    descriptors = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "missing" / "door.sock", tmp_path / ("x" * 200)):
        with pytest.raises(OSError, match=r"No such file|too long"):
            Door(loop, path)

    assert os.umask(before) == 0o022
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert list(tmp_path.iterdir()) == []


def test_one_who_is_gone_before_it_is_let_in_disturbs_nothing(door: Door, path: Path) -> None:
    knock(path).close()
    door.turn()
    with knock(path):
        door.turn()

    assert len(door.let_in) == 2
    assert door.let_in[0][0].recv(1) == b""


@needs_root
@pytest.mark.parametrize("is_member", [False, True])
def test_others_are_hung_up_on_whatever_the_mode_and_members_are_not(
    door: Door, path: Path, monkeypatch: pytest.MonkeyPatch, is_member: bool
) -> None:
    monkeypatch.setattr("krelay.unixsock._group", lambda: NOBODY if is_member else GROUP_ID)
    path.parent.chmod(0o755)
    path.chmod(0o666)
    program = (
        f"import os, socket; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"s = socket.socket(1); s.connect('{path.name}'); print(s.recv(9))"
    )
    visitor = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=path.parent,
        stdout=subprocess.PIPE,
    )
    pid = os.pidfd_open(visitor.pid)
    ended = select.poll()
    ended.register(pid, select.POLLIN)
    greeted = 0
    while not ended.poll(5):
        door.turn()
        for connection, peer in door.let_in[greeted:]:
            greeted += 1
            assert peer == Peer(visitor.pid, NOBODY, NOBODY)
            connection.send(b"welcome")
    os.close(pid)

    assert visitor.communicate(timeout=5)[0] == (b"b'welcome'\n" if is_member else b"b''\n")
    assert greeted == is_member


@pytest.mark.parametrize(
    ("uid", "gid", "group", "may"),
    [
        (0, GROUP_ID + 1, None, True),
        (OURSELVES, GROUP_ID + 1, None, True),
        (NOBODY, GROUP_ID, GROUP_ID, True),
        (NOBODY, GROUP_ID + 1, GROUP_ID, False),
        (NOBODY, GROUP_ID + 1, None, False),
        (4_000_000_000 - (1 << 31), GROUP_ID + 1, GROUP_ID, False),  # a user that nobody knows
    ],
)
def test_root_we_ourselves_and_members_may_connect(
    uid: int, gid: int, group: int | None, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krelay.unixsock._group", lambda: group)
    monkeypatch.setattr(os, "geteuid", lambda: OURSELVES)

    assert Peer(1, uid, gid).may_connect() is may


def test_a_member_by_the_list_of_the_group_may_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krelay.unixsock._group", lambda: GROUP_ID)
    monkeypatch.setattr(os, "getgrouplist", lambda _name, gid: [gid, GROUP_ID])

    assert Peer(1, NOBODY, NOBODY).may_connect()


def test_without_a_descriptor_left_it_waits_and_then_accepts(
    loop: Loop, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krelay.unixsock.PAUSE", 0.0)
    door = Door(loop, path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, limits[1]))
            door.turn()
            assert not door.let_in
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for _ in range(3):
                door.turn()
            assert len(door.let_in) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        door.close()


# What lies at the path


def test_it_listens_again_where_its_path_leads_elsewhere(loop: Loop, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    door = Door(loop, root / "a.sock")
    first = knock(root / "a.sock")
    door.turn()
    root.rename(tmp_path / "away")
    root.mkdir()
    door._listener.renew()
    door._listener.renew()
    second = knock(root / "a.sock")
    door.turn()

    assert len(door.let_in) == 2
    door.let_in[0][0].send(b"still there")
    assert first.recv(20) == b"still there"
    for each in (first, second):
        each.close()
    door.close()
    assert not (root / "a.sock").exists()


def test_it_goes_on_where_it_was_if_it_cannot_listen_again(loop: Loop, tmp_path: Path) -> None:
    root, away = tmp_path / "tree", tmp_path / "away"
    root.mkdir()
    door = Door(loop, root / "a.sock")
    root.rename(away)
    (root / "a.sock").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is in the way and no socket; remove it"):
        door._listener.renew()
    with knock(away / "a.sock"):
        door.turn()
    assert len(door.let_in) == 1
    door.close()
    assert (root / "a.sock").is_dir()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_not_removed(loop: Loop, path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")

    with pytest.raises(FileExistsError, match=f"{path} is in the way and no socket; remove it"):
        Door(loop, path)
    assert os.path.lexists(path)


def test_the_socket_of_another_is_left_when_it_closes(loop: Loop, path: Path) -> None:
    door = Door(loop, path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        door.close()

    assert path.is_socket()
