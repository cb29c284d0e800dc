"""An hour of krelay in seconds, in this process; then, in JSON, what the collector would find.

    python -m tests.net.programs.hour ROOT SECONDS STORY...

The tree at ROOT is to say that it relays.  Without stories krelay is idle.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from itertools import count, cycle
from pathlib import Path
from random import Random

from knet.endpoint import Endpoint, FiveTuple, Proto
from knet.loop import Loop
from krelay.daemon.daemon import Daemon
from krelay.host.witness import Witness
from krelay.registration.messages import Close, Open, Report, Request, emit
from krelay.steps import Hook
from tests.tools.hours import every, garbage, run_for, simulated
from tests.tools.packets import ACK, FIN, RST, SYN, Template

PRE, POST = Hook.PREROUTING, Hook.POSTROUTING
WARM = 60
"""Seconds that go by before anything counts."""
SETTINGS = (
    ("gport", "18001"), ("gport", "abc"), ("services", "tcp/80 tcp/443=forward udp/53 udp/7"),
    ("source", "relay"), ("timeouts/udp", "200"), ("limits/refusal", "drop"), ("real_ip", "1.2.3"),
    ("real_ip", "10.77.3.3"), ("source", "client"), ("datapath", "queue"), ("limits/flows", "100"),
    ("real_ip", "203.0.113.9"), ("datapath", "auto"), ("start", "0"), ("limits/flows", "65536"),
    ("start", "1"), ("gport", "18000"), ("limits/refusal", "reset"), ("real_ip", "10.77.3.1"),
)  # fmt: skip
REQUESTS = (
    "show status", "show nat", "show nat json", "show counters", "show config json", "help",
    "nonsense", "show nat client=x", "kill 99999", "kill x", "flush", "x" * 5000,
)  # fmt: skip
TRACES = ("trace", "trace pcap", "trace client=10.0.0.1", "trace verdict=drop", "trace verdict=x")


class Stories:
    """What may happen to a krelay, by name."""

    def __init__(self, loop: Loop, daemon: Daemon, root: Path) -> None:
        self._loop = loop
        self._daemon = daemon
        self._root = root
        self._rng = Random(1)
        self._number = count(1)
        self._relay: socket.socket | None = None
        self._began: Endpoint | None = None
        self.happened: Counter[str] = Counter()

    def control(self) -> None:
        """Somebody asks, in a connection each."""
        requests = cycle(REQUESTS)
        every(self._loop, 5, lambda: self._ask(next(requests), 0.5))

    def traces(self) -> None:
        """Somebody traces for some seconds."""
        traces = cycle(TRACES)
        every(self._loop, 9, lambda: self._ask(next(traces), 5))

    def settings(self) -> None:
        """Somebody writes settings, wrong ones too."""
        settings = cycle(SETTINGS)

        def write() -> None:
            name, text = next(settings)
            with suppress(FileNotFoundError):
                (self._root / name).write_text(text + "\n")
                self.happened[name] += 1

        every(self._loop, 7, write)

    def links(self) -> None:
        """An address comes and goes; its subnet has two addresses."""
        deeds = cycle(("add", "del"))

        def change() -> None:
            subprocess.run(("ip", "addr", next(deeds), "10.88.0.2/31", "dev", "eth1"), check=True)
            self.happened["address"] += 1

        every(self._loop, 11, change)

    def rules(self) -> None:
        """Somebody takes all rules out."""
        every(self._loop, 120, lambda: subprocess.run(("nft", "flush", "ruleset"), check=True))

    def tree(self) -> None:
        """Somebody removes the tree."""
        every(self._loop, 250, lambda: shutil.rmtree(self._root))

    def flows(self) -> None:
        """Packets come, as from the queue: those of some clients, whose ports come again."""
        every(self._loop, 2, self._some_packets)

    def relays(self) -> None:
        """A tcp-relay asks for the last connections that began, reports, and hangs up at times."""
        every(self._loop, 3, self._ask_as_relay)

    def _ask(self, request: str, patience: float) -> None:
        asking = socket.socket(socket.AF_UNIX)
        try:
            asking.connect(str(self._root / "control.sock"))
        except OSError:
            asking.close()
            return
        asking.setblocking(False)
        asking.send(request.encode() + b"\n")

        def leave() -> None:
            with suppress(BlockingIOError, ConnectionResetError):
                while asking.recv(1 << 16):
                    self.happened["answer"] += 1
            asking.close()

        self._loop.call_at(self._loop.now + patience, leave)

    def _some_packets(self) -> None:
        policy = self._daemon._worker.policy
        if policy is None or policy.towards is None:
            return
        rng, own = self._rng, policy.towards
        client = Endpoint(bytes((10, 0, 0, rng.randrange(1, 5))), rng.randrange(40000, 40020))
        for port in (53, 7, 99):
            self._packet(Proto.UDP, client, Endpoint(own, port), 0, PRE)
            if rng.random() < 0.5:
                server = policy.backend_for(Endpoint(own, port), client)
                self._packet(Proto.UDP, server, client, 0, POST)
        for port in (80, 443, policy.gport):
            flags = rng.choice((SYN, SYN, SYN, ACK, FIN | ACK, RST))
            self._packet(Proto.TCP, client, Endpoint(own, port), flags, PRE)
        self._began = client

    def _packet(self, proto: Proto, src: Endpoint, dst: Endpoint, flags: int, hook: Hook) -> None:
        worker = self._daemon._worker
        packet = Template(FiveTuple(proto, src, dst), b"data", flags).build()
        if isinstance(worker.handle(packet, hook, self._loop.now), bytes):
            self.happened["rewritten"] += 1
        worker.answers.clear()

    def _ask_as_relay(self) -> None:
        number, policy = next(self._number), self._daemon._worker.policy
        if self._relay is None or not number % 20:
            self._relay = self._new_relay()
        elif policy is not None and self._began is not None and policy.towards is not None:
            port = Endpoint(policy.towards, 45000 + number % 1000)
            self._say(Open(number, self._began, policy.gport, port))
            self._say(Report("abcd", {"open": number % 7, "accepted": number}))
            self._loop.call_at(self._loop.now + 30, lambda: self._say(Close(port)))
            if not number % 50:
                self._say(b"nonsense")

    def _new_relay(self) -> socket.socket | None:
        if self._relay is not None:
            self._relay.close()
        relay = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            relay.connect(str(self._root / "relay.sock"))
        except OSError:
            relay.close()
            return None
        relay.setblocking(False)
        return relay

    def _say(self, message: Request | bytes) -> None:
        if self._relay is None:
            return
        try:
            while self._relay.recv(4096):
                self.happened["relay answer"] += 1
        except OSError as error:
            if error.errno != errno.EAGAIN:
                self._relay.close()
                self._relay = None
                return
        with suppress(OSError):
            self._relay.send(message if isinstance(message, bytes) else emit(message))


def main(root: Path, seconds: int, names: list[str]) -> None:
    """Prints what is left."""
    with closing(Witness()) as witness, simulated() as loop:
        daemon = Daemon(loop, root, witness)
        stories = Stories(loop, daemon, root)
        for name in names:
            getattr(stories, name)()
        run_for(loop, WARM)
        left = garbage(lambda: run_for(loop, seconds))
        print("RESULT", json.dumps({"left": left, "happened": stories.happened}), flush=True)
        daemon._relaying.stop(loop.stop)
        loop.run()


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
