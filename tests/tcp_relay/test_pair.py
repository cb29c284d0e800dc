"""Two halves: what an event of one socket means for them, and when both are done."""

import pytest

from tcp_relay.pair import Pair, Side


@pytest.mark.parametrize("side", list(Side))
def test_a_socket_feeds_one_half_and_is_fed_by_the_other(side: Side) -> None:
    pair = Pair()
    fed_by, feeds = (pair.down, pair.up) if side is Side.CLIENT else (pair.up, pair.down)
    pair.ready(side, read=True, write=False, hint=False)
    assert (feeds.readable, feeds.writable, feeds.hinted) == (True, False, False)
    assert (fed_by.readable, fed_by.writable, fed_by.hinted) == (False, False, False)
    pair.ready(side, read=False, write=True, hint=False)
    assert (fed_by.readable, fed_by.writable) == (False, True)
    pair.ready(side, read=False, write=False, hint=True)
    assert feeds.hinted
    assert not fed_by.hinted
    assert feeds.readable  # an event that doesn't say so doesn't deny it


def test_it_has_ended_when_both_ends_of_file_were_passed_on() -> None:
    pair = Pair()
    for half, ended in ((pair.down, False), (pair.up, True)):
        half.readable = True
        assert pair.busy
        half.got(b"", asked=1)
        assert not pair.ended
        half.shut()
        assert pair.ended is ended
    assert not pair.busy
