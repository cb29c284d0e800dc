"""The control socket's other end, against a daemon that says whatever a test wants."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from krelay.control import client
from krelay.control.client import NoDaemon, Rejected, ask, ask_json, follow


class Daemon:
    """Answers each connection's first packet with the same bytes, and hangs up if told to."""

    def __init__(self, root: Path) -> None:
        self.answer = b""
        self.hangs_up = False
        self.asked: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(root / "control.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(5000))
                connection.sendall(self.answer)
                if not self.hangs_up:
                    connection.recv(1)  # until the client leaves

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        assert not self._thread.is_alive()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.close()


def test_an_answer_is_its_lines_up_to_the_empty_one(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer = b"state=running\nname=\xff\n\nnot ours\n"

    assert ask(tmp_path, "show status") == ["state=running", "name=\ufffd"]
    assert daemon.asked == [b"show status\n"]


def test_an_answer_may_have_no_lines(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer = b"\n"

    assert ask(tmp_path, "show nat") == []


def test_objects_come_one_a_line(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer = b'{"id": 1}\n{"id": 2}\n\n'

    assert ask_json(tmp_path, "show nat json") == [{"id": 1}, {"id": 2}]


def test_an_error_is_raised_as_it_was_said(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer = b"error: 'fly' is no command; try help\n\n"
    for asking in (ask, ask_json, lambda root, request: list(follow(root, request))):
        with pytest.raises(Rejected) as caught:
            asking(tmp_path, "fly")
        assert str(caught.value) == "'fly' is no command; try help"


@pytest.mark.parametrize("answer", [b"", b"state=running\n", b"state=run"])
def test_an_answer_that_breaks_off_is_an_error(
    daemon: Daemon, tmp_path: Path, answer: bytes
) -> None:
    daemon.answer, daemon.hangs_up = answer, True
    with pytest.raises(ConnectionResetError, match="hung up before the end of its answer"):
        ask(tmp_path, "show status")


def test_a_daemon_that_does_not_answer_is_not_waited_for_for_ever(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.05)
    with pytest.raises(TimeoutError):
        ask(tmp_path, "show status")


def test_lines_are_followed_as_they_come_until_the_daemon_ends(
    daemon: Daemon, tmp_path: Path
) -> None:
    daemon.answer, daemon.hangs_up = b"T1 one\nT2 two\n", True

    assert list(follow(tmp_path, "trace")) == ["T1 one", "T2 two"]
    assert daemon.asked == [b"trace\n"]


def test_a_line_can_be_had_before_the_next_is_there(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer = b"T1 one\n"
    lines = follow(tmp_path, "trace")

    assert next(lines) == "T1 one"
    assert isinstance(lines, type(_ for _ in ()))
    lines.close()


@pytest.mark.parametrize("stale", [False, True])
def test_no_daemon_is_said_with_what_to_do(tmp_path: Path, stale: bool) -> None:
    if stale:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "control.sock"))
    said = f"no krelay serves {tmp_path}; start one with `krelay daemon` or `krelay up`"
    for asking in (ask, lambda root, request: list(follow(root, request))):
        with pytest.raises(NoDaemon) as caught:
            asking(tmp_path, "help")
        assert str(caught.value) == said


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be made by root alone")


def as_nobody(directory: Path, request: str) -> str:
    """What somebody hears who asks this."""
    directory.chmod(0o755)
    program = (
        "from pathlib import Path; import os, sys\n"
        "from krelay.control import client; os.setgroups([])\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: print(*client.ask(Path(), sys.argv[1]))\n"
        "except (client.NoDaemon, client.Rejected) as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, request],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stderr == ""
    return done.stdout.strip()


@needs_root
@pytest.mark.parametrize(
    ("request_line", "group"),
    [
        ("help", "krelay-view"),
        ("show nat proto=tcp", "krelay-view"),
        ("trace", "krelay-view"),
        ("kill 7", "krelay-admin"),
        ("flush", "krelay-admin"),
        ("trace pcap", "krelay-admin"),
    ],
)
def test_no_permission_is_said_with_the_group_to_join(
    daemon: Daemon, tmp_path: Path, request_line: str, group: str
) -> None:
    (tmp_path / "control.sock").chmod(0o600)
    with socket.socket(socket.AF_UNIX) as view:
        view.bind(str(tmp_path / "view.sock"))
        (tmp_path / "view.sock").chmod(0o600)
        said = as_nobody(tmp_path, request_line)

    assert said.startswith("no permission for .: ")
    assert f"usermod -aG {group} USER" in said
    assert len(said.splitlines()) == 1
    assert daemon.asked == []


@needs_root
@pytest.mark.parametrize("request_line", ["kill 7", "flush", "trace pcap proto=udp"])
def test_who_may_only_look_is_not_sent_to_where_it_is_refused(
    daemon: Daemon, tmp_path: Path, request_line: str
) -> None:
    (tmp_path / "control.sock").chmod(0o600)
    with socket.socket(socket.AF_UNIX) as view:
        view.bind(str(tmp_path / "view.sock"))
        (tmp_path / "view.sock").chmod(0o666)
        assert "krelay-admin" in as_nobody(tmp_path, request_line)


@needs_root
def test_who_may_not_use_the_control_socket_asks_the_other(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer = b"state=running\n\n"
    (tmp_path / "control.sock").rename(tmp_path / "view.sock")
    (tmp_path / "view.sock").chmod(0o666)
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(tmp_path / "control.sock"))
        (tmp_path / "control.sock").chmod(0o600)
        assert as_nobody(tmp_path, "show status") == "state=running"
    assert daemon.asked == [b"show status\n"]


def test_a_refusal_is_heard_although_the_daemon_has_hung_up(daemon: Daemon, tmp_path: Path) -> None:
    daemon.answer, daemon.hangs_up = b"error: join the group\n\n", True

    with pytest.raises(Rejected, match="join the group"):
        ask(tmp_path, "show status")


class Connects(socket.socket):
    """Counts how often connections are asked for."""

    count = 0

    def connect(self, address: object) -> None:
        Connects.count += 1
        super().connect(address)  # type: ignore[arg-type]


@pytest.fixture
def crowded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, socket.socket]]:
    """A daemon's socket, before which all places are taken; connections of clients are counted."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as held:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(1)
        with suppress(BlockingIOError):
            while True:
                sock = held.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(tmp_path / "control.sock"))
        monkeypatch.setattr(Connects, "count", 0)
        monkeypatch.setattr("krelay.control.client.socket.socket", Connects)
        yield tmp_path, listener


def asking(root: Path, heard: list[object]) -> threading.Thread:
    """A client that has asked, and waits; what it hears is added to `heard`."""

    def ask_it() -> None:
        try:
            heard.append(ask(root, "help"))
        except OSError as error:
            heard.append(error)

    thread = threading.Thread(target=ask_it)
    thread.start()
    while not Connects.count:
        time.sleep(0.001)
    return thread


def answer_the_third(listener: socket.socket) -> None:
    """Two that came before are hung up on."""
    for _ in range(2):
        listener.accept()[0].close()
    with listener.accept()[0] as connection:
        assert connection.recv(100) == b"help\n"
        connection.sendall(b"told\n\n")


def test_a_client_behind_many_others_waits_in_line(crowded: tuple[Path, socket.socket]) -> None:
    """Trying now and then, it would find each place taken by members who come without pause."""
    root, listener = crowded
    heard: list[object] = []
    thread = asking(root, heard)
    time.sleep(0.1)
    answer_the_third(listener)
    thread.join()

    assert heard == [["told"]]
    assert Connects.count == 1


def test_a_signal_while_a_client_waits_in_line_is_no_place_for_it(
    crowded: tuple[Path, socket.socket],
) -> None:
    """As Python has it, a connect that a signal breaks off has succeeded."""
    root, listener = crowded
    heard: list[object] = []
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        waiting = threading.get_ident()

        def signals() -> None:
            while not Connects.count:
                time.sleep(0.001)
            time.sleep(0.05)
            signal.pthread_kill(waiting, signal.SIGUSR1)
            time.sleep(0.05)
            answer_the_third(listener)

        thread = threading.Thread(target=signals)
        thread.start()
        heard.append(ask(root, "help"))
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert heard == [["told"]]
    assert came


def test_a_daemon_that_accepts_none_is_not_waited_for_for_ever(
    crowded: tuple[Path, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = crowded
    monkeypatch.setattr("krelay.control.client.TIMEOUT", 0.5)
    began = time.monotonic()
    with pytest.raises(NoDaemon):
        ask(root, "help")
    assert time.monotonic() - began >= 0.5
