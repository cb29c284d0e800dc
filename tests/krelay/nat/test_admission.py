"""Which new flows are admitted, and which go for them: against a list that is searched."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from knet.endpoint import Endpoint, Proto, Source, flow_key
from krelay.nat.admission import AT_ONCE, LAST_PACKETS, ONE_SIDED, TRIMMED, FlowLimits, Refusal
from krelay.nat.flow import EXCHANGE, Flow, Timeouts
from krelay.nat.table import NatTable
from krelay.steps import Side
from tests.tools.packets import ACK, SYN, addr, at, policy
from tests.tools.script import Host

HOSTS = "CDN"
KINDS = (
    "query", "datagram", "answered", "half-open", "forwarded", "one-sided", "over",
    "talk", "connection", "through", "closed",
)  # fmt: skip
UNCONFIRMED = ("datagram", "answered", "half-open", "forwarded", "one-sided")
RELAYED = ("half-open", "connection", "closed")
UDP = ("query", "datagram", "answered", "one-sided", "talk")
SILENT = {"one-sided": ONE_SIDED, "over": LAST_PACKETS}
"""Seconds for which these must have been silent to go."""


@dataclass(eq=False)
class Known:
    """A flow as the model has it: of which host, what it is, and since when."""

    host: str
    kind: str
    since: float


@dataclass
class Model:
    """All flows, the oldest first."""

    limits: FlowLimits
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
        tiers = ("query",), UNCONFIRMED, ("over",)
        for tier in tiers:
            found = [
                flow_id
                for flow_id, flow in self.flows.items()
                if flow.kind in tier and flow.kind in kinds and flow.host in hosts
                and now - flow.since >= SILENT.get(flow.kind, 0)
            ]  # fmt: skip
            if found:
                del self.flows[min(found)]
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
        live, udp = self.live(), self.live(UDP)
        needed = live - limits.flows + 1
        if kind in UDP:
            needed = max(needed, udp - self.udp_most + 1)
            if live >= self.udp_most and surplus <= 0:
                needed = max(needed, 1)
            if udp >= self.udp_most or live - udp <= limits.flows // 4:
                kinds = UDP
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
        closed = [(flow.since, i) for i, flow in self.flows.items() if flow.kind == "closed"]
        for _, oldest in sorted(closed):
            if len(self.flows) > self.limits.flows:
                del self.flows[oldest]
        for _ in range(min(TRIMMED, self.live() - self.limits.flows)):
            if not self.evict(now, KINDS):
                break


class Both:
    """A table and its model, to which the same happens."""

    def __init__(self, limits: FlowLimits) -> None:
        self.nat = NatTable(limits, Timeouts(udp_dns=10**6, udp=10**6), rng=Random(1))
        self.nat.dns_flows.learns(frozenset({addr("K")}), addr("S"))
        self.model = Model(limits)
        self.now = 100.0
        self._ports = count(5000)

    def set(self, limits: FlowLimits) -> None:
        """Other limits are in force."""
        self.nat.limits = self.model.limits = limits

    def begins(self, kind: str, host: str) -> str:
        """A new flow of this kind is to begin; returns why it is refused."""
        client = Endpoint(addr(host), next(self._ports))
        expected = self.model.refusal(kind, host, self.now)
        before = {flow.id for flow in self.nat}
        said = ""
        try:
            self._begin(kind, client)
        except Refusal as refusal:
            said = refusal.reason
        begun = {flow.id for flow in self.nat} - before
        assert (len(begun), said) == (
            int(not expected),
            "" if kind == "query" else expected,  # a query goes on, whoever knows of it
        )
        for flow_id in begun:
            self.model.flows[flow_id] = Known(host, kind, self.now)
        return expected

    def _begin(self, kind: str, client: Endpoint) -> None:
        nat, now = self.nat, self.now
        match kind:
            case "query":
                nat.learning.learn([(False, 60, flow_key(client, at("K:53")))], now)
            case "half-open":
                nat.open_tcp(client, at("K:80"), at("S:80"), Source.CLIENT, 16000, now)
            case "forwarded" | "through" | "over":
                flow = self._forwarded(Proto.TCP, client, 443)
                if kind != "forwarded":
                    flow.tracker.resumed()
                if kind == "over":
                    flow.tracker.client_ended = flow.tracker.server_ended = True
                nat.tracking.changed(flow)
            case "datagram" | "answered" | "one-sided" | "talk":
                flow = self._forwarded(Proto.UDP, client, 7)
                there, back = flow.by(Side.CLIENT), flow.by(Side.SERVER)
                assert there is not None
                assert back is not None
                if kind != "datagram":
                    flow.answered_at = now
                if kind == "one-sided":
                    flow.answered_at = now - EXCHANGE
                    nat.admission.confirmed(flow)  # found out at once, or their order is open
                if kind == "talk":
                    nat.tracking.heard(there, 1, 30, now)
            case "connection" | "closed":
                flow = nat.open_tcp(client, at("K:80"), at("S:80"), Source.CLIENT, 16000, now)
                nat.attach(flow, at(f"K:{client.port + 10_000}"), now)
                flow.accepted = True
                if kind == "closed":
                    nat.close(flow, now)

    def _forwarded(self, proto: Proto, client: Endpoint, port: int) -> Flow:
        service, server = Endpoint(addr("K"), port), Endpoint(addr("S"), port)
        return self.nat.open_forwarded(proto, client, service, server, Source.CLIENT, self.now)

    def agree(self) -> None:
        assert sorted(flow.id for flow in self.nat) == sorted(self.model.flows)
        assert self.nat.admission.evicted == self.model.evicted
        assert self.nat.admission._udp + len(self.nat.dns_flows) == self.model.live(UDP)


verbs = st.tuples(
    st.sampled_from((*KINDS, *KINDS, "wait", "end", "set", "tick")), st.sampled_from(HOSTS)
)
some_limits = st.builds(
    FlowLimits, st.integers(1, 12), st.integers(1, 5), st.sampled_from((0, 0, 0, 2))
)


@settings(max_examples=600)
@given(limits=st.lists(some_limits, min_size=1, max_size=3), script=st.lists(verbs, max_size=60))
def test_who_is_refused_and_who_goes_is_as_a_list_would_have_it(
    limits: list[FlowLimits], script: list[tuple[str, str]]
) -> None:
    both, lowered = Both(limits[0]), False
    for verb, host in script:
        if verb == "wait":
            seconds = (0.75, 2.0, 9.0)[HOSTS.index(host)]
            both.now += seconds
            both.model.waits(seconds)
        elif verb == "end":
            mine = next((i for i, flow in both.model.flows.items() if flow.host == host), None)
            flow = both.nat.get(mine) if mine is not None else None
            if mine is not None and flow is not None:
                both.nat.end(flow)
                del both.model.flows[mine]
        elif verb == "set":
            rate = limits[0].new_flows_per_client
            both.set(limits[HOSTS.index(host) % len(limits)]._replace(new_flows_per_client=rate))
            lowered = True
        elif verb == "tick":
            both.nat.admission.trim(both.now)
            both.model.trim(both.now)
        else:
            event(both.begins(verb, host) or "begun")
        both.agree()
        if not lowered:
            assert len(both.nat) <= both.nat.limits.flows
            assert both.model.live(UDP) <= both.model.udp_most


@pytest.mark.parametrize("kind", [*UNCONFIRMED, "query", "over"])
def test_nobody_loses_a_flow_for_a_client_that_has_too_many_itself(kind: str) -> None:
    both = Both(FlowLimits(flows=99, flows_per_client=2))
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
    both = Both(FlowLimits())
    for kind in KINDS:
        both.begins(kind, "C")
    for flow in both.nat:
        if flow.proto is Proto.TCP:
            flow.tracker.saw(Side.SERVER, SYN | ACK)
            flow.tracker.saw(Side.CLIENT, ACK)
        flow.answered_at = None
        flow.spoke_again = True
    both.nat.expire(both.now + 64)

    admission = both.nat.admission
    spares = admission._datagrams, admission._relayed, admission._forwarded
    assert [len(spare) for spare in spares] == [0, 0, 0]
    assert both.nat.admission.unconfirmed == len(both.nat.dns_flows) == 1


# Floods, for so long that a flow's timeout is over several times

FLOODS = {
    "unanswered": ["0 pre {} > K:7"],
    "answered": ["0 pre {} > K:7", "0 post S:7 > {}"],
    "answered late": ["0 pre {} > K:7", "3 post S:7 > {}"],
    "asked twice at once": [
        "0 pre {} > K:7", "0 pre {} > K:7", "0 post S:7 > {}", "0 post S:7 > {}",
    ],
    "answered again and again": [
        "0 pre {} > K:7", "0 post S:7 > {}", "1 post S:7 > {}", "3 post S:7 > {}",
    ],
    "query": ["0 pre {} > K:53", "0 post S:53 > {}", "0 pre {} > K:53"],
    "SYN": ["0 pre {} > K:80 [S]", "0 post K:16000 > {} [S.]"],
    "SYN, acknowledged by a guess": [
        "0 pre {} > K:80 [S]", "0 pre {} > K:80 [.]", "0 post K:16000 > {} [R]",
    ],
    "forwarded SYN": ["0 pre {} > K:443 [S]", "0 post S:443 > {} [S.]"],
    "forwarded SYN, reset by the client": [
        "0 pre {} > K:443 [S]", "0 post S:443 > {} [S.]", "0 pre {} > K:443 [R]",
    ],
}  # fmt: skip
CONFIRMED = ["0 pre {} > K:7", "0 post S:7 > {}", "0 pre {} > K:7"]
"""What a forger can do with a second datagram."""
EVERY = 0.5
"""Seconds between the beginnings of a flood's flows: a timeout of UDP is 600 of them."""


