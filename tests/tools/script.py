"""Scripts of packets: a trace as text, played against a worker, line by line.

    0    pre    C:40000 > K:80 [S]              => C:40000 > K:16000
    0    open   C:40000 @16000 from K:45678     => S:80 client
    0    post   K:45678 > S:80 [S]              => C:45678 > S:80
    1    pre    S:80 > C:45679 [.]              => pass no_flow
    2    pre    D:5000 > K:16000 [S]            => drop gateway_port + K:16000 > D:5000 [R.]
    3    set    gport=17000
    4    post   K:53 > C:4000                   => ...

A line is a time in seconds, a verb, and what must come of it.  Flags in brackets make a packet TCP,
none make it UDP; with a `!` its numbers are another's; hosts have the letters of packets.py,
or dotted addresses.  A packet is rewritten, or goes on (`pass`) or not (`drop`), both by a reason;
behind `+` stand the relay's own answers.  A port that the relay may choose is a word: the first
line that names it binds it, later ones must agree.

    pre, post      a packet at that hook
    open, resume   tcp-relay asks: the client as it sees it, its gateway port, its relay port,
                   `to` its server
    close          tcp-relay has closed the connection with that relay port
    lost           tcp-relay's connection to krelay is lost
    set            other values for new flows: gport, served, server, source, tcp, udp, forwarded;
                   flows, flows_per_client, new_flows_per_client, recovering and waiting (until
                   when); `off`

Before each line the time until then passes, as it does in the daemon.  A rewritten packet is
compared in all its bytes with one built from scratch.  Each script runs twice, the second time with
IP options in all packets: the worker's fast path and its general path must give the same.  On a
mismatch the script is printed up to the line that failed.
"""

import math
import re
from dataclasses import replace
from random import Random

from knet.endpoint import Endpoint, FiveTuple, Proto, Source
from krelay.datapath.policy import Policy
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.table import NatTable
from krelay.registration.inforce import InForce
from krelay.registration.messages import Answer, Close, Open, Opened, Refused, Request, Resume
from krelay.registration.registry import Relays
from krelay.steps import Hook, Step
from tests.tools import packets
from tests.tools.packets import LETTERS, Template, addr, at, shown
from tests.tools.sockets import OneUser

HOOKS = {"pre": Hook.PREROUTING, "post": Hook.POSTROUTING}
RECORD_ROUTE = b"\x07\x07\x04\0\0\0\0\0"


