"""What the backend has counted for flows is added to theirs, once, and by the time it says."""

from collections.abc import Iterable
from random import Random

import pytest

from knet.endpoint import Proto, Source
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.offload.accounting import NOTHING, POLLS_PER_SECOND, Accounting
from krelay.offload.layout import Counted
from krelay.steps import Step
from tests.tools.packets import at


class Books:
    """An accounting, what it was told, and flows that are installed."""

    def __init__(self, flows: int = 1) -> None:
        self.heard: list[tuple[Rewrite, int, int, float]] = []
        self.accounting = Accounting(lambda *what: self.heard.append(what))
        nat = NatTable(rng=Random(1))
        self.flows = [
            nat.open_forwarded(Proto.UDP, at(f"C:{port}"), at("K:7"), at("S:7"), Source.CLIENT, 0)
            for port in range(4000, 4000 + flows)
        ]
        for flow in self.flows:
            self.install(flow.rewrites.values())
            self.accounting.watch(flow)

    def install(self, rewrites: Iterable[Rewrite]) -> None:
        self.accounting.installed |= dict.fromkeys(rewrites, NOTHING)

    def due(self, seconds: float) -> list[Flow]:
        return self.accounting.due(seconds, self.accounting.installed.__contains__)


def test_what_came_since_the_last_reading_is_told_with_its_own_time() -> None:
    books = Books()
    rewrite = books.flows[0].rewrites[Step.U12]
    for count, now in (
        (Counted(3, 300, 5.5), 6.0), (Counted(3, 300, 5.5), 7.0), (Counted(4, 440, 8.25), 9.0),
    ):  # fmt: skip
        books.accounting.read([(rewrite, count)], now)
    assert books.heard == [(rewrite, 3, 300, 5.5), (rewrite, 1, 140, 8.25)]
    assert books.accounting.installed[rewrite] == Counted(4, 440, 8.25)


def test_no_packet_was_heard_later_than_now() -> None:
    """The kernel's clock may be read a moment after the loop's."""
    books = Books()
    rewrite = books.flows[0].rewrites[Step.U12]
    books.accounting.read([(rewrite, Counted(1, 100, 5.2))], 5.1)
    assert books.heard == [(rewrite, 1, 100, 5.1)]


def test_what_is_not_installed_any_more_is_not_read() -> None:
    books = Books()
    rewrite = books.flows[0].rewrites[Step.U34]
    del books.accounting.installed[rewrite]
    books.accounting.read([(rewrite, Counted(1, 100, 5.2))], 6)
    assert books.heard == []
    assert rewrite not in books.accounting.installed


@pytest.mark.parametrize("before", [NOTHING, Counted(2, 200, 1.0)])
def test_the_last_count_of_what_is_withdrawn_is_added_to_what_was_read(before: Counted) -> None:
    books = Books()
    rewrite = books.flows[0].rewrites[Step.U12]
    books.accounting.add(rewrite, before, Counted(2, 200, 1.0), 3)
    assert books.heard == ([] if before.packets else [(rewrite, 2, 200, 1.0)])


def test_a_count_that_another_program_has_put_back_takes_nothing_away() -> None:
    books = Books()
    rewrite = books.flows[0].rewrites[Step.U12]
    books.accounting.add(rewrite, Counted(5, 500, 1.0), Counted(2, 200, 2.0), 3)
    assert books.heard == []


def test_only_steps_that_flows_show_are_read() -> None:
    nat = NatTable(rng=Random(1))
    flow = nat.open_tcp(at("C:4000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
    nat.attach(flow, at("K:50000"), 0)
    books = Books()
    books.install(flow.rewrites.values())
    shown = [flow.rewrites[step] for step in (Step.T1, Step.T4)]
    assert books.accounting.installed_of([flow]) == shown
    del books.accounting.installed[shown[0]]
    assert books.accounting.installed_of([flow]) == shown[1:]


def test_as_many_are_polled_as_the_time_allows_each_in_its_turn() -> None:
    books = Books(flows=400)
    seconds = 100 / POLLS_PER_SECOND
    rounds = [books.due(seconds) for _ in range(4)]
    assert [len(each) for each in rounds] == [100] * 4
    assert [flow for each in rounds for flow in each] == books.flows
    assert books.due(seconds) == books.flows[:100]
    assert books.due(0) == books.flows[100:101]
    assert set(books.due(1)) == set(books.flows)


def test_a_closed_flow_keeps_its_place_but_is_not_polled() -> None:
    books = Books(flows=3)
    books.flows[1].closed_at = 4.0
    assert books.due(1) == [books.flows[0], books.flows[2]]
    assert books.accounting.flows == 3


def test_a_flow_of_which_nothing_is_installed_leaves_the_ring_and_may_come_back() -> None:
    books = Books(flows=2)
    first, second = books.flows
    for rewrite in first.rewrites.values():
        del books.accounting.installed[rewrite]
    assert books.due(1) == [second]
    assert books.accounting.flows == 1
    books.install(first.rewrites.values())
    books.accounting.watch(first)
    books.accounting.watch(first)
    assert books.due(1) == [second, first]
    books.accounting.clear()
    assert (books.due(1), books.accounting.flows, books.accounting.installed) == ([], 0, {})
