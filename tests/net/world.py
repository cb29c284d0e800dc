"""The whole system in a lab: client, relay and server hosts, real programs in each.

    with World() as world:
        world.serve("server", "tcp/80")
        world.begin(services="tcp/80")
        assert world.who("client", 80).startswith(world.client)

krelay and tcp-relay run as processes in the relay host, with a file tree of their own below the
lab's directory.  Settings are written as a user does: `write` by `echo` in a shell, `put` by the
calls that it would make.  Clients are mostly sockets of this process, opened inside a host's
network; each is closed before the lab goes.

Hosts may be virtual machines: there only programs can be clients, and a relay that is one has its
file tree at the usual place in its own file system.
"""

import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from knet.children import compiled_as_here
from krelay.rules.spec import instance_name
from krelay_vm import Lab, Program, Result, Topology, relay_topology
from procfs_sim import DEFAULT_ROOT, DEFAULTS
from tests.net.programs import server
from tests.tools import bpfmaps

T = TypeVar("T")

PYTHON = (sys.executable, *compiled_as_here())
TOPOLOGY = relay_topology("172.20.5.0/24", "10.77.3.0/24", clients=2, servers=2, neighbours=1)
"""Nothing in it is a default: client .1, client2 .2, relay .254 | relay .2, server .1, server2 .3,
neighbour .254."""
PATIENCE, PATIENCE_VM = 30.0, 180.0
GPORT = 18000
SERVICES = "tcp/80 tcp/443 udp/7 udp/53"
RESTLESS = re.compile(r"packets \d+ bytes \d+|\[\d+:\d+\]|^#.*\n", re.MULTILINE)
FLOWS = re.compile(
    r"(^\tmap .*\{\n(?:\t\t(?!elements).*\n)*)\t\telements = \{([^}]*)\}\n", re.MULTILINE
)
"""A map of nft's: what it is, and what stands in it, flows that the kernel was handed."""
COPIES_WITHIN = 0.1
"""Seconds after which krelay has the kernel's copies of queries: ten times as many as the kernel
holds them back.  All other figures are read when they are asked for."""
AGREES_WITHIN = 2.0
"""Seconds after which krelay's figures have all that the kernel did by itself.  Half as many are
promised; the machine may be busy."""


