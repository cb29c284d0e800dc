"""A day of the relay, twice: as it is, and by a model so plain that it can be read at a sight.

Hundreds of clients talk, fall silent, come back, break off and use their ports again, while a
tcp-relay opens and closes, settings change, and the clock goes on by a second at a time.  The model
knows the rules of design.md and of the RFCs as sentences, keeps flows in a list, and looks through
all of it for each packet.  It foretells each verdict, and holds the table, its timers and its
counters to its own.  What the relay may choose, a port, the model reads off and checks.

The day goes by once as if every packet visited the worker, and once with a kernel before it that is
offloaded flows.  The model knows nothing of that: it can't be told.

With a kernel before it the day has eight hours, all of them with KRELAY_LONG.

    KRELAY_SEED=123 pytest tests/krelay/test_day.py            that day
    KRELAY_SEED=5000-5100 pytest tests/krelay/test_day.py      others
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random

import pytest

from knet.endpoint import Endpoint, FiveTuple, Proto, Source
from krelay.datapath.policy import Policy
from krelay.datapath.verdict import Verdict
from krelay.nat.admission import AT_ONCE, FlowLimits
from krelay.nat.flow import Flow, Timeouts
from krelay.registration.messages import Close, Open, Opened, Refused
from krelay.steps import SIDES, Hook
from tests.tools.kernel import Datapath
from tests.tools.packets import ACK, FIN, PSH, RST, SYN, Template, addr, at, policy

DAY = 86_400
SHORT = DAY if os.environ.get("KRELAY_LONG") else DAY // 3
PRE, POST = Hook.PREROUTING, Hook.POSTROUTING
S, SA, A, P, F, R = SYN, SYN | ACK, ACK, PSH | ACK, FIN | ACK, RST
OLD, NEW = addr("S"), addr("Z")

Way = tuple[str, Hook, Endpoint, Endpoint, Endpoint, Endpoint, str]
"""A step, where, what a packet reads, what it becomes, and whose it is."""


def seeds() -> range:
    """The days."""
    first, dash, end = os.environ.get("KRELAY_SEED", "1").partition("-")
    return range(int(first), int(end) if dash else int(first) + 1)


@dataclass(eq=False)
class Known:
    """What the model knows of a flow."""

    proto: Proto
    client: Endpoint
    service: Endpoint
    server: Endpoint
    source: Source
    began: float
    gport: int = 0
    inside: Endpoint | None = None
    relay: Endpoint | None = None
    between: Endpoint | None = None
    """What the server sees, or, of UDP with source=relay, what is seen between the hooks."""
    id: int = 0
    heard: float = 0
    client_acked: bool = False
    server_answered: bool = False
    fins: set[str] = field(default_factory=set)
    reset_at: float | None = None
    ever_reset_at: float = 0
    closed_at: float | None = None
    accepted: bool = False
    answered: bool = False
    spoke_again: bool = False
    """The client has, after the first answer; of datagrams."""
    counted: Counter[str] = field(default_factory=Counter)
    _steps: list[Way] = field(default_factory=list)
    _relay_then: Endpoint | None = None

    @property
    def state(self) -> str:
        if self.proto is Proto.UDP:
            return "replied" if self.counted["server"] else "unreplied"
        if self.closed_at is not None:
            return "closed"
        if self.reset_at is not None or self.fins == {"client", "server"}:
            return "closing"
        return "established" if self.client_acked and self.server_answered else "opening"

    def expires(self, timeouts: Timeouts) -> float:
        match self.state:
            case "closed":
                assert self.closed_at is not None
                return self.closed_at + 10
            case "established":
                return self.heard + timeouts.tcp_established
            case "opening" | "closing":
                return max(self.heard, self.ever_reset_at) + timeouts.tcp_transitory
            case _:
                dns = self.service.port == 53
                return self.heard + (timeouts.udp_dns if dns else timeouts.udp)

    def unconfirmed(self) -> bool:
        """Whether it may be evicted.  (No server goes on alone.)"""
        if self.proto is Proto.UDP:
            return self.service.port == 53 or not self.spoke_again
        confirmed = self.accepted or self.server_answered
        return not confirmed and (not self.client_acked or self.reset_at is not None)

    def steps(self) -> list[Way]:
        """Its packets at each hook: the step, what they read there, and what they become."""
        if self._relay_then != self.relay or not self._steps:
            self._relay_then, self._steps = self.relay, self._all_steps()
        return self._steps

    def _all_steps(self) -> list[Way]:
        c, k, s = self.client, self.service, self.server
        if self.proto is Proto.TCP:
            assert self.inside is not None
            gate = Endpoint(k.addr, self.gport)
            found = [
                ("T1", PRE, c, k, self.inside, gate, "client"),
                ("T2", POST, gate, self.inside, k, c, "daemon"),
            ]
            if self.relay is not None:
                assert self.between is not None
                found += [
                    ("T3", POST, self.relay, s, self.between, s, "daemon"),
                    ("T4", PRE, s, self.between, s, self.relay, "server"),
                ]
            return found
        assert self.between is not None
        if self.source is Source.CLIENT:
            return [
                ("U12", PRE, c, k, self.between, s, "client"),
                ("U34", POST, s, self.between, k, c, "server"),
            ]
        assert self.relay is not None
        return [
            ("U1", PRE, c, k, self.between, s, "client"),
            ("U2", POST, self.between, s, self.relay, s, "daemon"),
            ("U3", PRE, s, self.relay, s, self.between, "server"),
            ("U4", POST, s, self.between, k, c, "daemon"),
        ]


class Day:
    """A worker, the model beside it, and who talks."""

    def __init__(self, seed: int, room: int) -> None:
        self.rng = Random(seed)
        self.policy: Policy = policy(udp=frozenset({53, 123}), beside=())
        now = float(self.rng.randrange(1000)) + self.rng.random()
        self.path = Datapath(self.policy, room, FlowLimits(150, 40), seed + 1, now)
        self.nat, self.worker, self.relays = self.path.nat, self.path.worker, self.path.relays
        self.seconds = SHORT if room else DAY
        self.late = 1e-6 if room else 0.0  # the kernel tells nanoseconds
        """Seconds between a packet and the look at it, at most."""
        self.timeouts = Timeouts()
        self.flows: list[Known] = []
        self.lost: set[tuple[int, str]] = set()  # (id of a Known, step): another took its place
        self.steps: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[bytes] = Counter()
        self.evicted = 0
        self.events = Counter[str]()
        """What has happened at all, so that a day without it is seen."""
        self._plans: list[tuple[float, int, Iterator[float]]] = []
        self._planned = 0

    # The relay's side

    @property
    def now(self) -> float:
        return self.path.now

    @now.setter
    def now(self, now: float) -> None:
        self.path.now = now

    def packet(
        self, hook: Hook, src: Endpoint, dst: Endpoint, flags: int = 0, proto: Proto = Proto.TCP
    ) -> bytes | Verdict:
        """A packet; the model and the worker must say the same of it."""
        template = Template(FiveTuple(proto, src, dst), b"data", flags)
        got = self.path.packet(template, hook)
        self.worker.answers.clear()
        expected = self.expected(hook, src, dst, flags, proto, got)
        if isinstance(expected, tuple):
            to = FiveTuple(proto, *expected)
            assert got == replace(template, flow=to).build(), (self.now, src, dst, flags, expected)
        else:
            assert got is expected, (self.now, src, dst, flags)
        return got

    def expected(
        self,
        hook: Hook,
        src: Endpoint,
        dst: Endpoint,
        flags: int,
        proto: Proto,
        got: bytes | Verdict,
    ) -> tuple[Endpoint, Endpoint] | Verdict:
        opens = proto is Proto.TCP and flags & (S | A | R) == S
        found = self.find(hook, src, dst, proto)
        if found and found[1] == "T1" and opens and found[0].state == "closed":
            found = None  # a port that is used again
            again = True
        else:
            again = False
        to_us = hook is PRE and dst.addr in self.policy.own
        if (
            found is None
            and to_us
            and self.policy.serves(proto, dst.port)
            and (opens or proto is Proto.UDP)
        ):
            reason = self.refusal(src, proto)
            if reason:
                self.dropped[reason] += 1
                self.refused[src.addr] += 1
                return Verdict.DROP
            assert isinstance(got, bytes), (self.now, src, dst, "should have begun a row")
            self.begin(src, dst, proto, got)
            found = self.find(hook, src, dst, proto)
        assert not again or found is not None
        if found is None:
            assert not (to_us and dst.port == self.policy.gport)
            if hook is POST and src.addr in self.policy.own and src.port == self.policy.gport:
                self.dropped["no_flow"] += 1
                return Verdict.DROP
            self.passed["no_flow"] += 1
            return Verdict.PASS
        flow, step, to, who = found
        self.steps[step] += 1
        flow.counted[step] += 1
        flow.counted[who] += 1
        if proto is Proto.TCP:
            self.track(flow, step, who, flags)
        elif who != "daemon":
            flow.heard = self.now
            flow.answered |= who == "server"
            flow.spoke_again |= flow.answered and who == "client"
        return to

    def find(
        self, hook: Hook, src: Endpoint, dst: Endpoint, proto: Proto
    ) -> tuple[Known, str, tuple[Endpoint, Endpoint], str] | None:
        for flow in self.flows:
            if flow.proto is proto:
                for step, where, a, b, to_a, to_b, who in flow.steps():
                    if (where, a, b) == (hook, src, dst) and (flow.id, step) not in self.lost:
                        return flow, step, (to_a, to_b), who
        return None

    def track(self, flow: Known, step: str, who: str, flags: int) -> None:
        if who == "daemon":  # whose host has judged by numbers what the ends have said
            if flags & R:
                if flow.reset_at is None:
                    flow.reset_at = flow.ever_reset_at = self.now
            elif flags & FIN:
                flow.fins.add("server" if step == "T2" else "client")
            return
        if flags & R:
            return
        flow.heard = self.now
        flow.reset_at = None
        if who == "client":
            flow.client_acked |= bool(flags & A)
        else:
            flow.server_answered |= bool(flags & (A | S))

    def refusal(self, client: Endpoint, proto: Proto) -> str:
        """Why no flow may begin, or nothing; what was evicted for it is taken out."""
        evicted = self.evict(now_closed=True)
        live = [flow for flow in self.flows if flow.closed_at is None]
        # The flow that has just begun is in the table and not yet in the model.
        begun = len(self.nat) > len(self.flows)
        limits, udp = self.nat.limits, [flow for flow in live if flow.proto is Proto.UDP]
        udp_most = limits.flows - limits.flows // 4
        own = [
            flow for flow in live
            if flow.client.addr == client.addr and (flow.proto is Proto.TCP) == (proto is Proto.TCP)
        ]  # fmt: skip
        if begun:
            assert len(own) < limits.flows_per_client
            # Where a limit was lowered, some go for each that begins, until there is room.
            assert len(live) < limits.flows or evicted >= AT_ONCE
            if proto is Proto.UDP:
                assert len(udp) < udp_most or evicted >= AT_ONCE
                assert len(live) < udp_most or evicted
            return ""
        itself = len(own) >= limits.flows_per_client
        if not itself:
            assert len(live) >= (udp_most if proto is Proto.UDP else limits.flows)
        only_udp = proto is Proto.UDP and len(udp) >= udp_most
        for flow in own if itself else udp if only_udp else live:
            assert not flow.unconfirmed(), "it should have made room"
        return "client_full" if itself else "table_full"

    def evict(self, *, now_closed: bool = False) -> int:
        """Takes out what the table has evicted; how many, without those that were closed.

        These go only where one has just begun (`now_closed`) and there was no other place, or where
        there are more than a lowered limit allows.
        """
        still = {flow.id for flow in self.nat}
        gone = [flow for flow in self.flows if flow.id not in still]
        gone = [flow for flow in gone if now_closed or flow.expires(self.timeouts) > self.now]
        for flow in sorted(gone, key=lambda flow: flow.closed_at or 0):
            if flow.closed_at is None:
                assert flow.unconfirmed()
                self.evicted += 1
            else:
                assert now_closed or len(still) >= self.nat.limits.flows
                oldest = min(r.closed_at for r in self.flows if r.closed_at is not None)
                assert flow.closed_at == oldest
            self.flows.remove(flow)
        return sum(flow.closed_at is None for flow in gone)

    def begin(self, client: Endpoint, service: Endpoint, proto: Proto, got: bytes) -> None:
        flow: Flow = max(self.nat, key=lambda flow: flow.id)
        became = Endpoint(got[12:16], int.from_bytes(got[20:22]))
        known = Known(
            proto,
            client,
            service,
            self.policy.backend_for(service, client),
            self.policy.source_for(client.addr),
            self.now,
            id=flow.id,
            heard=self.now,
        )
        others = [other for other in self.flows if other.proto is proto]
        if proto is Proto.TCP:
            known.gport, known.inside = self.policy.gport, became
            taken = {
                o.inside for o in others
                if o.gport == known.gport and (o.closed_at is None or o.service != service)
            }  # fmt: skip
        else:
            known.between = became
            taken = {o.between for o in others if o.server == known.server}
            if known.source is Source.RELAY:
                known.relay = Endpoint(addr("K"), became.port)
                ports = {o.relay.port for o in others if o.relay}
                assert became.port not in ports, "a relay port is never shared"
                taken |= {Endpoint(client.addr, port) for port in ports}
            taken |= {
                Endpoint(client.addr, o.between.port)
                for o in others
                if o.between and o.server == known.server and known.source is Source.RELAY
                and o.between.addr == addr("K")
            }  # fmt: skip
        assert became not in taken
        assert became.addr == client.addr
        avoided = known.source is Source.RELAY and proto is Proto.UDP
        avoided = avoided and client.port in self.policy.udp
        assert became == client or avoided or client in taken, "kept where it is free"
        assert (became.port < 1024, became.port % 2) == (client.port < 1024, client.port % 2)
        reads = {(hook, a, b): step for step, hook, a, b, *_ in known.steps()}
        for other in others:
            for name, where, x, y, *_ in other.steps():
                if (where, x, y) in reads:
                    assert name == reads[where, x, y], (known, other)
                    self.lost.add((other.id, name))
        self.flows.append(known)

    def attach(self, flow: Known) -> bool:
        """tcp-relay has accepted, and asks for the server."""
        port = self.rng.randrange(32768, 60000)
        relay = Endpoint(addr("K"), port)
        if any(o.relay == relay for o in self.flows):
            return False
        assert flow.inside is not None
        answer = self.relays.handle(
            Open(1, flow.inside, flow.gport, relay), self.path.tcp_relay, self.now
        )
        self.path.turn()
        alive = flow in self.flows and (flow.id, "T1") not in self.lost
        if not alive or flow.closed_at is not None:
            assert isinstance(answer, Refused), answer
            return False
        flow.accepted = True
        seen = flow.client.addr if flow.source is Source.CLIENT else relay.addr
        between = Endpoint(seen, port)
        if flow.client.port < 1024 and isinstance(answer, Opened):
            assert answer.seen is not None
            others = [o for o in self.flows if o.server == flow.server and o is not flow]
            taken = {o.between for o in others if o.proto is Proto.TCP}
            assert answer.seen.addr == seen
            assert answer.seen not in taken
            assert answer.seen.port % 2 == flow.client.port % 2
            assert answer.seen.port < 1024, "and kept where it is free"
            kept = between._replace(port=flow.client.port)
            assert answer.seen == kept or kept in taken
            between = answer.seen
        if between == flow.client and between.port == port:
            assert isinstance(answer, Refused)
            return False
        assert isinstance(answer, Opened), answer
        assert (answer.server, answer.source) == (flow.server, flow.source)
        flow.relay, flow.between = relay, between
        flow.heard = self.now  # the server's leg begins its time
        return True

    def close(self, flow: Known) -> None:
        """tcp-relay has closed both legs."""
        if flow.relay is None or any(o.relay == flow.relay for o in self.flows if o is not flow):
            return  # its flow has gone, and its port is another's
        self.relays.handle(Close(flow.relay), self.path.tcp_relay, self.now)
        self.path.turn()
        if flow in self.flows and flow.closed_at is None:
            flow.closed_at = self.now

    def tick(self) -> None:
        """A second is over."""
        self.now += 1
        self.path.count(self.path.offload.due(self.now, 1))
        ended = {flow.id for flow in self.nat.expire(self.now)}
        self.relays.on_time(self.now)
        self.path.turn()
        self.evict()
        gone = [flow for flow in self.flows if flow.id in ended]
        assert len(gone) == len(ended)
        for flow in gone:
            assert flow.expires(self.timeouts) <= self.now
            self.flows.remove(flow)
        if int(self.now) % 300 == 0:
            self.compare()

    def compare(self) -> None:
        """Table, timers and counters say what the model says."""
        self.path.count(self.nat)
        real = {flow.id: flow for flow in self.nat}
        assert set(real) == {flow.id for flow in self.flows}
        for known in self.flows:
            flow = real[known.id]
            assert flow.state == known.state, (flow, known)
            assert abs(flow.seen_at - known.heard) <= self.late
            expires = known.expires(self.timeouts)
            assert abs(flow.expires_at(self.timeouts) - expires) <= self.late
            assert self.now < expires + self.late + 2, "it should have gone"
            for step, rewrite in flow.rewrites.items():
                counted = known.counted[step.name]
                assert rewrite.packets == counted or step.name in ("T3", "T4") or (
                    self.path.room and step not in SIDES and rewrite.packets < counted
                )  # fmt: skip
        counts = self.worker.counts
        assert self.path.steps() == {step: n for step, n in self.steps.items() if n}
        assert counts.passed == self.passed
        assert counts.dropped == self.dropped
        assert self.nat.admission.evicted == self.evicted
        per_client = Counter(flow.client.addr for flow in self.flows if flow.closed_at is None)
        admission = self.nat.admission
        assert admission._of_relayed + admission._of_others == per_client
        footprints = Counter(flow.footprint for flow in self.nat)
        assert self.nat.footprints == footprints

    # Who talks

    def plan(self, story: Iterator[float], after: float = 0.0) -> None:
        """From then on this story goes on; it yields the seconds until its next packet."""
        self._planned += 1
        heappush(self._plans, (self.now + after, self._planned, story))

    def run(self, seconds: int) -> None:
        """Lets that much time pass."""
        end = self.now + seconds
        while self.now < end:
            second = self.now
            while self._plans and self._plans[0][0] < second + 1:
                self.now, _, story = heappop(self._plans)
                wait = next(story, None)
                if wait is not None:
                    self._planned += 1
                    heappush(self._plans, (self.now + wait, self._planned, story))
            self.now = second
            self.tick()
        self.compare()

    def someone(self) -> Endpoint:
        """A client, often from a port that was used before."""
        host = self.rng.choice((1, 1, 1, 2, 3, self.rng.randrange(4, 200)))
        port = self.rng.choice((53, 1023, 5353, self.rng.randrange(40000, 40060)))
        return Endpoint(bytes((10, 0, 0, host)), port)

    def pause(self, *choices: float) -> float:
        """One of these, more or less."""
        return self.rng.choice(choices) * self.rng.uniform(0.8, 1.2)

    def datagrams(self) -> Iterator[float]:
        """A conversation over UDP: some one-way, some with late answers, some that go on."""
        client, port = self.someone(), self.rng.choice((53, 53, 123))
        service = Endpoint(self.rng.choice((addr("K"), addr("G"))), port)
        for _ in range(self.rng.choice((1, 1, 1, 2, 5))):
            self.packet(PRE, client, service, proto=Proto.UDP)
            flow = next((r for r in self.flows if (r.client, r.service) == (client, service)), None)
            if flow is None:
                self.events["datagram refused"] += 1
                return
            if flow.source is Source.RELAY:
                assert flow.between
                self.packet(POST, flow.between, flow.server, proto=Proto.UDP)
            if self.rng.random() < 0.8:
                yield self.pause(0.01, 0.05, 4, 25 if port == 53 else 290)
                self.answer(flow)
            yield self.pause(0.1, 3, 15, 200, 400)

    def answer(self, flow: Known) -> None:
        """The server's datagram, whether the flow lives or not."""
        self.events["late answer" if flow not in self.flows else "answer"] += 1
        assert flow.between
        if flow.source is Source.CLIENT:
            self.packet(POST, flow.server, flow.between, proto=Proto.UDP)
        else:
            assert flow.relay
            got = self.packet(PRE, flow.server, flow.relay, proto=Proto.UDP)
            if isinstance(got, bytes):
                self.packet(POST, flow.server, flow.between, proto=Proto.UDP)

    def connection(self) -> Iterator[float]:
        """A connection, from its SYN to wherever it comes."""
        rng, client, service = self.rng, self.someone(), at(self.rng.choice(("K:80", "K:443")))
        if not isinstance(self.packet(PRE, client, service, S), bytes):
            self.events["connection refused"] += 1
            return
        flow = next(r for r in self.flows if (r.client, r.service) == (client, service))
        if flow.closed_at is not None or flow.accepted:
            return  # a SYN within a connection that is open
        assert flow.inside
        gate = Endpoint(service.addr, flow.gport)
        self.packet(POST, gate, flow.inside, SA)
        if rng.random() < 0.15:
            self.events["half-open"] += 1
            return
        yield self.pause(0.01, 0.3)
        self.packet(PRE, client, service, A)
        yield self.pause(0.001, 0.01, 3)
        if not self.attach(flow):
            self.events["not attached"] += 1
            return
        relay, between, server = flow.relay, flow.between, flow.server
        assert relay
        assert between
        self.packet(POST, relay, server, S)
        if rng.random() < 0.05:
            self.events["server silent"] += 1
            yield self.pause(5, 250)
            self.close(flow)
            return
        yield self.pause(0.01, 0.1)
        self.packet(PRE, server, between, SA)
        self.packet(POST, relay, server, A)
        for _ in range(rng.choice((1, 2, 4))):
            yield self.pause(0.1, 1, 60, 1000, 7300, 8000)
            for hook, a, b, flags in rng.sample(
                ((PRE, client, service, P), (POST, relay, server, P), (PRE, server, between, P),
                 (POST, gate, flow.inside, P), (PRE, server, between, A)), 3
            ):  # fmt: skip
                self.packet(hook, a, b, flags)
        kind = rng.choice(
            ("fins", "fins", "fins", "client reset", "server reset", "forged", "survived", "gone")
        )
        self.events[kind] += 1
        match kind:
            case "fins":
                for hook, a, b in (
                    (PRE, client, service), (POST, relay, server), (PRE, server, between),
                    (POST, gate, flow.inside),
                ):  # fmt: skip
                    self.packet(hook, a, b, F)
                    yield self.pause(0.01, 0.1, 100)
            case "client reset":
                self.packet(PRE, client, service, R)
                self.packet(POST, relay, server, R)
            case "server reset":
                self.packet(PRE, server, between, R)
                self.packet(POST, gate, flow.inside, R)
            case "forged":
                self.packet(PRE, server, between, R)
                yield self.pause(1, 200, 250)
                self.packet(PRE, client, service, P)
                yield self.pause(1, 300, 7000)
                self.packet(PRE, server, between, P)
            case "survived":  # a RST that an end has judged by its number, and didn't take
                resets = [(POST, relay, server, R), (POST, gate, flow.inside, R)]
                goes_on = [(PRE, client, service, P), (PRE, server, between, P)]
                for hook, a, b, flags in (rng.choice(resets), rng.choice(goes_on)):
                    self.packet(hook, a, b, flags)
                    yield self.pause(1, 100, 300)
            case "gone":
                return
        if rng.random() < 0.9:
            yield self.pause(0.01, 1)
            self.close(flow)
            yield self.pause(0.1, 5, 15)
            self.packet(PRE, server, between, A)

    def flood(self) -> Iterator[float]:
        """Many flows at once that come to nothing: of many addresses, or of one."""
        self.events["flood"] += 1
        one, syns = self.rng.random() < 0.5, self.rng.random() < 0.5
        for number in range(400):
            host = 1 if one else number % 250
            client = Endpoint(bytes((10, 0, 1, host)), 20000 + number)
            if syns:
                self.packet(PRE, client, at("K:80"), S)
            else:
                self.packet(PRE, client, at("K:123"), proto=Proto.UDP)
            yield 0.004

    def operator(self) -> Iterator[float]:
        """Somebody changes settings."""
        while True:
            yield self.pause(1800, 3600)
            self.events["setting"] += 1
            match self.rng.randrange(5):
                case 0:
                    source = self.rng.choice(list(Source))
                    self.policy = replace(self.policy, source=source, towards=addr("K"))
                case 1:
                    self.policy = replace(self.policy, server=self.rng.choice((OLD, NEW)))
                    for flow in self.nat.unanswered():
                        if flow.server.addr not in self.policy.backends:
                            self.nat.end(flow)
                    self.flows = [
                        flow for flow in self.flows
                        if flow.state != "unreplied" or flow.server.addr in self.policy.backends
                    ]  # fmt: skip
                case 2:
                    self.timeouts = Timeouts(*(t * self.rng.choice((0.5, 1)) for t in Timeouts()))
                    self.nat.timeouts = self.timeouts
                case 3:
                    self.nat.limits = FlowLimits(self.rng.choice((100, 150, 300)), 40)
                case 4:
                    if self.flows:
                        killed = self.flows.pop(self.rng.randrange(len(self.flows)))
                        ended = self.nat.get(killed.id)
                        assert ended
                        self.nat.end(ended)
            self.path.set(self.policy)

    def miser(self) -> Iterator[float]:
        """Twice a day there is room for next to nothing for a while."""
        for flows, of_client in ((8, 40), (40, 2)):
            yield self.pause(self.seconds * 0.35)
            self.nat.limits = FlowLimits(flows, of_client)
            yield self.pause(2000)
            self.nat.limits = FlowLimits(150, 40)

    def tracer(self) -> Iterator[float]:
        """Somebody looks at some clients' packets for a while."""
        while True:
            self.path.offload.traced(lambda flow: False)
            self.path.turn()
            yield self.pause(600, 5000)
            client = self.someone().addr
            self.path.offload.traced(lambda flow, traced=client: flow.client.addr == traced)  # type: ignore[misc]
            self.path.turn()
            yield self.pause(10, 900)

    def traffic(self) -> Iterator[float]:
        """Who begins when."""
        while True:
            what = self.rng.random()
            if what < 0.5:
                self.plan(self.datagrams())
            elif what < 0.995:
                self.plan(self.connection())
            else:
                self.plan(self.flood())
            yield self.rng.expovariate(1 / 28)


