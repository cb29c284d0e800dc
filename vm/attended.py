"""What a person does with a lab at a terminal: commands, a shell, a capture at a link."""

import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from knet.wire import pcapng
from krelay_vm import guest, netns
from krelay_vm.errors import LabError
from krelay_vm.machine import Job, Machine
from krelay_vm.registry import Record
from krelay_vm.topology import Topology
from krelay_vm.wires import listening_to

LEAVE = b"\x1d"
"""Ctrl-], as in telnet."""

SO_TIMESTAMPNS = 35  # asm-generic/socket.h
CHUNK = 1 << 16


def note_links(record: Record, topology: Topology) -> None:
    """Writes down where each link of a lab that stays can be heard."""
    links = {
        f"{near.host}-{far.host}": [near.host, near.name]
        for wire in topology.wires
        for near in wire.ends
        for far in wire.ends
        if near != far
    }
    _links_file(record).write_text(json.dumps(links))


def _links_file(record: Record) -> Path:
    return Path(record.directory) / "links.json"


def execute(record: Record, host: str, argv: Sequence[str]) -> int:
    """Runs a command in a virtual machine as if it were here; its exit status.

    Standard input is passed on whole, so it has to end, unless it is a terminal.
    """
    given = None if sys.stdin.isatty() else sys.stdin.buffer.read()
    job = Machine(host, Path(record.directory)).submit(argv, given)
    with ExitStack() as stack:
        pairs = []
        for name, to in (("out", sys.stdout.buffer), ("err", sys.stderr.buffer)):
            path = job.folder / name
            path.touch()
            pairs.append((stack.enter_context(path.open("rb")), to))
        try:
            status = _until_ended(job, pairs)
        except BaseException:
            job.signal(signal.SIGINT)
            raise
    job.remove()
    return status if status >= 0 else 128 - status


def _until_ended(job: Job, pairs: Sequence[tuple[BinaryIO, BinaryIO]]) -> int:
    while True:
        status = job.poll()  # first: what comes after its end has been written
        for source, to in pairs:
            to.write(source.read())
            to.flush()
        if status is not None:
            return status
        time.sleep(0.02)


def console(record: Record, host: str) -> int:
    """A shell on a host, at this terminal; its exit status."""
    if host not in dict(record.machines):
        shell = ["/bin/bash", "--norc"] if os.access("/bin/bash", os.X_OK) else ["/bin/sh"]
        os.environ["PS1"] = f"{host}:\\w# "
        command = netns.command(f"{record.name}-{host}", *shell)
        os.execvp(command[0], command)
    machine = Machine(host, Path(record.directory))
    if not machine.alive:
        raise LabError(f"the machine {host} does not run{machine.last_lines()}")
    if sys.stdin.isatty():
        columns, rows = os.get_terminal_size(sys.stdin.fileno())
        device = guest.shell_device(dict(record.machines)[host])
        sizes = ("rows", str(rows), "cols", str(columns))
        machine.submit([guest.BUSYBOX, "stty", "-F", device, *sizes]).wait(10)
    print(f"a shell on {host}; Ctrl-] leaves it", flush=True)
    with _line(machine) as line, _raw_terminal():
        os.write(line, b"\n")  # a prompt
        _copy(line)
    print()
    return 0


@contextmanager
def _line(machine: Machine) -> Iterator[int]:
    """The end of the line at which a person sits."""
    terminal = machine.folder / "shell.tty"
    if terminal.exists():
        line = os.open(terminal.read_text(), os.O_RDWR | os.O_NOCTTY)
        try:
            yield line
        finally:
            os.close(line)
    else:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(machine.folder / "shell.sock"))
            yield connection.fileno()


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key is passed on, Ctrl-C as well."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _copy(line: int) -> None:
    """Between the terminal and the line, until Ctrl-], or the end of either."""
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    while True:
        ready, _, _ = select.select([stdin, line], [], [])
        if line in ready:
            try:
                shown = os.read(line, CHUNK)
            except OSError:  # a terminal whose other end is gone
                return
            if not shown:
                return
            os.write(stdout, shown)
        if stdin in ready:
            typed = os.read(stdin, CHUNK)
            typed, leave, _ = typed.partition(LEAVE)
            os.write(line, typed)
            if leave or not typed:
                return


def capture(record: Record, link: str, file: Path) -> int:
    """Writes what passes a link to a file, until Ctrl-C; returns the number of frames.

    A link is called after two hosts on it, `client-relay`; the capture is made at the first.
    """
    try:
        links = json.loads(_links_file(record).read_text())
    except OSError:
        raise LabError(f"lab {record.name} was not made by: python -m krelay_vm up") from None
    if link not in links:
        raise LabError(f"lab {record.name} has no link {link!r}; there are {', '.join(links)}")
    host, interface = links[link]
    count = 0
    with (
        listening_to(f"{record.name}-{host}", interface) as packets,
        file.open("wb", buffering=0) as out,
    ):
        packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        out.write(pcapng.section(application="python -m krelay_vm"))
        out.write(pcapng.interface(f"{host} {interface}"))
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell has background jobs ignore SIGINT
            signal.signal(number, signal.default_int_handler)
        print(f"capturing at {host} {interface}; Ctrl-C ends it", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                data, ancillary, _, address = packets.recvmsg(CHUNK, socket.CMSG_SPACE(16))
                outbound = address[2] == socket.PACKET_OUTGOING
                out.write(pcapng.packet(0, data, _when(ancillary), pcapng.options(outbound)))
                count += 1
    return count


def _when(ancillary: list[tuple[int, int, bytes]]) -> int:
    """When the kernel saw it, in nanoseconds since 1970."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("@qq", data)
            return int(seconds * 10**9 + nanoseconds)
    return time.time_ns()
