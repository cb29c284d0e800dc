"""Unix sockets: what lies at the path, with which mode, and who gets in."""

import errno
import grp
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from stat import S_IMODE

import pytest

from knet.loop import Loop
from knet.roles import Role
from knet.unixsock import AT_ONCE, RESERVE, Crowd, Peer, UnixListener

NOBODY = 65534
GROUP_ID = 4711
OURSELVES = 4712

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be made by root alone")


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


class Door:
    """A listener and those it let in."""

    def __init__(
        self, loop: Loop, path: Path, group: str = "no-such-group", crowd: Crowd | None = None
    ) -> None:
        self.let_in: list[tuple[socket.socket, Peer]] = []
        self.crowd = crowd or Crowd(1000, 1000)
        self._loop = loop
        self._listener = UnixListener(
            loop,
            path.parent,
            Role(path.name, group),
            socket.SOCK_STREAM,
            lambda *both: self.let_in.append(both),
            lambda text: f"error: {text}\n".encode(),
            self.crowd,
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
    visitor.settimeout(30)
    return visitor


def mode(path: Path) -> int:
    return S_IMODE(path.stat().st_mode)


def test_who_may_connect_is_handed_over_with_its_process_and_does_not_block(
    door: Door, path: Path
) -> None:
    with knock(path):
        door.turn()
        ((connection, peer),) = door.let_in

        assert peer == Peer(os.getpid(), os.geteuid(), os.getegid(), frozenset(os.getgroups()))
        assert not connection.getblocking()


def test_without_the_group_the_socket_is_for_its_owner_alone(door: Door, path: Path) -> None:
    assert mode(path) == 0o600


@needs_root
def test_with_the_group_the_socket_is_for_its_members_too(loop: Loop, path: Path) -> None:
    group = next(group for group in grp.getgrall() if group.gr_gid != os.getegid())
    door = Door(loop, path, group.gr_name)

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


class Visitor:
    """Another user's process that connects, says something, and prints what it hears."""

    def __init__(self, path: Path, become: str, before: str = "") -> None:
        path.parent.chmod(0o755)
        path.chmod(0o666)  # whatever the mode
        program = (  # what is refused may hear so before it has said anything
            f"import os, socket, sys; {become}\ns = socket.socket(1)\n"
            f"s.connect('{path.name}')\ntry: {before or 'pass'}\n"
            "except BrokenPipeError: pass\nprint(s.recv(999))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program], cwd=path.parent, stdout=subprocess.PIPE
        )

    def served(self, door: Door) -> tuple[str, list[Peer]]:
        """What it has heard, and the peers that were let in and welcomed."""
        pid = os.pidfd_open(self.process.pid)
        ended = select.poll()
        ended.register(pid, select.POLLIN)
        greeted = 0
        while not ended.poll(5):
            door.turn()
            for connection, _ in door.let_in[greeted:]:
                greeted += 1
                connection.send(b"welcome")
        os.close(pid)
        heard = self.process.communicate(timeout=30)[0].decode().strip()
        return heard, [peer for _, peer in door.let_in]


def become(uid: int, gid: int, *groups: int) -> str:
    """The program's words that make it this user."""
    return f"os.setgroups({list(groups)}); os.setgid({gid}); os.setuid({uid})"


@needs_root
@pytest.mark.parametrize(
    ("who", "is_in"),
    [
        (become(NOBODY, NOBODY), False),
        (become(NOBODY, GROUP_ID), True),
        (become(NOBODY, NOBODY, GROUP_ID), True),  # as somebody who has logged in
        (become(NOBODY, NOBODY, *range(5000, 5300), GROUP_ID), True),  # more than fit an answer
        (become(NOBODY, NOBODY, *range(5000, 5300)), False),
        (become(4_000_000_000, NOBODY, GROUP_ID), True),  # a user that no list has
        ("os.setgroups([]); os.setresgid(65534, 4711, 4711); os.setuid(65534)", True),
        ("os.setgroups([]); os.setresgid(4711, 65534, 4711); os.setuid(65534)", False),
    ],
)
def test_who_is_in_is_what_the_kernel_knows_of_the_process(
    door: Door, path: Path, who: str, is_in: bool
) -> None:
    door._listener._group = GROUP_ID
    heard, peers = Visitor(path, who).served(door)

    if is_in:
        assert heard == "b'welcome'"
        assert [peer.uid for peer in peers] != [0]
    else:
        assert "join the group no-such-group" in heard
        assert peers == []


@needs_root
@pytest.mark.parametrize("before", ["", "s.send(b'show status\\n')", "s.send(bytes(100_000))"])
def test_who_is_refused_is_told_the_group_and_leaves_nothing(
    door: Door, path: Path, before: str
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    heard, peers = Visitor(path, become(NOBODY, NOBODY), before).served(door)

    assert heard.startswith("b'error: door.sock is for root alone, as this host has no group")
    assert "groupadd -r no-such-group" in heard
    assert "usermod -aG no-such-group USER" in heard
    assert peers == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize(
    ("uid", "gid", "groups", "group", "may"),
    [
        (0, GROUP_ID + 1, (), None, True),
        (OURSELVES, GROUP_ID + 1, (), None, True),
        (NOBODY, GROUP_ID, (), GROUP_ID, True),
        (NOBODY, GROUP_ID + 1, (GROUP_ID,), GROUP_ID, True),
        (NOBODY, GROUP_ID + 1, (), GROUP_ID, False),
        (NOBODY, GROUP_ID + 1, (), None, False),
        (NOBODY, 0, (0,), GROUP_ID, False),
    ],
)
def test_root_we_ourselves_and_members_may_connect(
    uid: int,
    gid: int,
    groups: tuple[int, ...],
    group: int | None,
    may: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OURSELVES)

    assert Peer(1, uid, gid, frozenset(groups)).may_connect(group) is may


ROOT = Peer(1, 0, 0)


def user(number: int) -> Peer:
    """Somebody who isn't root."""
    return Peer(1, 1000 + number, 1000)


def test_no_user_keeps_another_out() -> None:
    crowd = Crowd(most=40, of_one=5)
    assert [crowd.enter(user(1)) for _ in range(6)] == [True] * 5 + [False]
    assert crowd.enter(user(2))
    crowd.leave(user(1))
    assert crowd.enter(user(1))
    assert not crowd.enter(user(1))


def test_all_users_together_do_not_keep_root_out() -> None:
    crowd = Crowd(most=40, of_one=5)
    entered = sum(crowd.enter(user(number)) for number in range(20) for _ in range(5))
    assert entered == 30
    assert [crowd.enter(ROOT) for _ in range(11)] == [True] * 10 + [False]
    crowd.leave(user(0))
    assert crowd.enter(ROOT)


def test_root_takes_what_is_there_and_gives_it_back() -> None:
    crowd = Crowd(most=40, of_one=5)
    assert all(crowd.enter(ROOT) for _ in range(40))
    assert not crowd.enter(user(1))
    crowd.leave(ROOT)
    assert crowd.enter(user(1))
    crowd.leave(user(1))
    assert not crowd._of


def test_who_has_too_many_is_told_so_and_may_come_again(
    loop: Loop, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peer, "is_root", False)
    monkeypatch.setattr(Peer, "may_connect", lambda *_: True)
    door = Door(loop, path, crowd=Crowd(most=8, of_one=2))
    with knock(path), knock(path), knock(path) as third:
        for _ in range(4):
            door.turn()
        assert len(door.let_in) == 2
        assert b"a user has at most 2" in third.recv(1000)
        assert third.recv(1) == b""
        connection, peer = door.let_in.pop()
        connection.close()
        door.crowd.leave(peer)
        with knock(path):
            door.turn()
            assert len(door.let_in) == 2
    door.close()


@pytest.fixture
def limited() -> Iterator[int]:
    """Few descriptors may be open; how many of them are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 5 * RESERVE, before[1]))
    yield lowest
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_connections_leave_the_last_descriptors_to_the_daemon(
    loop: Loop, path: Path, limited: int
) -> None:
    """Who connects holds his own ends elsewhere: as many as he likes."""
    door = Door(loop, path)
    program = (
        "import socket, sys\nheld = []\nfor _ in range(300):\n"
        " s = socket.socket(1); s.settimeout(30); s.connect(sys.argv[1]); held.append(s)\n"
        "print('connected', flush=True); sys.stdin.read()"
    )
    visitor = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert visitor.stdout is not None
    readable = select.poll()
    readable.register(visitor.stdout, select.POLLIN)
    while not readable.poll(5):
        door.turn()
    for _ in range(40):
        door.turn()
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(RESERVE)]
    door.turn()
    with pytest.raises(OSError, match="Too many open files"):
        held.append(os.open("/dev/null", os.O_RDONLY))
    for fd in held:
        os.close(fd)
    visitor.communicate(timeout=30)

    assert 3 * RESERVE <= len(door.let_in) <= 4 * RESERVE
    door.close()


def test_without_a_descriptor_left_it_waits_and_then_accepts(
    loop: Loop, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knet.unixsock.PAUSE", 0.0)
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


@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO, errno.ENOBUFS, errno.EMFILE])
@pytest.mark.parametrize("what", ["_peer", "last_descriptor"])
def test_a_connection_that_cannot_be_served_is_given_up_alone(
    door: Door, path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    with monkeypatch.context() as patched:

        def fails(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        patched.setattr(f"knet.unixsock.{what}", fails)
        with knock(path) as visitor:
            door.turn()
            assert visitor.recv(1) == b""
    with knock(path):
        door.turn()
        assert len(door.let_in) == 1


def test_a_guest_who_cannot_be_seated_is_no_longer_counted(loop: Loop, path: Path) -> None:
    crowd = Crowd(most=2, of_one=2)
    door = Door(loop, path, crowd=crowd)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no watches left")

    door._listener._accepted = full
    for _ in range(5):
        with knock(path) as visitor:
            door.turn()
            assert visitor.recv(1) == b""
    assert crowd.enter(ROOT)
    assert crowd.enter(ROOT)
    door.close()


def test_many_who_come_at_once_are_accepted_some_in_a_turn(loop: Loop, path: Path) -> None:
    door = Door(loop, path)
    with ExitStack() as held:
        for _ in range(3 * AT_ONCE):
            held.enter_context(knock(path))
        door.turn()
        assert 0 < len(door.let_in) <= 2 * AT_ONCE  # it is two turns of the loop at most
        for _ in range(3):
            door.turn()
        assert len(door.let_in) == 3 * AT_ONCE
    door.close()


def test_one_who_comes_and_goes_leaves_nothing_behind(loop: Loop, path: Path) -> None:
    door = Door(loop, path, crowd=Crowd(most=4, of_one=2))
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        knock(path).close()
        door.turn()
        for connection, peer in door.let_in:
            connection.close()
            door.crowd.leave(peer)
        door.let_in.clear()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not door.crowd._of
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