class World:
    """A lab and what runs in it.

    `tree` names the file tree below the lab's directory; `backends` are the lab's; `behind` is the
    host on the relay's link towards the server, if that is a router; `datapath` is the setting that
    each krelay begins with.
    """

    def __init__(
        self,
        topology: Topology = TOPOLOGY,
        tree: str = "run",
        backends: str | Mapping[str, str] = "netns",
        behind: str = "server",
        datapath: str = DEFAULTS.datapath,
    ) -> None:
        self.datapath = datapath
        self.lab = Lab(topology, backends=backends)
        self.patience = PATIENCE_VM if self.lab.backends else PATIENCE
        """Seconds that a condition is waited for, and that a command may take."""
        self.krelay_process: Program
        self.tcp_relay_process: Program
        self._tree = tree
        self._behind = behind
        self._held = ExitStack()
        self._counted: dict[str, int] = {}
        self._logged: dict[Program, int] = {}

    def __enter__(self) -> Self:
        self.lab.__enter__()
        relay_is_machine = "relay" in self.lab.backends
        self.root = Path(DEFAULT_ROOT) if relay_is_machine else self.lab.directory / self._tree
        self.client = self.lab.address("client")
        self.relay = self.lab.address("relay", towards=self._behind)
        """The address that clients ask."""
        self.server = self.lab.address("server")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._held.close()
            for program in self.lab.programs:  # pytest shows it with a failure
                print(f"--- {program}\n{program.output[-4000:]}")
        finally:
            self.lab.close()

    # Programs

    def serve(self, host: str, *services: str, address: str = "0.0.0.0") -> Program:
        """Our own server, serving these: tcp/80."""
        python = (*PYTHON, "-m", server.__name__)
        if host in self.lab.backends:  # there it needs nothing but the standard library
            python = (*PYTHON, "-I", "-S", server.__file__)
        program = self.lab.start(host, *python, address, *services)
        for service in services:
            proto, _, port = service.partition("/")
            self.lab.wait_listening(host, proto, int(port), self.patience)
        return program

    def nginx(self, host: str, *ports: int) -> Path:
        """nginx that answers each request with its path; the log, `ADDRESS PORT PATH` a line.

        Below /files/ are the files of `nginx-HOST/www/files`, and new ones can be put there.
        """
        here = self.lab.directory / f"nginx-{host}"
        (here / "www" / "files").mkdir(parents=True)
        log, conf = here / "access.log", here / "nginx.conf"
        listens = "".join(f"listen {port}; " for port in ports)
        conf.write_text(
            "user root; daemon off; worker_processes 1;\n"
            f"pid {here}/pid; error_log {here}/error.log;\n"
            "events { worker_connections 4096; }\n"
            "http { log_format short '$remote_addr $server_port $request_uri';\n"
            f"  access_log {log} short; client_body_temp_path {here}; proxy_temp_path {here};\n"
            f"  fastcgi_temp_path {here}; uwsgi_temp_path {here}; scgi_temp_path {here};\n"
            f"  server {{ {listens} keepalive_timeout 30; root {here}/www;\n"
            "    location / { return 200 '$request_uri\\n'; }\n"
            "    location /files/ { dav_methods PUT; client_max_body_size 0; } } }\n"
        )
        self.lab.start(host, "nginx", "-c", str(conf), "-e", f"{here}/error.log")
        for port in ports:
            self.lab.wait_listening(host, "tcp", port, self.patience)
        return log

    def dnsmasq(self, host: str, port: int, records: dict[str, str]) -> Program:
        """dnsmasq that knows these names; its log has a line `query[A] NAME from ADDRESS`."""
        hosts = self.lab.directory / f"hosts-{host}-{port}"
        hosts.write_text("".join(f"{address} {name}\n" for name, address in records.items()))
        program = self.lab.start(
            host, "dnsmasq", "-k", "-C", "/dev/null", "--no-resolv", "--no-hosts", "-u", "root",
            f"--port={port}", f"--addn-hosts={hosts}", "--log-queries", "--log-facility=-",
            f"--pid-file={hosts}.pid",
        )  # fmt: skip
        self.lab.wait_listening(host, "udp", port, self.patience)
        return program

    def start_krelay(self, *options: str, tree: Path | None = None) -> Program:
        """`krelay daemon`; waits until it can be asked."""
        root = tree or self.root
        command = (*PYTHON, "-m", "krelay", "daemon", "--root", str(root))
        program = self.lab.start("relay", *command, *options)
        if tree is None:
            self.krelay_process = program
        self.until(lambda: program.poll() is not None or self.answers(root), "an answer")
        assert program.poll() is None, program.output
        if self.datapath != DEFAULTS.datapath:
            self.put(tree, datapath=self.datapath)
        return program

    def start_tcp_relay(self, *options: str, tree: Path | None = None) -> Program:
        """`tcp-relay`; waits until krelay knows it."""
        root = tree or self.root
        command = (*PYTHON, "-m", "tcp_relay", "--root", str(root))
        program = self.lab.start("relay", *command, *options)
        if tree is None:
            self.tcp_relay_process = program
        self.until(lambda: "listening gport=" in program.output, "tcp-relay listening")
        ready = ("gateway_port=served", "gateway_port=unused")
        self.until(lambda: any(each in self.ask("show status", root) for each in ready), "served")
        return program

    def begin(
        self, *options: str, services: str = SERVICES, source: str = "client", gport: int = GPORT
    ) -> None:
        """krelay and tcp-relay, relaying to the first server."""
        self.start_krelay(*options)
        self.put(gport=gport, services=services, real_ip=self.server, source=source)
        self.start_tcp_relay()
        self.put(start=1)
        self.until_state("running")
        if "relay" not in self.lab.backends:  # a machine's kernel may be one that can't
            assert self.in_kernel == (self.datapath == "auto"), self.values("status")["datapath"]

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel is handed flows, as krelay says."""
        return bool(self.values("status")["datapath"] == "kernel")

    def kill(self, program: Program) -> None:
        """kill -9, and waits for the end."""
        program.kill()
        program.wait()

    # As users do

    def write(self, name: str, text: str, tree: Path | None = None) -> None:
        """`echo TEXT > NAME`."""
        self._write({name: text}, tree)

    def _write(self, texts: Mapping[str, str], tree: Path | None) -> None:
        """One after the other, in one shell."""
        root = tree or self.root
        echo = 'while [ $# != 0 ]; do echo "$1" > "$2" || exit; shift 2; done'
        words = (word for name, text in texts.items() for word in (text, str(root / name)))
        self.lab.run("relay", "sh", "-c", echo, "sh", *words, timeout=self.patience)

    def _echo(self, texts: Mapping[str, str], tree: Path | None) -> None:
        """The same calls of the kernel, made here: a shell takes its time."""
        for name, text in texts.items():
            file = os.open((tree or self.root) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.write(file, text.encode() + b"\n")
            finally:
                os.close(file)

    def read(self, name: str, tree: Path | None = None) -> str:
        """What `cat NAME` shows, without the last newline."""
        path = (tree or self.root) / name
        if "relay" in self.lab.backends:
            return self.run("relay", "cat", str(path)).removesuffix("\n")
        return path.read_text().removesuffix("\n")

    def run(self, host: str, *argv: str) -> str:
        """What a command prints."""
        return self.lab.run(host, *argv, timeout=self.patience).stdout

    def put(self, tree: Path | None = None, **values: object) -> None:
        """Writes these settings, and waits until all are in force; `timeouts__udp=1`."""
        names = {name.replace("__", "/"): str(value) for name, value in values.items()}
        if "relay" in self.lab.backends:
            self._write(names, tree)
        else:
            self._echo(names, tree)
        self.until(
            lambda: all(self.applies(name, text, tree) for name, text in names.items()),
            f"{names} in force",
        )

    def applies(self, name: str, text: str, tree: Path | None = None) -> bool:
        """Whether that is the value in force."""
        return f"{name}={text}" in self.read("status/applied", tree).splitlines()

    def until_state(self, state: str, tree: Path | None = None) -> None:
        """Waits until krelay is `running` or `stopped`."""
        self.until(lambda: self.read("status/state", tree) == state, state)

    def krelay(self, *words: str, check: bool = True, timeout: float = 60.0) -> Result:
        """A `krelay` command, typed in the relay host."""
        command, *rest = words
        argv = (*PYTHON, "-m", "krelay", command, "--root", str(self.root), *rest)
        return self.lab.run("relay", *argv, check=check, timeout=timeout)

    def ask(self, request: str, tree: Path | None = None) -> list[str]:
        """The answer of the control socket, without its last, empty line."""
        root = tree or self.root
        if "relay" in self.lab.backends:
            lines = self._ask_there(root, request).split("\n")
        else:
            with control_socket(root) as connection:
                connection.sendall(request.encode() + b"\n")
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile() as answer:
                    lines = answer.read().split("\n")
        assert lines[-2:] == ["", ""], lines[-3:]
        return lines[:-2]

    def _ask_there(self, root: Path, request: str) -> str:
        socat = ("socat", "-t10", "-", f"UNIX-CONNECT:{root}/control.sock")
        return self.lab.run(
            "relay", *socat, input=request + "\n", check=False, timeout=self.patience
        ).stdout

    def answers(self, root: Path) -> bool:
        """Whether somebody serves this tree; the socket is there a little before its server."""
        if "relay" in self.lab.backends:
            return bool(self._ask_there(root, "show status"))
        return answers(root)

    def flows(self, filters: str = "", tree: Path | None = None) -> list[dict[str, Any]]:
        """The flows of `show nat json`."""
        return [json.loads(line) for line in self.ask(f"show nat json {filters}", tree)]

    def values(self, what: str) -> dict[str, Any]:
        """`show WHAT json`: status, counters or config."""
        (line,) = self.ask(f"show {what} json")
        found: dict[str, Any] = json.loads(line)
        return found

    def mark(self) -> None:
        """`counted` and `logged` begin here."""
        counters: dict[str, Any] = {}
        while counters != (again := self.values("counters")):
            counters = again
            time.sleep(COPIES_WITHIN / 10)
        self._counted = counters
        self._logged = {each: each.log.stat().st_size for each in self.lab.programs}

    def counted(self) -> dict[str, int]:
        """What each of krelay's counters has grown by since `mark`, or the beginning.

        Not the tables of `show counters json`.  Those of tcp-relay (`tcp_`) it tells once a second:
        some may be of before.
        """
        found = self.values("counters")
        return {
            name: value - self._counted.get(name, 0)
            for name, value in found.items()
            if isinstance(value, int)
        }

    def logged(self, program: Program | None = None) -> str:
        """What a program, by default krelay, has written since `mark`, or the beginning."""
        program = program or self.krelay_process
        return program.log.read_bytes()[self._logged.get(program, 0) :].decode(errors="replace")

    def soon(self, condition: Callable[[], T | None], what: str) -> T:
        """What a condition on krelay's figures found: at once where every packet visits krelay.

        What the kernel did by itself may be missing from them for a while, AGREES_WITHIN where the
        machine isn't busy.
        """
        if self.in_kernel:
            return self.until(condition, what)
        found = condition()
        assert found, what
        return found

    def complete(self, read: Callable[[], T]) -> T:
        """Figures of krelay's, once they have everything that happened before the call."""
        if self.in_kernel:
            time.sleep(COPIES_WITHIN)
        return read()

    def rules(self, host: str = "relay") -> str:
        """All rules of a host as nft and iptables show them, without counts and flows."""
        found = [
            self.lab.run(host, *command).stdout
            for command in (("nft", "-s", "list", "ruleset"), ("iptables-save",))
        ]
        return FLOWS.sub(r"\1", RESTLESS.sub("", "\n".join(found)))

    def offloaded(self) -> set[bpfmaps.Entry]:
        """Rewrites that the kernel of the relay host does by itself."""
        with self.lab.enter("relay"):
            return bpfmaps.entries(instance_name(str(self.root), DEFAULT_ROOT))

    def handed(self) -> int:
        """How many those are."""
        return len(self.offloaded())

    def finish_packets(self, host: str, *wires: str) -> None:
        """What leaves a host here is from now on what a real wire has.

        Virtual wires take packets as their sender's kernel has them before its adapter: checksums
        not yet made, segments not yet cut.
        """
        for wire in wires:
            self.lab.run(host, "ethtool", "-K", wire, "tx", "off")

    def nft(self, host: str, text: str) -> None:
        """Puts rules into a host."""
        self.lab.run(host, "nft", "-f", "-", input=text)

    # Clients

    def open(self, host: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """A socket in the network of a host; it is closed with this world."""
        with self.lab.enter(host):
            sock = self._held.enter_context(socket.socket(socket.AF_INET, kind))
        sock.settimeout(PATIENCE)
        return sock

    def close_sockets(self) -> None:
        """Closes all that were opened in hosts."""
        self._held.close()

    def connect(
        self, host: str, port: int, *, to: str | None = None, bind: int = 0
    ) -> socket.socket:
        """A connection to the relay's address, or another."""
        sock = self.open(host)
        if bind:
            sock.bind(("", bind))
        sock.connect((to or self.relay, port))
        return sock

    def who(self, host: str, port: int, *, to: str | None = None, bind: int = 0) -> str:
        """The `ADDRESS:PORT` that our server sees of a TCP client of this host."""
        with self.connect(host, port, to=to, bind=bind) as sock:
            return greet(sock)

    def who_udp(self, host: str, port: int, *, to: str | None = None, bind: int = 0) -> str:
        """The same for a datagram."""
        with self.open(host, socket.SOCK_DGRAM) as sock:
            if bind:
                sock.bind(("", bind))
            return self.exchange(sock, b"who", (to or self.relay, port)).decode().strip()

    def exchange(self, sock: socket.socket, data: bytes, to: tuple[str, int]) -> bytes:
        """Sends a datagram, and takes the answer, which must come from where it was sent to."""
        sock.sendto(data, to)
        answer, peer = sock.recvfrom(1 << 16)
        assert peer == to
        return answer

    def download(self, host: str, port: int, seed: int, size: int, *, rate: int = 0) -> "Download":
        """Begins to fetch these bytes."""
        return Download(self.connect(host, port), seed, size, rate)

    def until(
        self, condition: Callable[[], T | None], what: str, timeout: float | None = None
    ) -> T:
        """Waits for a condition, by default for as long as the hosts need; what it found."""
        return self.lab.wait(condition, what, timeout or self.patience)


class Download:
    """A download under way, in a thread of its own."""

    def __init__(self, sock: socket.socket, seed: int, size: int, rate: int) -> None:
        self.socket = sock
        self.received = 0
        self._expected = (size, server.digest(seed, size))
        self._sha = hashlib.sha256()
        self._error: OSError | None = None
        sock.sendall(f"download {seed} {size} {rate}\n".encode())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while block := self.socket.recv(1 << 18):
                self._sha.update(block)
                self.received += len(block)
        except OSError as error:
            self._error = error

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return not self._thread.is_alive()

    def finish(self, timeout: float = 60.0) -> None:
        """Waits for the end; fails unless all bytes came as they were sent."""
        self.join(timeout)
        assert self._error is None, f"{self._error} after {self.received} bytes"
        assert (self.received, self._sha.hexdigest()) == self._expected
        self.socket.close()

    def join(self, timeout: float = 60.0) -> OSError | None:
        """Waits for the end; the error that ended it."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"stands still at {self.received} bytes"
        return self._error

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()


def greet(sock: socket.socket) -> str:
    """Asks our server whom it sees; the connection then echoes."""
    sock.sendall(b"who\n")
    answer = b""
    while not answer.endswith(b"\n"):
        data = sock.recv(100)
        assert data, "the server hung up"
        answer += data
    return answer.decode().strip()


def echo(sock: socket.socket, data: bytes) -> None:
    """Sends through a connection that echoes, and checks what comes back."""
    sock.sendall(data)
    got = b""
    while len(got) < len(data):
        more = sock.recv(1 << 16)
        assert more, "the server hung up"
        got += more
    assert got == data


def upload(sock: socket.socket, seed: int, size: int) -> None:
    """Sends these bytes, and checks what the server says it got."""
    with sock:
        sock.sendall(b"upload\n")
        server.send_blob(sock, seed, size)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile() as answer:
            assert answer.read() == f"{size} {server.digest(seed, size)}\n"


def doubled(rules: str) -> list[str]:
    """The rules, of those that World.rules shows, that stand twice in one chain.

    >>> doubled("table ip a {\\n chain b {\\n  drop\\n  drop\\n }\\n chain c {\\n  drop\\n }\\n}")
    ['drop']
    >>> doubled("-A b -j DROP\\n-A c -j DROP\\n-A b -j DROP")
    ['-A b -j DROP']
    """
    seen, table, chain = Counter[tuple[str, str, str]](), "", ""
    for line in map(str.strip, rules.splitlines()):
        if line.startswith("table "):
            table = line
        elif line.endswith("{"):
            chain = line
        elif line.strip("}"):
            seen[table, chain, line] += 1
    return [line for (_, _, line), times in seen.items() if times > 1]


@contextmanager
def control_socket(root: Path) -> Iterator[socket.socket]:
    """A connection to the control socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(root / "control.sock"))
        yield connection


def answers(root: Path) -> bool:
    """Whether somebody serves this tree; the socket is there a little before its server."""
    try:
        with control_socket(root) as connection:
            connection.sendall(b"show status\n")
            return bool(connection.recv(100))
    except OSError:
        return False
