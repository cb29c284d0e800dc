"""`krelay trace --pcap` into all kinds of files, from a daemon that says what a test wants."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from knet.wire import pcapng
from tests.tools.captures import slow_read
from tests.tools.packets import template

PACKET = template("C:4000 > K:53").build()
BEGIN = pcapng.section(application="krelay") + pcapng.interface("client side", link=pcapng.RAW_IP)
BLOCK = pcapng.packet(0, PACKET, 1)
END = pcapng.statistics(0, 2, began=0, received=9, dropped=4)
TIMEOUT = 20


class Scene:
    """A control socket, one `krelay trace --pcap` at a time, and its connection."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "trace.pcapng"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(root / "control.sock"))
        self._listener.listen()
        self._listener.settimeout(TIMEOUT)
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, name: str | None = None, *filters: str, stdout: int = subprocess.PIPE, limit: int = 0
    ) -> socket.socket:
        """The command with this FILE; what it asks is read."""
        file = str(self.file) if name is None else name
        command = [sys.executable, "-m", "krelay", "trace", *filters, "--root", str(self.root)]
        if limit:
            command = ["prlimit", f"--fsize={limit}", *command]
        self.process = subprocess.Popen(
            [*command, "--pcap", file], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        connection, _ = self._listener.accept()
        connection.settimeout(TIMEOUT)
        assert connection.recv(100).decode() == " ".join(["trace pcap", *filters]) + "\n"
        return connection

    def until_capturing(self) -> None:
        """It has said that it captures."""
        assert self.process is not None
        assert self.process.stderr is not None
        said = b""
        while not said.endswith(b"\n"):  # not a byte more: the rest is for `ended`
            said += os.read(self.process.stderr.fileno(), 1)
        assert said.startswith(b"capturing into ")

    def until_written(self, data: bytes) -> None:
        """This is in the file."""
        give_up = time.monotonic() + TIMEOUT
        while not self.file.exists() or self.file.read_bytes() != data:
            assert time.monotonic() < give_up
            time.sleep(0.01)

    def ended(self) -> tuple[int, list[str]]:
        """Its exit status, and what it has said since."""
        assert self.process is not None
        _, said = self.process.communicate(timeout=TIMEOUT)
        assert "Traceback" not in said
        return self.process.returncode, said.splitlines()

    def close(self) -> None:
        """Ends what is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
        self._listener.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_with_a_whole_file_and_a_summary(scene: Scene, number: int) -> None:
    with scene.start(None, "proto=udp") as daemon:
        daemon.sendall(BEGIN + BLOCK + BLOCK[:5])
        scene.until_capturing()
        assert scene.process is not None
        scene.process.send_signal(number)
        assert daemon.recv(1) == b"", "it says that it is enough"
        daemon.sendall(BLOCK[5:] + END)
    status, said = scene.ended()

    summary = f"{scene.file}: 2 frames, 4 lost because they weren't taken fast enough"
    assert (status, said) == (130, [summary])
    assert scene.file.read_bytes() == BEGIN + BLOCK + BLOCK + END


def test_a_second_ctrl_c_does_not_wait_for_the_daemon(scene: Scene) -> None:
    with scene.start() as daemon:
        daemon.sendall(BEGIN + BLOCK + BLOCK[:5])
        scene.until_capturing()
        scene.until_written(BEGIN + BLOCK)
        assert scene.process is not None
        scene.process.send_signal(signal.SIGINT)
        assert daemon.recv(1) == b""
        scene.process.send_signal(signal.SIGINT)
        status, said = scene.ended()

    assert (status, said) == (130, [f"{scene.file}: 1 frames"])
    assert scene.file.read_bytes() == BEGIN + BLOCK


@pytest.mark.parametrize("surplus", [b"", BLOCK[:-1]])
def test_the_daemons_end_is_told_and_the_file_is_whole(scene: Scene, surplus: bytes) -> None:
    with scene.start() as daemon:
        daemon.sendall(BEGIN + BLOCK + surplus)
        scene.until_capturing()
    status, said = scene.ended()

    assert (status, said) == (
        1,
        [f"{scene.file}: 1 frames", "krelay trace: krelay has ended"],
    )
    assert scene.file.read_bytes() == BEGIN + BLOCK


def test_a_reader_of_standard_output_sees_packets_as_they_come(scene: Scene) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, scene.start("-", stdout=write) as daemon:
        os.close(write)
        for sent in (BEGIN, BLOCK, BLOCK + BLOCK):
            daemon.sendall(sent)
            assert reader.read(len(sent)) == sent
        scene.until_capturing()
        assert scene.process is not None
        scene.process.send_signal(signal.SIGINT)
        daemon.recv(1)
        daemon.sendall(END)
        daemon.close()
        assert reader.read() == END
    assert scene.ended()[0] == 130


@pytest.mark.parametrize("packets_come", [True, False])
def test_a_reader_that_has_gone_ends_it_in_peace(scene: Scene, packets_come: bool) -> None:
    read, write = os.pipe()
    with scene.start("-", stdout=write) as daemon:
        os.close(write)
        daemon.sendall(BEGIN)
        scene.until_capturing()
        assert os.read(read, 10_000) == BEGIN
        os.close(read)
        if packets_come:
            with suppress(BrokenPipeError):  # it may have noticed by itself
                daemon.sendall(BLOCK)
        status, said = scene.ended()

    assert (status, said) == (0, ["standard output: 0 frames"])


def test_a_full_disk_is_one_line_and_the_file_ends_with_a_whole_block(scene: Scene) -> None:
    limit = len(BEGIN) + 2 * len(BLOCK) + 10
    with scene.start(limit=limit) as daemon:
        daemon.sendall(BEGIN + 5 * BLOCK)
        scene.until_capturing()
        status, said = scene.ended()

    assert status == 1
    assert said[1:] == [f"krelay trace: {scene.file} can't be written any more: File too large"]
    assert scene.file.read_bytes() == BEGIN + 2 * BLOCK


def test_a_full_device_behind_standard_output_is_one_line(scene: Scene) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with scene.start("-", stdout=full) as daemon:
        os.close(full)
        daemon.sendall(BEGIN)
        scene.until_capturing()
        status, said = scene.ended()

    assert status == 1
    assert said[-1] == (
        "krelay trace: standard output can't be written any more: No space left on device"
    )


def test_an_existing_file_is_begun_anew_and_a_link_to_it_as_well(scene: Scene) -> None:
    scene.file.write_bytes(b"x" * 10_000)
    link = scene.root / "link"
    link.symlink_to(scene.file)
    for name in (str(scene.file), str(link)):
        with scene.start(name) as daemon:
            daemon.sendall(BEGIN)
            scene.until_capturing()
        assert scene.ended()[0] == 1
        assert scene.file.read_bytes() == BEGIN
    assert link.is_symlink()
    assert stat.S_IMODE(scene.file.stat().st_mode) & 0o133 == 0


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "nowhere"])
def test_what_is_no_regular_file_is_left_alone(scene: Scene, kind: str) -> None:
    path = scene.root / "there"
    said = f"krelay trace: {path} is there and is no regular file; choose another, or -"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
        case "nowhere":
            path = scene.root / "no" / "such"
            said = f"krelay trace: {path} can't be written: No such file or directory"
    with scene.start(str(path)) as daemon:
        daemon.sendall(BEGIN)
        assert scene.ended() == (1, [said])


def test_what_the_daemon_refuses_is_one_line_and_the_file_stays(scene: Scene) -> None:
    scene.file.write_bytes(b"before")
    with scene.start(None, "proto=udp") as daemon:
        for part in (b"err", b"or: too many traces\n\n"):
            daemon.sendall(part)
        assert scene.ended() == (1, ["krelay trace: too many traces"])
    assert scene.file.read_bytes() == b"before"


@pytest.mark.parametrize("answer", [b"", BEGIN[:3]])
def test_a_daemon_that_hangs_up_at_once_is_one_line(scene: Scene, answer: bytes) -> None:
    with scene.start() as daemon:
        daemon.sendall(answer)
    assert scene.ended() == (1, ["krelay trace: it hung up without an answer"])
    assert not scene.file.exists()


def test_nonsense_from_the_daemon_is_one_line(scene: Scene) -> None:
    with scene.start() as daemon:
        daemon.sendall(BEGIN + b"\0" * 100)
        status, said = scene.ended()
    assert (status, said[-1]) == (
        1,
        "krelay trace: what krelay sends is no capture: a block of 0 bytes",
    )


def test_a_terminal_is_not_written_to(scene: Scene) -> None:
    inside, outside = os.openpty()
    command = [sys.executable, "-m", "krelay", "trace", "--root", str(scene.root), "--pcap", "-"]
    done = subprocess.run(
        command, stdout=outside, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT
    )
    os.close(inside)
    os.close(outside)
    assert (done.returncode, done.stderr) == (
        1,
        "krelay trace: a terminal can't show a capture; try: "
        "krelay trace --pcap - | wireshark -k -i -\n",
    )


def test_many_blocks_in_pieces_of_any_size_arrive_as_they_are(scene: Scene) -> None:
    sent = BEGIN + 3000 * BLOCK + END
    with scene.start() as daemon:
        for begin in range(0, len(sent), 7919):
            daemon.sendall(sent[begin : begin + 7919])
    status, said = scene.ended()
    assert status == 1
    assert "3000 frames, 4 lost" in said[1]
    assert scene.file.read_bytes() == sent
    assert len(slow_read(sent)) == 3003
