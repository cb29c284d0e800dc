"""The ways through the proxies: each is seen to work, or left out; goals fit what is measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import idle, peers, proxies, web
from benchmarks.ground import CannotMeasure, Progress, Wish
from benchmarks.peers import Peer
from tests.benchmarks.needs import need
from vm import Lab

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
def test_a_way_on_which_the_server_sees_another_address_is_not_measured(big: Path) -> None:
    need(*web.NEEDS)
    with Lab() as lab:
        web.serve(lab, big)
        with pytest.raises(CannotMeasure, match=r"direct: the server saw 10\.0\.0\.1, not"):
            web.check(lab, "direct", lab.address("server"), lab.address("relay", "server"), big)