class Flood:
    """So many flows, one each EVERY seconds, from as many addresses or all in one client's name."""

    def __init__(self, host: Host, packets: list[str], name: str = "") -> None:
        self.host = host
        self.now = 0.0
        self._packets = packets
        self._name = name
        self._begun = 0
        self._coming: list[tuple[float, int, str, str]] = []

    def run(self, flows: int) -> None:
        """The next flows, and what is due of those before."""
        for _ in range(flows):
            number = self._begun = self._begun + 1
            addr = self._name or f"10.9.{number // 250}.{1 + number % 250}"
            client = f"{addr}:{1024 + number}"
            for order, line in enumerate(self._packets):
                wait, verb, text = line.format(client).split(None, 2)
                when = self.now + float(wait)
                heapq.heappush(self._coming, (when, 10 * number + order, verb, text))
            self.now += EVERY
            while self._coming and self._coming[0][0] <= self.now:
                when, _, verb, text = heapq.heappop(self._coming)
                self.host.run(when, verb, text)

    def served(self, host: str, port: int) -> dict[str, bool]:
        """Which services a client gets: a connection, a forwarded one, datagrams and a query.

        The server takes a moment for each, in which others' flows begin.
        """
        client, relay = f"{host}:{port}", f"K:{20_000 + port}"
        asked = {
            "tcp": self._gets(f"{client} > K:80 [S]", f"K:16000 > {client} [S.]"),
            "forwarded": self._gets(f"{client} > K:443 [S]", f"S:443 > {client} [S.]"),
            "udp": self._gets(f"{client} > K:7", f"S:7 > {client}"),
            "query": self._gets(f"{client} > K:53", f"S:53 > {client}"),
        }
        if asked["tcp"]:
            self.host.run(self.now, "pre", f"{client} > K:80 [.]")
            opened = self.host.run(self.now, "open", f"{client} @16000 from {relay}")
            asked["tcp"] = opened == "S:80 client"
            self.host.run(self.now, "close", relay)
        return asked

    def _gets(self, request: str, answer: str) -> bool:
        if ">" not in self.host.run(self.now, "pre", request).partition("+")[0]:
            return False
        self.run(3)
        return ">" in self.host.run(self.now, "post", answer)


