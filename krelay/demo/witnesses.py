"""Who saw what: both wires, krelay's trace and its table, and the servers' own logs."""

import json
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from krelay.demo import evidence
from krelay.demo.evidence import Cast, Seen, Traced
from krelay_vm import Lab, Program

_PACKET_OUTGOING = 4  # linux/if_packet.h


class Witnesses:
    """What is seen of the demo in a lab, with krelay's file tree at `root`.  Close them first."""

    def __init__(self, lab: Lab, root: Path, cast: Cast) -> None:
        self._lab = lab
        self._root = root
        self._cast = cast
        self._sockets = ExitStack()
        self._captures: dict[str, socket.socket] = {}
        self._tracer: Program | None = None
        self.wires: dict[str, list[Seen]] = {}
        """The packets of each host's wire."""
        self.forget()

    def close(self) -> None:
        """Closes the captures."""
        self._sockets.close()

    def forget(self) -> None:
        """What the wires have shown so far is of no interest any more."""
        self.wires = {"client": [], "server": []}

    def watch(self) -> Program:
        """From here on packets are captured and traced; the tracer."""
        for host in self.wires:
            capture = self._sockets.enter_context(self._lab.capture(host))
            capture.setblocking(False)
            self._captures[host] = capture
        trace = f"echo trace | socat STDIO,ignoreeof {self._control}"
        self._tracer = self._lab.start("relay", "sh", "-c", trace)
        return self._tracer

    def is_traced(self) -> bool:
        """Whether krelay has begun to trace."""
        status = self.ask("show status json")
        return bool(status and status[0]["traces"])

    @property
    def _control(self) -> str:
        return f"UNIX-CONNECT:{self._root / 'control.sock'}"

    def drain(self) -> None:
        """Takes in what the captures hold."""
        for host, capture in self._captures.items():
            with suppress(BlockingIOError):
                while True:
                    frame, address = capture.recvfrom(0x10000)
                    found = evidence.seen(frame, outgoing=address[2] == _PACKET_OUTGOING)
                    if found is not None:
                        self.wires[host].append(found)

    def trace(self) -> list[Traced]:
        """The trace so far."""
        assert self._tracer is not None
        lines = map(evidence.traced, self._tracer.output.splitlines())
        return [line for line in lines if line is not None]

    def flows(self) -> list[dict[str, Any]]:
        """The NAT table."""
        return self.ask("show nat json")

    def ask(self, request: str) -> list[dict[str, Any]]:
        """What the control socket answers; nothing if no krelay is there."""
        argv = ("socat", "-t10", "-", self._control)
        answer = self._lab.run("relay", *argv, input=f"{request}\n", check=False, timeout=20)
        return [json.loads(line) for line in answer.stdout.splitlines() if line]

    def is_settled(self) -> bool:
        """Whether both conversations are over and everything about them has been seen."""
        flows = self.flows()
        tcp_flow, udp_flow = (evidence.flow_of(flows, proto) for proto in ("tcp", "udp"))
        if tcp_flow is None or udp_flow is None or "relay" not in tcp_flow:
            return False
        self.drain()
        steps = evidence.steps(self._cast, tcp_flow, udp_flow)
        over = tcp_flow["state"] == "closed" and all(self.logs())
        return over and evidence.settled(steps, self.trace(), self.wires)

    def logs(self) -> tuple[str, str]:
        """The line of the request in nginx's access log, that of the query in dnsmasq's."""
        found = []
        for name, word in (("nginx-access.log", "GET"), ("dnsmasq-queries.log", "query[A]")):
            path = self._lab.directory / name
            text = path.read_text(errors="replace") if path.exists() else ""
            found.append(next((line for line in text.splitlines() if word in line), ""))
        return found[0], found[1].partition(": ")[2]
