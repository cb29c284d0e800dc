"""Which flow is evicted: against a slow twin, and as fast with many as with few."""

import time
from operator import attrgetter
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from knet.endpoint import Endpoint, Source
from krelay.nat.eviction import LOOKS, Spare
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from tests.tools.packets import addr, at

C, D = b"\x0a\0\0\x01", b"\x0a\0\0\x02"


@pytest.fixture
def nat() -> NatTable:
    return NatTable(rng=Random(1))


QUIET = 2.0


def spare(quiet: float = 0.0) -> Spare:
    return Spare(attrgetter("is_unconfirmed"), attrgetter("is_confirmed"), quiet)


def flows(nat: NatTable, count: int) -> list[Flow]:
    """Half-open connections, a second between each and the next."""
    return [
        nat.open_tcp(at(f"C:{5000 + n}"), at("K:80"), at("S:80"), Source.CLIENT, 16000, n)
        for n in range(count)
    ]


def test_the_oldest_flow_goes_first(nat: NatTable) -> None:
    spares = spare()
    first, second = flows(nat, 2)
    for flow in (first, second):
        spares.add(flow, flow.created_at)

    assert spares.oldest(1) is first
    assert spares.oldest(1) is first, "until it is taken out"
    spares.discard(first)
    spares.discard(first)
    assert spares.oldest(1) is second


def test_a_flow_that_must_be_silent_stays_until_it_has_been(nat: NatTable) -> None:
    spares = spare(QUIET)
    first, second = flows(nat, 2)
    for flow in (first, second):
        spares.add(flow, flow.created_at)

    assert spares.oldest(QUIET - 0.1) is None
    assert spares.oldest(QUIET) is first
    first.rewrites[min(first.rewrites)].seen_at = 9
    assert spares.oldest(10) is second, "the other has been heard of"
    spares.discard(second)
    assert spares.oldest(10) is None
    assert spares.oldest(10 + QUIET) is first


def test_flows_that_have_been_confirmed_leave_a_few_at_a_time(nat: NatTable) -> None:
    left: list[Flow] = []
    spares = Spare(attrgetter("is_unconfirmed"), attrgetter("is_confirmed"), 0.0, left.append)
    all_flows = flows(nat, 2 * LOOKS + 1)
    for flow in all_flows:
        spares.add(flow, 0)
        flow.accepted = flow is not all_flows[-1]

    assert spares.oldest(1000) is None
    assert spares.oldest(1000) is None
    assert spares.oldest(1000) is all_flows[-1]
    assert len(spares) == 1
    assert left == all_flows[:-1]


def test_each_client_has_an_oldest_flow_of_its_own(nat: NatTable) -> None:
    spares = spare()
    first, second = (
        nat.open_tcp(at(f"{host}:5000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
        for host in "CD"
    )
    for flow in (first, second):
        spares.add(flow, 0)

    assert [spares.oldest(9, flow.client.addr) for flow in (first, second)] == [first, second]
    spares.discard(second)
    assert spares.oldest(9, second.client.addr) is None
    assert len(spares._of) == len(spares) == 1


@settings(max_examples=300)
@given(
    script=st.lists(
        st.tuples(st.sampled_from(("add", "waits", "goes", "oldest", "oldest of", "leaves")),
                  st.integers(0, 5)),
        max_size=80,
    )
)  # fmt: skip
def test_the_order_is_that_of_a_list(script: list[tuple[str, int]]) -> None:
    """Those that are looked at and may not go are the last from then on."""
    nat, spares, twin = NatTable(rng=Random(1)), spare(), list[Flow]()

    def oldest(client: bytes | None) -> Flow | None:
        for flow in [flow for flow in twin if client in (None, flow.client.addr)]:
            if flow.is_unconfirmed:
                return flow
            twin.remove(flow)
            twin.append(flow)
        return None

    for step, (verb, number) in enumerate(script):
        client = addr("CD"[number % 2])
        match verb:
            case "add":
                end = Endpoint(client, 5000 + step)
                flow = nat.open_tcp(end, at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
                spares.add(flow, 0)
                twin.append(flow)
            case "waits" | "goes" if number < len(twin):
                twin[number].tracker.client_acked = verb == "waits"
            case "leaves" if number < len(twin):
                spares.discard(twin.pop(number))
            case "oldest":
                assert unless_all_wait(spares.oldest(0), twin) is oldest(None)
            case "oldest of":
                mine = [flow for flow in twin if flow.client.addr == client]
                assert unless_all_wait(spares.oldest(0, client), mine) is oldest(client)
        assert len(spares) == len(twin)
        assert spares._of.keys() == {flow.client.addr for flow in twin}


def unless_all_wait(found: Flow | None, among: list[Flow]) -> Flow | None:
    """Where none may go all are looked at again and again, which leaves the order open."""
    assume(any(flow.is_unconfirmed for flow in among) or not among)
    return found


@pytest.mark.serial
def test_the_first_of_many_is_found_as_fast_as_the_first_of_few(nat: NatTable) -> None:
    """Where each that comes takes the place of the oldest, in a table of any size."""
    costs = []
    for size in (100, 20_000):
        spares, all_flows = spare(), flows(nat, size + 4000)
        for flow in all_flows[:size]:
            spares.add(flow, 0)
        began = time.perf_counter()
        for flow in all_flows[size:]:
            oldest = spares.oldest(0)
            assert oldest is not None
            spares.discard(oldest)
            spares.add(flow, 0)
        costs.append(time.perf_counter() - began)
        nat.clear()
    assert costs[1] < 4 * costs[0]