ALL = {"tcp": True, "forwarded": True, "udp": True, "query": True}


def flooded(packets: list[str], name: str = "", **limits: int) -> Flood:
    """Relaying TCP, forwarded TCP and UDP."""
    host = Host(
        policy(tcp=frozenset({80, 443}), forwarded=frozenset({443}), udp=frozenset({7, 53}))
    )
    host.nat.limits = FlowLimits(**limits)
    return Flood(host, packets, name)


@pytest.mark.parametrize("kind", FLOODS)
def test_no_flood_from_forged_addresses_keeps_anybody_out(kind: str) -> None:
    flood = flooded(FLOODS[kind], flows=240)
    confirmed = [("D:7000", "K:7"), ("D:7001", "K:7")]
    for client, service in confirmed:
        for verb, text in (("pre", "{0} > {1}"), ("post", "S:7 > {0}"), ("pre", "{0} > {1}")):
            flood.host.run(0, verb, text.format(client, service))
    for port in range(5000, 5012):
        flood.run(150)
        assert flood.served("D", port) == ALL
        assert flood.served("C", port) == ALL
        for client, service in confirmed:
            assert flood.host.run(flood.now, "post", f"S:7 > {client}") == f"{service} > {client}"
    counts = flood.host.worker.counts
    assert {"table_full", "client_full"}.isdisjoint(counts.dropped)
    assert flood.host.nat.admission.evicted > 1000 or kind == "query"  # it fills no table so slowly
    assert len(flood.host.nat) <= 240


