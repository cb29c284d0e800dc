"""The ways through the proxies: each is seen to work, or left out; goals fit what is measured."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import alone, idle, peers, proxies, web
from benchmarks.ground import CannotMeasure, Progress, Wish
from benchmarks.peers import Peer
from krelay_vm import Lab
from tests.benchmarks.needs import need

WAYS = (*peers.PLAIN, *proxies.BULK_ONLY, *peers.KEEPING)


def test_what_this_machine_lacks_is_left_out_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.web.NEEDS", ("nginx", "no-such-curl"))
    monkeypatch.setattr(idle, "WAYS", [replace(each, needs=("gone",)) for each in idle.WAYS])
    for part, name in ((proxies, "no-such-curl"), (idle, "gone")):
        progress = Progress("test")
        part.measure(Wish(rounds=1, seconds=1), progress)
        assert name in progress.left_out[-1]
        assert not progress.readings


def test_goals_name_series_that_are_measured() -> None:
    quantities = (
        proxies.DOWN,
        proxies.UP,
        proxies.CONNECTIONS,
        proxies.REQUESTS,
        proxies.CPU_DOWN,
        proxies.CPU_UP,
        proxies.CPU_CONNECTIONS,
        proxies.VISITS,
    )
    measured = {quantity.format(way.name) for quantity in quantities for way in WAYS}
    for goal in proxies.GOALS:
        below = (goal.below,) if isinstance(goal.below, str) else goal.below
        assert {goal.above, *below} <= measured


@pytest.fixture
def big(tmp_path: Path) -> Path:
    file = tmp_path / "big"
    file.write_bytes(bytes(100_000))
    return file


@pytest.mark.net
@pytest.mark.parametrize("peer", WAYS, ids=lambda peer: peer.name)
def test_bulk_goes_both_ways_and_the_right_address_is_seen(peer: Peer, big: Path) -> None:
    need(*web.NEEDS, *peer.needs)
    with Lab() as lab:
        way = proxies.set_up(lab, peer, big)
        assert web.download(lab, way.address, 5).bytes == 100_000
        assert web.upload(lab, way.address, 0.05, big).bytes > 0


@pytest.mark.net
def test_a_download_through_the_queue_is_counted_there_by_its_segments(big: Path) -> None:
    need(*web.NEEDS)
    with Lab() as lab:
        way = proxies.set_up(lab, peers.FORWARD_QUEUE, big)
        readings = proxies._downloads(way, 5)
    assert readings[proxies.DOWN, "MB/s"] > 0
    assert readings[proxies.VISITS, "visits/GB"] > 1e9 / 1500  # segments of 1,448 bytes at most


@pytest.mark.net
def test_what_has_no_queue_has_no_visits_and_its_cost_is_seen_all_the_same(big: Path) -> None:
    need(*web.NEEDS, *peers.DNAT.needs)
    if why := alone.impossible():
        pytest.skip(why)
    os.truncate(big, 1 << 30)  # /proc/stat counts hundredths of a second: some must go by
    with Lab() as lab:
        way = proxies.set_up(lab, peers.DNAT, big)
        assert proxies._downloads(way, 1).keys() == {(proxies.DOWN, "MB/s")}
        for cost in (proxies._cost_down, proxies._cost_up):
            [value] = cost(way, 0.5).values()
            assert value > 0


@pytest.mark.net
def test_a_way_on_which_the_server_sees_another_address_is_not_measured(big: Path) -> None:
    need(*web.NEEDS)
    with Lab() as lab:
        web.serve(lab, big)
        with pytest.raises(CannotMeasure, match=r"direct: the server saw 10\.0\.0\.1, not"):
            web.check(lab, "direct", lab.address("server"), lab.address("relay", "server"), big)
