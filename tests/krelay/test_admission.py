"""Which new flows are admitted, and which go for them: against a list that is searched."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from krelay.admission import AT_ONCE, LAST_PACKETS, ONE_SIDED, TRIMMED, Limits, Refusal
from krelay.flow import Endpoint, Proto, Source
from krelay.nat import NatTable
from krelay.row import EXCHANGE, Hook, Row, Timeouts
from krelay.tracker import Side
from tests.tools.packets import ACK, FIN, SYN, addr, at, template

HOSTS = "CDN"
KINDS = (
    "query", "datagram", "answered", "half-open", "forwarded", "one-sided", "over",
    "talk", "connection", "through", "closed",
)  # fmt: skip
UNCONFIRMED = ("datagram", "answered", "half-open", "forwarded")
RELAYED = ("half-open", "connection", "closed")
UDP = ("query", "datagram", "answered", "one-sided", "talk")
SILENT = {"one-sided": ONE_SIDED, "over": LAST_PACKETS}
"""Seconds for which one must have been silent to go."""


@dataclass(eq=False)
class Known:
    """A flow as the model has it: of which host, what it is, and since when."""

    host: str
    kind: str
    since: float


@dataclass
class Model:
    """All flows, the oldest first."""

    limits: Limits
    flows: dict[int, Known] = field(default_factory=dict)
    evicted: int = 0
    allowance: dict[str, float] = field(default_factory=dict)
    """Flows that a client may begin at once."""

    def live(self, kinds: Iterable[str] = KINDS, host: str = HOSTS) -> int:
        return sum(
            flow.kind in kinds and flow.host in host
            for flow in self.flows.values()
            if flow.kind != "closed"
        )

    @property
    def udp_most(self) -> int:
        """A quarter, rounded down, is TCP's."""
        return self.limits.flows - self.limits.flows // 4

    def waits(self, seconds: float) -> None:
        """So much time goes by."""
        rate = self.limits.new_flows_per_client
        for host, left in self.allowance.items():
            self.allowance[host] = min(rate, left + rate * seconds)

    def evict(self, now: float, kinds: Iterable[str], hosts: str = HOSTS) -> bool:
        """Ends the first that may go, in the order of the docstring; whether there was one."""
        tiers = ("query",), UNCONFIRMED, ("one-sided",), ("over",)
        for tier in tiers:
            found = [
                row_id
                for row_id, flow in self.flows.items()
                if flow.kind in tier and flow.kind in kinds and flow.host in hosts
                and now - flow.since >= SILENT.get(flow.kind, 0)
            ]  # fmt: skip
            if found:
                first = min(found, key=lambda each: (self.flows[each].since, each))
                del self.flows[first if tier[0] in SILENT else min(found)]
                self.evicted += 1
                return True
        return False

    def evicts(self, surplus: int, now: float, kinds: Iterable[str], hosts: str = HOSTS) -> bool:
        """Ends so many, or as many as may be at once; whether there are enough."""
        return all(self.evict(now, kinds, hosts) for _ in range(min(surplus, AT_ONCE)))

    def refusal(self, kind: str, host: str, now: float) -> str:
        """Why this host may begin none, or nothing: then there is room for one."""
        limits = self.limits
        rate = limits.new_flows_per_client
        if rate and self.allowance.setdefault(host, rate) < 1:
            return "client_rate"
        budget = [each for each in KINDS if (each in RELAYED) == (kind in RELAYED)]
        surplus = self.live(budget, host) - limits.flows_per_client + 1
        if surplus > 0 and not self.evicts(surplus, now, budget, host):
            return "client_full"
        kinds: tuple[str, ...] = KINDS
        needed = self.live() - limits.flows + 1
        if kind in UDP and self.live(UDP) >= self.udp_most:
            needed, kinds = max(needed, self.live(UDP) - self.udp_most + 1), UDP
        elif kind in UDP and self.live() >= self.udp_most and surplus <= 0:
            needed = max(needed, 1)
        if not self.evicts(needed, now, kinds):
            return "table_full"
        self.end_closed()
        if rate:
            self.allowance[host] -= 1
        return ""

    def end_closed(self) -> None:
        closed = [(flow.since, i) for i, flow in self.flows.items() if flow.kind == "closed"]
        for _, oldest in sorted(closed)[:AT_ONCE]:
            if len(self.flows) >= self.limits.flows:
                del self.flows[oldest]

    def trim(self, now: float) -> None:
        for _ in range(min(TRIMMED, self.live() - self.limits.flows)):
            if not self.evict(now, KINDS):
                break