@pytest.mark.parametrize("kind", FLOODS)
def test_no_flood_in_a_clients_name_keeps_it_from_anything(kind: str) -> None:
    flood = flooded(FLOODS[kind], "D", flows_per_client=60)
    for port in range(500, 512):
        flood.run(90)
        assert flood.served("D", port) == ALL
        assert flood.served("C", port) == ALL
    assert {"table_full", "client_full"}.isdisjoint(flood.host.worker.counts.dropped)
    assert len(flood.host.nat) <= 2 * 60 + 12 * 8


def test_queries_forged_in_a_clients_name_behind_those_of_many_keep_it_from_nothing() -> None:
    """The kernel has learnt them: the client's own are not among the oldest of all."""
    flood = flooded([], flows=2000, flows_per_client=100)
    nat = flood.host.nat
    nat.dns_flows.learns(frozenset({addr("K")}), addr("S"))
    for name, number in (("10.9.9.{}", 200), ("D", 300)):
        clients = [f"{name.format(1 + n % 250)}:{2000 + n}" for n in range(number)]
        keys = [flow_key(at(client), at("K:53")) for client in clients]
        nat.learning.learn([(False, 60, key) for key in keys], flood.now)
    assert nat.dns_flows.of_client(addr("D")) == 100
    for port in range(500, 510):
        assert flood.served("D", port) == ALL
    assert nat.dns_flows.of_client(addr("D")) <= 100


def test_what_a_forger_confirms_takes_no_connection_from_anybody() -> None:
    flood = flooded(CONFIRMED, flows=240)
    for port in range(5000, 5012):
        flood.run(150)
        served = flood.served("D", port)
        assert (served["tcp"], served["forwarded"]) == (True, True)
        assert flood.host.nat.count(Proto.UDP) <= 180
    flood.now += 301
    assert flood.served("D", 6000) == ALL


def test_what_a_forger_confirms_in_a_clients_name_takes_none_of_its_connections() -> None:
    flood = flooded(CONFIRMED, "D", flows_per_client=60)
    for port in range(500, 512):
        flood.run(90)
        assert flood.served("D", port)["tcp"]
        assert flood.served("C", port) == ALL


def test_floods_of_datagrams_and_connections_together_leave_a_quarter_to_tcp() -> None:
    """Datagrams that are confirmed don't creep into the places of half-open connections."""
    both = [*CONFIRMED, "0 pre {} > K:80 [S]"]
    flood = flooded(both, flows=240)
    for port in range(5000, 5012):
        flood.run(150)
        assert flood.host.nat.count(Proto.UDP) <= 180
        assert flood.served("D", port)["tcp"]


def test_unconfirmed_flows_keep_their_timeout_while_there_is_room() -> None:
    """RFC 4787, REQ-5: a server may answer late."""
    host = flooded([], flows=4).host
    host.run(0, "pre", "C:1 > K:7")
    host.run(0, "pre", "C:2 > K:7")
    assert host.run(299, "post", "S:7 > C:1") == "K:7 > C:1"
    assert [str(flow.client.port) for flow in host.nat] == ["1", "2"]
    host.run(301, "pre", "C:3 > K:7")
    assert [str(flow.client.port) for flow in host.nat] == ["1", "3"]


# Limits that are lowered


