"""What the kernel is told of flows, and asked about them."""

from random import Random

from krelay.fastpath import RETIRE, FastPath
from krelay.flow import Source
from krelay.nat import NatTable
from krelay.nftmsg import Count
from krelay.row import Step
from tests.tools.packets import at


def test_a_connection_that_was_closed_is_not_looked_at_until_it_is_taken_back() -> None:
    nat = NatTable(rng=Random(1))
    fast = FastPath(nat)
    fast.begin(room=10)
    row = nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
    nat.attach(row, at("K:45678"), 0)
    over = fast.changes(10)
    assert over is not None
    fast.told(over, [], 0)
    assert fast.due(1, 1) == [row]

    nat.close(row, 2)
    assert fast.due(2, 1) == []
    assert fast.rows == 1

    assert fast.due(2 + RETIRE, 1) == []
    back = fast.changes(10)
    assert back is not None
    assert set(back.back) == set(over.over)
    fast.told(back, [(row.rewrites[Step.T1], Count(7, 700))], 2 + RETIRE)
    assert row.rewrites[Step.T1].packets == 7
