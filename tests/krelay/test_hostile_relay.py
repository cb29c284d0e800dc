"""A tcp-relay that was taken over: it speaks the language, knows all flows, and means harm.

It has connections of its own beside those of a tcp-relay of another user that behaves.  Clients
come and go, forged ones among them; krelay is killed and started again.  What the hostile one says
is mostly near to what would be right: a message of its own, or the other's, with a field changed.
Nothing that it says may change a flow of the other's, make a flow of what never was, lead packets
elsewhere, or raise; after each message the tables are compared with those before.

KRELAY_LONG=1 is 100,000 messages.
"""

import json
import os
import string
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from knet.endpoint import Endpoint, FiveTuple, Proto, Source
from krelay.datapath.policy import Policy
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.registration.inforce import InForce
from krelay.registration.messages import (
    COUNTERS,
    GAUGES,
    MAX_COUNTS,
    MAX_MESSAGE,
    BadMessage,
    Close,
    Listening,
    NotListening,
    Open,
    Opened,
    Report,
    Request,
    Resume,
    Resumed,
    emit,
    parse_request,
)
from krelay.registration.registry import GONE_KEPT, Relays, Send
from krelay.steps import Hook, Step
from tests.tools.packets import ACK, EVERY_PORT, RST, SYN, Template, addr, at, policy

MESSAGES = 100_000 if os.environ.get("KRELAY_LONG") else 20_000
SEEDS = 4
GOOD, BAD = 990, 65534
"""Their users."""
FLOWS = 60
ADDRESSES = "KGSCDN"
FLOWS_OWN = ("relay", "closed_at", "abort_asked", "orphaned", "accepted")