RARE = {
    "answer": 1000, "late answer": 200, "half-open": 50, "fins": 100, "forged": 50, "gone": 50,
    "survived": 50, "client reset": 50, "server reset": 50, "server silent": 20, "flood": 5,
    "setting": 10,
}  # fmt: skip
"""What a whole day must have seen, and how often at least; a short one half as often, as chance
weighs more in it."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("room", [0, 30, 1000], ids=["queue", "little room", "room for all"])
def test_a_day_goes_by_as_the_model_foretells(seed: int, room: int) -> None:
    print(f"KRELAY_SEED={seed}")
    day = Day(seed, room)
    day.plan(day.traffic())
    day.plan(day.operator())
    day.plan(day.miser())
    if room:
        day.plan(day.tracer())
    day.run(day.seconds)
    assert bool(day.path.kernel.counters.total() > 1000) == bool(room)
    assert len(day.path.kernel) == len(day.path.offload)
    print(dict(day.events), dict(day.dropped), day.steps.total(), day.evicted)
    share = 1 if day.seconds == DAY else day.seconds / DAY / 2
    missing = {
        event: day.events[event]
        for event, least in RARE.items()
        if day.events[event] < least * share
    }
    assert not missing
    assert min(day.evicted, day.dropped["table_full"], day.dropped["client_full"]) > 5 * share
    assert sum(day.refused.values()) == sum(
        sum(reasons.values()) for reasons in day.worker.refused.top(1000).values()
    )