class Both:
    """A table and its model, to which the same happens."""

    def __init__(self, limits: Limits) -> None:
        self.nat = NatTable(limits, Timeouts(udp_dns=10**6, udp=10**6), rng=Random(1))
        self.nat.learnt.learns(frozenset({addr("K")}), addr("S"))
        self.model = Model(limits)
        self.now = 100.0
        self._ports = count(5000)

    def set(self, limits: Limits) -> None:
        """Other limits are in force."""
        self.nat.limits = self.model.limits = limits

    def begins(self, kind: str, host: str) -> str:
        """A new flow of this kind is to begin; returns why it is refused."""
        client = Endpoint(addr(host), next(self._ports))
        expected = self.model.refusal(kind, host, self.now)
        before = {row.id for row in self.nat}
        said = ""
        try:
            self._begin(kind, client)
        except Refusal as refusal:
            said = refusal.reason
        begun = {row.id for row in self.nat} - before
        assert (len(begun), said) == (
            int(not expected),
            "" if kind == "query" else expected,  # a query goes on, whoever knows of it
        )
        for row_id in begun:
            self.model.flows[row_id] = Known(host, kind, self.now)
        return expected

    def _begin(self, kind: str, client: Endpoint) -> None:
        nat, now = self.nat, self.now
        match kind:
            case "query":
                head = template(f"{client} > K:53").build()[:28]
                nat.learn([(int(Hook.PREROUTING), head)], now)
            case "half-open":
                nat.open_tcp(client, at("K:80"), at("S:80"), Source.CLIENT, 16000, now)
            case "forwarded" | "through" | "over":
                row = self._forwarded(Proto.TCP, client, 443)
                if kind != "forwarded":
                    row.tracker.saw(Side.SERVER, SYN | ACK)
                    row.tracker.saw(Side.CLIENT, ACK)
                if kind == "over":
                    for side in (Side.CLIENT, Side.SERVER):
                        row.tracker.saw(side, FIN | ACK)
                nat.changed(row)
            case "datagram" | "answered" | "one-sided" | "talk":
                row = self._forwarded(Proto.UDP, client, 7)
                there, back = row.by(Side.CLIENT), row.by(Side.SERVER)
                assert there is not None
                assert back is not None
                if kind != "datagram":
                    row.answered_at = now
                if kind == "one-sided":
                    row.answered_at = now - EXCHANGE
                if kind == "talk":
                    nat.heard(there, 1, 30, now)
            case "connection" | "closed":
                row = nat.open_tcp(client, at("K:80"), at("S:80"), Source.CLIENT, 16000, now)
                nat.attach(row, at(f"K:{client.port + 10_000}"), now)
                row.accepted = True
                if kind == "closed":
                    nat.close(row, now)

    def _forwarded(self, proto: Proto, client: Endpoint, port: int) -> Row:
        service, server = Endpoint(addr("K"), port), Endpoint(addr("S"), port)
        return self.nat.open_forwarded(proto, client, service, server, Source.CLIENT, self.now)

    def agree(self) -> None:
        assert sorted(row.id for row in self.nat) == sorted(self.model.flows)
        assert self.nat.evicted == self.model.evicted
        assert self.nat._admission._udp + len(self.nat.learnt) == self.model.live(UDP)


verbs = st.tuples(
    st.sampled_from((*KINDS, *KINDS, "wait", "end", "set", "tick")), st.sampled_from(HOSTS)
)
some_limits = st.builds(
    Limits, st.integers(1, 12), st.integers(1, 5), st.sampled_from((0, 0, 0, 2))
)


@settings(max_examples=600)
@given(limits=st.lists(some_limits, min_size=1, max_size=3), script=st.lists(verbs, max_size=60))
def test_who_is_refused_and_who_goes_is_as_a_list_would_have_it(
    limits: list[Limits], script: list[tuple[str, str]]
) -> None:
    both, lowered = Both(limits[0]), False
    for verb, host in script:
        if verb == "wait":
            seconds = (0.75, 2.0, 9.0)[HOSTS.index(host)]
            both.now += seconds
            both.model.waits(seconds)
        elif verb == "end":
            mine = next((i for i, flow in both.model.flows.items() if flow.host == host), None)
            row = both.nat.get(mine) if mine is not None else None
            if mine is not None and row is not None:
                both.nat.end(row)
                del both.model.flows[mine]
        elif verb == "set":
            rate = limits[0].new_flows_per_client
            both.set(limits[HOSTS.index(host) % len(limits)]._replace(new_flows_per_client=rate))
            lowered = True
        elif verb == "tick":
            both.nat._admission.trim(both.now)
            both.model.trim(both.now)
        else:
            event(both.begins(verb, host) or "begun")
        both.agree()
        if not lowered:
            assert len(both.nat) <= both.nat.limits.flows
            assert both.model.live(UDP) <= both.model.udp_most


@pytest.mark.parametrize("kind", [*UNCONFIRMED, "query", "one-sided", "over"])
def test_nobody_loses_a_flow_for_a_client_that_has_too_many_itself(kind: str) -> None:
    both = Both(Limits(flows=99, flows_per_client=2))
    both.begins(kind, "D")
    for _ in range(2):
        both.begins("connection", "C")
        both.begins("talk", "C")
    both.now += ONE_SIDED
    for refused in ("half-open", "query", "datagram", "forwarded"):
        assert both.begins(refused, "C") == "client_full"
    both.agree()
    assert both.begins("half-open", "N") == ""
    both.agree()


def test_a_flow_that_was_confirmed_is_remembered_for_nothing() -> None:
    both = Both(Limits())
    for kind in KINDS:
        both.begins(kind, "C")
    for row in both.nat:
        if row.proto is Proto.TCP:
            row.tracker.saw(Side.SERVER, SYN | ACK)
            row.tracker.saw(Side.CLIENT, ACK)
        row.answered_at = None
        row.spoke_again = True
    both.nat.expire(both.now + 64)

    admission = both.nat._admission
    spares = admission._datagrams, admission._relayed, admission._forwarded
    assert [len(spare) for spare in spares] == [0, 0, 0]
    assert both.nat.unconfirmed == len(both.nat.learnt) == 1