@pytest.mark.parametrize("kind", FLOODS)
def test_a_limit_lowered_in_a_flood_serves_new_flows_at_once(kind: str) -> None:
    flood = flooded(FLOODS[kind])
    for port in range(5000, 5020):
        flood.host.run(0, "pre", f"D:{port} > K:7")
        flood.host.run(0, "post", f"S:7 > D:{port}")
        flood.host.run(0, "pre", f"D:{port} > K:7")
    flood.run(400)
    before = len(flood.host.nat)
    flood.host.nat.limits = FlowLimits(flows=60, flows_per_client=30)
    assert flood.served("C", 5000) == ALL
    flood.host.nat.expire(flood.now)
    assert len(flood.host.nat) <= 60 < before or kind == "query"
    assert sum(flow.spoke_again for flow in flood.host.nat) == 20
    flood.run(40)
    assert flood.served("C", 5001) == ALL
    flood.host.nat.limits = FlowLimits(flows=90, flows_per_client=30)
    flood.run(90)
    assert flood.served("C", 5002) == ALL
    assert len(flood.host.nat) > 60 or kind == "query"


def test_a_clients_limit_lowered_in_a_flood_serves_it_at_once() -> None:
    flood = flooded(FLOODS["answered"], "D")
    flood.run(400)
    flood.host.nat.limits = FlowLimits(flows_per_client=10)
    for port in range(500, 508):
        assert flood.served("D", port) == ALL
    flood.run(60)
    assert len(flood.host.nat) <= 10 + 8


def test_where_confirmed_flows_are_beyond_a_lowered_limit_none_begins_and_none_ends() -> None:
    flood = flooded(CONFIRMED)
    flood.run(50)
    flood.host.nat.limits = FlowLimits(flows=40)
    flood.run(50)
    flood.host.nat.expire(flood.now)
    assert flood.host.nat.count(Proto.UDP) == 50
    assert flood.served("C", 5000) == dict.fromkeys(ALL, False)
    flood.host.nat.limits = FlowLimits(flows=200)
    assert flood.served("C", 5000) == ALL


def test_closed_flows_beyond_a_lowered_limit_go_first() -> None:
    both = Both(FlowLimits(flows=40))
    for _ in range(20):
        for kind in ("datagram", "closed"):
            both.begins(kind, "C")
    both.set(FlowLimits(flows=20))
    both.nat.expire(both.now)
    both.model.trim(both.now)
    both.agree()
    assert both.model.live() == len(both.nat) == 20
    assert both.nat.admission.evicted == 0


def test_more_than_is_evicted_at_a_time_goes_by_and_by() -> None:
    both = Both(FlowLimits())
    for _ in range(3 * TRIMMED):
        both.nat.open_forwarded(
            Proto.UDP, Endpoint(addr("C"), next(both._ports)), at("K:7"), at("S:7"),
            Source.CLIENT, both.now,
        )  # fmt: skip
    both.nat.limits = FlowLimits(flows=TRIMMED // 2)
    sizes = []
    for _ in range(4):
        both.nat.expire(both.now)
        sizes.append(len(both.nat))
    assert sizes == [2 * TRIMMED, TRIMMED, TRIMMED // 2, TRIMMED // 2]


# Ports of the relay's own


def test_where_all_ports_are_taken_the_oldest_unconfirmed_flow_gives_up_its_own() -> None:
    nat = NatTable(FlowLimits(70_000, 70_000), rng=Random(1))

    def begin(client: Endpoint) -> Flow:
        return nat.open_forwarded(
            Proto.UDP, client, at("K:7"), at("S:7"), Source.RELAY, 0.0, relay_addr=addr("K")
        )

    free = nat.mappings._relay_ports[Proto.UDP]
    taken = [begin(Endpoint(addr("D"), 5000 + number)) for number in range(4)]
    while free.take(addr("K"), 1024, lambda port: True) is not None:
        pass
    taken[0].spoke_again = True
    first = begin(at("C:6000"))
    assert [flow.id for flow in nat] == [taken[0].id, *(flow.id for flow in taken[2:]), first.id]
    assert nat.admission.evicted == 1
    for flow in nat:
        flow.spoke_again = True
    with pytest.raises(Refusal, match="no_port"):
        begin(at("C:6001"))