class Host:
    """A worker with its table and the answers to tcp-relay, joined as the daemon joins them."""

    def __init__(self, policy: Policy | None, ip_options: bytes = b"") -> None:
        self.nat = NatTable(rng=Random(1))
        self.worker = Worker(self.nat)
        self.worker.policy = policy
        self.relays = Relays(self.nat, lambda: self._policy, OneUser())
        self.relays.resumable_until = math.inf
        self.said: list[Answer] = []
        self._tcp_relay = self.said.append
        self.relays.joined(self._tcp_relay, uid=0)
        """What tcp-relay was told unasked."""
        self._policy = policy or packets.policy()
        self._ip_options = ip_options

    @property
    def steps(self) -> dict[str, int]:
        """Packets by step, without zeros."""
        return {s.label: n for s in Step if (n := self.worker.counts.steps[s])}

    def run(self, now: float, verb: str, rest: str) -> str:
        """Does what a line says; what came of it, as a line would say it."""
        self.nat.expire(now)
        self.relays.on_time(now)
        match verb:
            case "pre" | "post":
                return self._packet(packets.template(rest), HOOKS[verb], now)
            case "open" | "resume" | "close":
                return self._ask(rest, verb, now)
            case "lost":
                self.relays.lost(self._tcp_relay, now)
                self.relays.joined(self._tcp_relay, uid=0)
                return ""
            case "set":
                self._set(rest)
                return ""
        raise ValueError(f"{verb} is no verb of a script")

    def _packet(self, template: Template, hook: Hook, now: float) -> str:
        template = replace(template, ip_options=self._ip_options)
        counts = self.worker.counts
        passed, dropped = counts.passed.copy(), counts.dropped.copy()
        result = self.worker.handle(template.build(), hook, now)
        match result:
            case Verdict.PASS:
                text = "pass " + ",".join(counts.passed - passed)
            case Verdict.DROP:
                text = "drop " + ",".join(counts.dropped - dropped)
            case bytes():
                l4 = template.l4
                src = Endpoint(result[12:16], int.from_bytes(result[l4 : l4 + 2]))
                dst = Endpoint(result[16:20], int.from_bytes(result[l4 + 2 : l4 + 4]))
                text = f"{shown(src)} > {shown(dst)}"
                right = replace(template, flow=FiveTuple(template.flow.proto, src, dst)).build()
                if result != right:
                    text += f" in wrong bytes: {result.hex()}, not {right.hex()}"
        for answer in self.worker.answers:
            text += " + " + describe(answer)
        self.worker.answers.clear()
        return text

    def _ask(self, rest: str, verb: str, now: float) -> str:
        if verb == "close":
            request: Request = Close(at(rest))
        else:
            words = rest.replace("@", "").split()
            client, gport, relay = at(words[0]), int(words[1]), at(words[3])
            self.relays.listens(self._tcp_relay, gport)
            if verb == "open" and (flow := self.nat.mappings.accepted(client, gport)) is not None:
                flow.tracker.client_acked = True  # most scripts leave out the client's first ACK
            request = Open(1, client, gport, relay)
            if verb == "resume":
                new = self._policy
                self.relays.remember(InForce(new.gport, new.server, new.source, new.tcp))
                request = Resume(1, client, gport, relay, at(words[5]))
        match self.relays.handle(request, self._tcp_relay, now):
            case None:
                return ""
            case Opened(server=server, source=source):
                return f"{shown(server)} {source}"
            case Refused(error=error):
                return f"refused: {error}"
            case _:
                return "resumed"

    def _set(self, rest: str) -> None:
        for word in rest.split():
            name, _, value = word.partition("=")
            match name:
                case "off":
                    self.worker.policy = None
                    return
                case "gport":
                    self._policy = replace(self._policy, gport=int(value))
                case "server":
                    self._policy = replace(self._policy, server=addr(value))
                case "source":
                    self._policy = replace(self._policy, source=Source(value))
                case "tcp" | "udp" | "forwarded" | "served":
                    ports = frozenset(map(int, filter(None, value.split(","))))
                    self._policy = replace(self._policy, **{name: ports})  # type: ignore[arg-type]
                case "flows" | "flows_per_client" | "new_flows_per_client":
                    self.nat.limits = self.nat.limits._replace(**{name: int(value)})
                case "recovering":
                    self.worker.recovering_until = float(value)
                case "waiting":
                    self.worker.waiting_until = float(value)
                case _:
                    raise ValueError(f"{word} can't be set by a script")
        self.worker.policy = self._policy


def describe(packet: bytes) -> str:
    """A packet of the relay's own: its endpoints and flags, or its ICMP type and code."""
    src, dst, l4 = packet[12:16], packet[16:20], (packet[0] & 0xF) * 4
    if packet[9] == 1:
        names = " > ".join(shown(Endpoint(a, 0)).removesuffix(":0") for a in (src, dst))
        return f"{names} icmp {packet[l4]}/{packet[l4 + 1]}"
    sport, dport = int.from_bytes(packet[l4 : l4 + 2]), int.from_bytes(packet[l4 + 2 : l4 + 4])
    text = f"{shown(Endpoint(src, sport))} > {shown(Endpoint(dst, dport))}"
    if packet[9] == Proto.TCP:
        flags = packet[l4 + 13]
        text += f" [{''.join(c for c in 'SFRPU.' if LETTERS[c] & flags)}]"
    return text


def play(script: str, *, on: Policy | None = None) -> Host:
    """Plays the script twice, see above; the host of the first time, as it is at the end."""
    plain, _ = (
        _play(script, Host(on or packets.policy(), options)) for options in (b"", RECORD_ROUTE)
    )
    return plain


def _play(script: str, host: Host) -> Host:
    ports: dict[str, str] = {}
    so_far = []
    for line in script.splitlines():
        so_far.append(line)
        text = line.partition("#")[0]
        if not text.strip():
            continue
        before, _, after = text.partition("=>")
        for name, port in ports.items():
            before = re.sub(rf":{name}\b", f":{port}", before)
        time, verb, *rest = before.split(None, 2)
        got = host.run(float(time), verb, "".join(rest).strip())
        if not _agrees(" ".join(after.split()), got, ports):
            raise AssertionError("\n".join([*so_far, f"{'':>8}but: {got}"]))
    return host


def _agrees(expected: str, got: str, ports: dict[str, str]) -> bool:
    """Whether this is what was expected; binds the names of ports that the relay chose."""
    pattern = re.escape(expected)
    for name in dict.fromkeys(re.findall(r":([a-z]\w*)", expected)):
        known = ports.get(name)
        group = known if known else rf"(?P<{name}>\d+)"
        pattern = re.sub(rf":{name}\b", lambda _, g=group: f":{g}", pattern, count=1)  # type: ignore[misc]
    match = re.fullmatch(pattern, got)
    if match:
        ports |= match.groupdict()
    return match is not None