class Field:
    """The host, the good tcp-relay, the hostile one, and what the model knows of connections."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.policy = policy(
            tcp=frozenset({80, 443, 8080}), forwarded=frozenset({8080}), served=EVERY_PORT
        )
        self.history: list[InForce] = []
        self.kernel: dict[tuple[Endpoint, Endpoint], int] = {}
        """Whose connections the host's kernel knows."""
        self.known: list[dict[str, Any]] = []
        """Messages that were right, to be changed."""
        self.begin()

    def begin(self) -> None:
        """krelay starts, or starts again after it was killed."""
        self.nat = NatTable(FlowLimits(FLOWS, FLOWS), rng=Random(self.rng.random()))
        self.worker = Worker(self.nat)
        self.relays = Relays(self.nat, lambda: self.worker.policy, self)
        self.relays.in_force = list(self.history)
        self.relays.resumable_until = self.now + 5
        self.set(self.policy)
        self.good = self.join(GOOD)
        self.bad = [self.join(BAD) for _ in range(3)]

    def join(self, uid: int) -> Send:
        def send(_: object) -> None:
            """It doesn't listen."""

        self.relays.joined(send, uid)
        self.relays.listens(send, self.policy.gport)
        return send

    def set(self, new: Policy) -> None:
        self.policy = self.worker.policy = new
        known = InForce(new.gport, new.server, new.source, new.tcp - new.forwarded)
        self.history = [each for each in self.history if each != known] + [known]
        self.relays.remember(known)

    def carrier(self, local: Endpoint, remote: Endpoint, may_open: bool = False) -> int | None:
        """As SocketDiag."""
        return self.kernel.get((local, remote))

    def carriers(self, ends: Sequence[tuple[Endpoint, Endpoint]]) -> list[int | None]:
        """As SocketDiag."""
        return [self.carrier(*each) for each in ends]

    # What happens without the hostile one

    def live(self) -> None:
        self.now += self.rng.random() / 20
        self.nat.expire(self.now)
        self.relays.on_time(self.now)
        rng = self.rng
        match rng.randrange(40):
            case n if n < 12:
                self.client(is_forged=False)
            case n if n < 16:
                self.client(is_forged=True)
            case n if n < 22:
                self.serve(self.good, GOOD)
            case n if n < 28:
                self.serve(rng.choice(self.bad), BAD)
            case n if n < 34 and (flow := self.flow()) is not None:
                self.packet(flow.client, flow.service, rng.choice((ACK, RST, SYN)))
            case n if n < 37 and (flow := self.flow(self.good)) is not None and flow.relay:
                self.relays.handle(Close(flow.relay), self.good, self.now)
            case 37 if (flow := self.flow()) is not None:
                if rng.random() < 0.5:
                    self.relays.abort(flow, self.now)
                else:
                    self.relays.lost(self.good, self.now)
                    self.good = self.join(GOOD)
            case 38 if rng.random() < 0.3:
                self.set(
                    replace(
                        self.policy,
                        gport=rng.choice((16000, 17000)),
                        server=addr(rng.choice("SN")),
                        source=rng.choice(list(Source)),
                    )
                )
                for send in (self.good, *self.bad):
                    self.relays.listens(send, self.policy.gport)
            case 39 if rng.random() < 0.1:
                self.begin()

    def packet(self, src: Endpoint, dst: Endpoint, flags: int) -> None:
        packet = Template(FiveTuple(Proto.TCP, src, dst), flags=flags).build()
        self.worker.handle(packet, Hook.PREROUTING, self.now)

    def client(self, *, is_forged: bool) -> None:
        client = at(f"{self.rng.choice('CD')}:{self.rng.randrange(40000, 40040)}")
        service = at(f"{self.rng.choice('KG')}:{self.rng.choice((80, 443, 8080))}")
        self.packet(client, service, SYN)
        if not is_forged:
            self.packet(client, service, ACK)

    def serve(self, send: Send, uid: int) -> None:
        """A tcp-relay does what it is for."""
        flow = self.flow(None)
        if flow is None or flow.inside is None or flow.gport is None:
            return
        relay = Endpoint(addr("K"), self.rng.randrange(50000, 50100))
        request = Open(1, flow.inside, flow.gport, relay)
        acked = flow.tracker.client_acked
        answer = self.relays.handle(request, send, self.now)
        if isinstance(answer, Opened):
            assert acked
            self.kernel[Endpoint(flow.service.addr, flow.gport), flow.inside] = uid
            self.kernel[relay, flow.server] = uid
            if len(self.kernel) > 400:
                del self.kernel[next(iter(self.kernel))]
            resume = Resume(
                1,
                flow.inside,
                flow.gport,
                relay,
                flow.server,
                flow.service,
                flow.source,
                flow.client,
            )
            self.known += [json.loads(emit(each)) for each in (request, resume, Close(relay))]
            del self.known[:-90]

    def flow(self, owner: Send | None = None) -> Flow | None:
        """One of the TCP flows, or of those that this one has."""
        flows = [flow for flow in self.nat.workers if flow.gport is not None]
        if owner is not None:
            flows = [flow for flow in flows if self.relays._owner.get(flow.id) is owner]
        return self.rng.choice(flows) if flows else None

    # What the hostile one says

    def message(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(100)
        if kind < 70 and self.known:
            fields = dict(rng.choice(self.known))
            for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
                self.change(fields)
            return json.dumps(fields, separators=(",", ":")).encode()
        if kind < 80 and (flow := self.flow()) is not None:
            return self.about(flow)
        if kind < 90:
            return self.report()
        if kind < 93:
            return emit(rng.choice((Listening(16000, 3), NotListening(16000))))
        packet = bytearray(self.about(self.flow()) if self.nat else b"{}")
        for _ in range(rng.randrange(8)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        return bytes(packet[: rng.randrange(len(packet) + 1)]) or b"{"

    def about(self, flow: Flow | None) -> bytes:
        """A message about this flow, whosever it is."""
        if flow is None:
            return emit(Close(self.end()))
        inside, relay = flow.inside or flow.client, flow.relay or self.end()
        gport = flow.gport or self.policy.gport
        requests: list[Request] = [
            Open(2, inside, gport, relay),
            Close(relay),
            Resume(2, inside, gport, relay, flow.server, flow.service, flow.source, flow.client),
            Resume(2, inside, gport, relay, self.end(), flow.service),
        ]
        return emit(self.rng.choice(requests))

    def change(self, fields: dict[str, Any]) -> None:
        ends = ("client", "relay", "server", "service", "origin")
        name = self.rng.choice((*ends, "gport", "source", "op"))
        match name:
            case "gport":
                fields[name] = self.rng.choice((16000, 17000, 22, 80, 17999, 0, -1, "16000"))
            case "source":
                fields[name] = self.rng.choice(("client", "relay", "server", None))
            case "op":
                fields[name] = self.rng.choice(("open", "resume", "close"))
            case _:
                flow = self.flow()
                known = (flow.client, flow.inside, flow.relay, flow.server) if flow else ()
                end = self.rng.choice([*filter(None, known), self.end()])
                host, port = str(end).rsplit(":", 1)
                before = fields.get(name)
                if isinstance(before, list) and self.rng.random() < 0.6:
                    host, port = self.rng.choice(((before[0], port), (host, before[1])))
                fields[name] = [host, int(port)]

    def end(self) -> Endpoint:
        rng = self.rng
        port = rng.choice((22, 80, 443, 16000, rng.randrange(50000, 50100), rng.randrange(40040)))
        return Endpoint(addr(rng.choice(ADDRESSES)), max(1, port))

    def report(self) -> bytes:
        rng = self.rng
        letters = string.ascii_lowercase + "_\n\x1b "
        counts: dict[str, object] = {
            "".join(rng.choices(letters, k=rng.randrange(1, 40))): rng.choice((1, 2**63, -1, "x"))
            for _ in range(rng.randrange(3))
        }
        right = {name: rng.randrange(2**62) for name in rng.sample(COUNTERS + GAUGES, 3)}
        worker = f"{rng.randrange(2**32):08x}"
        if rng.random() < 0.8:
            return emit(Report(worker, right))
        counts |= right
        return json.dumps({"op": "report", "worker": worker, "counts": counts}).encode()

    # What must hold

    def tables(self) -> dict[tuple[Hook, bytes], Rewrite]:
        return {
            (hook, old): rewrite
            for hook in Hook
            for old, rewrite in self.nat.tables[hook, Proto.TCP].items()
        }

    def seen(self) -> dict[int, tuple[Any, ...]]:
        """Everything of the flows that the hostile one hasn't got."""
        bad = set(map(id, self.bad))
        owners = self.relays._owner
        return {
            flow.id: (
                flow,
                id(owners.get(flow.id)),
                flow.tracker.state,
                dict(flow.rewrites),
                *(getattr(flow, name) for name in FLOWS_OWN),
            )
            for flow in self.nat.workers
            if id(owners.get(flow.id)) not in bad and not self.may_be_bads(flow)
        }

    def may_be_bads(self, flow: Flow) -> bool:
        """Whether the hostile one may have this flow: it can have accepted it, or had it."""
        if flow.id in self.relays._owner or flow.gport is None:
            return False
        of_bad = any(flow.id in flows for _, uid, flows in self.relays._orphans if uid == BAD)
        return of_bad or (flow.tracker.client_acked and not flow.orphaned)

    def attack(self) -> bool:
        """One message; whether it was understood."""
        before, tables = self.seen(), self.tables()
        ids = {flow.id for flow in self.nat.workers}
        full = len(ids) >= FLOWS
        called = {
            (flow.inside, flow.gport): flow.client for flow in self.nat.workers if flow.called_again
        }
        may_go = {  # a closed flow's port is used again; others make room (admission.py)
            flow.id: flow.closed_at is not None
            or (full and (not flow.is_confirmed or flow.is_over))
            for flow in self.nat.workers
        }
        packet, send = self.message(), self.rng.choice(self.bad)
        try:
            request = parse_request(packet)
        except BadMessage as error:
            said = str(error)
            request = None
        if request is None:
            assert said.isprintable(), said
            assert len(said) < 200, said
            return False
        answer = self.relays.handle(request, send, self.now)
        if answer is not None:
            text = emit(answer)
            assert len(text) < MAX_MESSAGE
            assert text.decode().isprintable()
        now = {flow.id: flow for flow in self.nat.workers}
        after = self.seen()
        for flow_id, was in before.items():
            if flow_id not in now and may_go[flow_id]:
                continue
            assert after.get(flow_id) == was, (packet, was, after.get(flow_id), answer)
        for (hook, old), rewrite in tables.items():
            flow = rewrite.flow
            if flow.id in before and not may_go[flow.id]:
                assert self.nat.tables[hook, Proto.TCP].get(old) is rewrite, packet
        for flow_id in now.keys() - ids:
            flow = now[flow_id]
            if isinstance(request, Open):  # the client's SYN was seen again (NatTable.succeed)
                assert called[flow.inside, flow.gport] == flow.client, packet
            else:
                self.check_resumed(flow, request, answer)
        for at_, rewrite in self.tables().items():
            if tables.get(at_) is not rewrite:
                self.check_rewrite(rewrite, packet)
        assert len(self.nat) <= FLOWS
        if isinstance(answer, Opened):
            assert isinstance(request, Open)
            opened = self.nat.mappings.of_relay_port(request.relay)
            assert opened is not None
            assert opened.tracker.client_acked
            assert answer.server == opened.server
        return True

    def check_resumed(self, flow: Flow, request: Request, answer: object) -> None:
        """A flow that a message made."""
        assert isinstance(request, Resume), request
        assert isinstance(answer, Resumed), answer
        assert self.now < self.relays.resumable_until
        assert flow.gport is not None
        assert flow.inside is not None
        assert flow.relay is not None
        assert any(each.allows(flow.gport, flow.server, flow.source) for each in self.history)
        assert self.kernel[Endpoint(flow.service.addr, flow.gport), flow.inside] == BAD
        assert self.kernel[flow.relay, flow.server] == BAD
        assert flow.client.addr == flow.inside.addr
        assert flow.service.port == flow.server.port

    def check_rewrite(self, rewrite: Rewrite, packet: bytes) -> None:
        """What came into the tables by a message leads between whom it must."""
        flow, own = rewrite.flow, self.policy.own
        match rewrite.step:
            case Step.T1:
                assert rewrite.dst == Endpoint(flow.service.addr, flow.gport or 0), packet
                assert rewrite.old[4:8] in own
                assert int.from_bytes(rewrite.old[10:]) in (80, 443)
            case Step.T2:
                assert rewrite.old[:4] in own
                assert rewrite.dst == flow.client
            case Step.T3:
                assert rewrite.old[:4] in own, packet
                assert rewrite.dst == flow.server
                assert rewrite.src.addr in (flow.client.addr, rewrite.old[:4])
            case Step.T4:
                assert rewrite.old[:4] == flow.server.addr
                assert rewrite.dst == flow.relay
            case step:
                raise AssertionError(f"{step} by {packet!r}")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_a_hostile_tcp_relay_says_changes_nothing_but_its_own(seed: int) -> None:
    field = Field(seed)
    understood = resumed = 0
    for number in range(MESSAGES // SEEDS):
        if number % 3 == 0:
            field.live()
        flows = len(field.nat)
        understood += field.attack()
        resumed += len(field.nat) > flows
        if number % 500 == 0:
            bad = field.rng.randrange(3)
            field.relays.lost(field.bad[bad], field.now)
            field.bad[bad] = field.join(BAD)
    assert len(field.relays.totals) <= len(GAUGES + COUNTERS) + GONE_KEPT * MAX_COUNTS
    assert all(name.isprintable() for name in field.relays.totals)
    assert understood > MESSAGES // SEEDS / 2
    assert resumed, "it was a test of resuming as well"
