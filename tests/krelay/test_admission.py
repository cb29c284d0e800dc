"""Who may begin a row, and whose goes for it: against a list that is searched from the start."""

from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from krelay.admission import Limits, Refusal
from krelay.flow import Endpoint, Proto, Source
from krelay.nat import NatTable
from krelay.overload import EARLY
from krelay.row import Hook, Timeouts
from krelay.tracker import Side
from tests.tools.packets import ACK, FIN, SYN, addr, at, template

HOSTS = "CDN"
KINDS = ("question", "half-open", "over", "conversation", "closed")
GOES_FIRST = ("question", "half-open", "over")


@dataclass(eq=False)
class Known:
    """A row as the model has it: of which host, what it is, and since when."""

    host: str
    kind: str
    since: float


@dataclass
class Model:
    """All rows, the oldest first."""

    limits: Limits
    rows: dict[int, Known] = field(default_factory=dict)
    ended_early: int = 0
    allowance: dict[str, float] = field(default_factory=dict)
    """Rows that a client may begin at once."""

    def counted(self, host: str = HOSTS) -> int:
        return sum(row.host in host for row in self.rows.values() if row.kind != "closed")

    def waits(self, seconds: float) -> None:
        """So much time goes by."""
        rate = self.limits.new_flows_per_client
        for host, left in self.allowance.items():
            self.allowance[host] = min(rate, left + rate * seconds)

    def end_one(self, hosts: str, now: float) -> None:
        for kind in GOES_FIRST:
            mine = [(i, row) for i, row in self.rows.items() if row.host in hosts]
            found = [
                (row.since, i)
                for i, row in mine
                if row.kind == kind and (kind == "question" or row.since <= now - EARLY)
            ]
            if found:
                del self.rows[min(found)[1]]
                self.ended_early += 1
                return

    def refusal(self, host: str, now: float) -> str:
        """Why this host may begin none, or nothing: then there is room for one."""
        rate = self.limits.new_flows_per_client
        if rate and self.allowance.setdefault(host, rate) < 1:
            return "client_rate"
        if self.counted(host) >= self.limits.flows_per_client:
            self.end_one(host, now)
        if self.counted(host) >= self.limits.flows_per_client:
            return "client_full"
        if self.counted() >= self.limits.flows:
            self.end_one(HOSTS, now)
        if self.counted() >= self.limits.flows:
            return "table_full"
        if len(self.rows) >= self.limits.flows:
            closed = [(row.since, i) for i, row in self.rows.items() if row.kind == "closed"]
            del self.rows[min(closed)[1]]
        if rate:
            self.allowance[host] -= 1
        return ""


class Both:
    """A table and its model, to which the same happens."""

    def __init__(self, limits: Limits) -> None:
        self.nat = NatTable(limits, Timeouts(udp_dns=10**6), rng=Random(1))
        self.nat.learnt.learns(frozenset({addr("K")}), addr("S"))
        self.model = Model(limits)
        self.now = 100.0
        self._ports = count(5000)

    def begins(self, kind: str, host: str) -> str:
        """A new row of this kind is to begin; returns why it is refused."""
        client = Endpoint(addr(host), next(self._ports))
        expected = self.model.refusal(host, self.now)
        before = {row.id for row in self.nat}
        said = ""
        try:
            self._begin(kind, client)
        except Refusal as refusal:
            said = refusal.reason
        begun = {row.id for row in self.nat} - before
        assert (len(begun), said) == (
            int(not expected),
            "" if kind == "question" else expected,  # a question goes on, whoever knows of it
        )
        for row_id in begun:
            self.model.rows[row_id] = Known(host, kind, self.now)
        return expected

    def _begin(self, kind: str, client: Endpoint) -> None:
        nat, now = self.nat, self.now
        match kind:
            case "question":
                head = template(f"{client} > K:53").build()[:28]
                nat.learn([(int(Hook.PREROUTING), head)], now)
            case "half-open":
                nat.open_tcp(client, at("K:80"), at("S:80"), Source.CLIENT, 16000, now)
            case "over":
                row = nat.open_forwarded(
                    Proto.TCP, client, at("K:443"), at("S:443"), Source.CLIENT, now
                )
                for side in (Side.CLIENT, Side.SERVER):
                    row.tracker.saw(side, FIN | ACK)
                nat.changed(row)
            case "conversation" | "closed":
                row = nat.open_tcp(client, at("K:80"), at("S:80"), Source.CLIENT, 16000, now)
                nat.attach(row, at(f"K:{client.port + 10_000}"), now)
                row.accepted = True
                if kind == "closed":
                    nat.close(row, now)

    def agree(self) -> None:
        assert sorted(row.id for row in self.nat) == sorted(self.model.rows)
        assert len(self.nat) == len(self.model.rows) <= max(1, self.nat.limits.flows)
        assert self.nat.ended_early == self.model.ended_early


@settings(max_examples=500)
@given(
    limits=st.builds(Limits, st.integers(1, 7), st.integers(1, 5), st.sampled_from((0, 0, 0, 2))),
    script=st.lists(
        st.tuples(st.sampled_from((*KINDS, "wait", "end")), st.sampled_from(HOSTS)), max_size=40
    ),
)
def test_who_is_refused_and_who_goes_is_as_a_list_would_have_it(
    limits: Limits, script: list[tuple[str, str]]
) -> None:
    both = Both(limits)
    for verb, host in script:
        if verb == "wait":
            seconds = 0.75 * (1 + HOSTS.index(host))
            both.now += seconds
            both.model.waits(seconds)
        elif verb == "end":
            mine = next((i for i, row in both.model.rows.items() if row.host == host), None)
            row = both.nat.get(mine) if mine is not None else None
            if mine is not None and row is not None:
                both.nat.end(row)
                del both.model.rows[mine]
        else:
            event(both.begins(verb, host) or "begun")
        both.agree()


@pytest.mark.parametrize("kind", GOES_FIRST)
def test_nobody_loses_a_row_for_a_client_that_has_too_many_itself(kind: str) -> None:
    both = Both(Limits(flows=3, flows_per_client=2))
    both.begins(kind, "D")
    for _ in range(2):
        both.begins("conversation", "C")
    both.now += EARLY
    for refused in ("half-open", "question"):
        assert both.begins(refused, "C") == "client_full"
    both.agree()
    assert both.begins("half-open", "N") == ""
    assert [row.host for row in both.model.rows.values()] == ["C", "C", "N"]
    both.agree()


def test_a_row_that_has_become_a_conversation_is_remembered_for_nothing() -> None:
    both = Both(Limits())
    for kind in KINDS:
        both.begins(kind, "C")
    for row in both.nat:
        if row.proto is Proto.TCP:
            row.tracker.saw(Side.SERVER, SYN | ACK)
    both.nat.expire(both.now + 64)

    assert len(both.nat._admission._tentative) == 0
