"""What this host has sent from relayed ports: for how long it is remembered, and how much of it."""

import pytest

from knet.endpoint import Endpoint, Proto, flow_key
from krelay.nat.flow import Timeouts
from krelay.nat.ownflows import REPLIED, UNREPLIED, OwnFlows

UDP, TCP = Proto.UDP, Proto.TCP
TIMEOUTS = Timeouts(tcp_transitory=240, tcp_established=7440)


def sent(number: int) -> bytes:
    """A packet of this host to the peer with this number."""
    return flow_key(Endpoint.parse("192.168.0.2:123"), Endpoint.parse(f"203.0.113.9:{number}"))


@pytest.mark.parametrize("proto", Proto)
def test_only_what_was_sent_has_replies(proto: Proto) -> None:
    flows = OwnFlows()
    flows.sent(proto, sent(1), 0)

    assert flows.replied(proto, sent(1), 0)
    assert not flows.replied(proto, sent(2), 0)
    assert not flows.replied(TCP if proto is UDP else UDP, sent(1), 0)
    assert len(flows) == 1


@pytest.mark.parametrize(
    ("proto", "unreplied", "replied"), [(UDP, UNREPLIED, REPLIED), (TCP, 240, 7440)]
)
def test_flows_with_a_reply_are_remembered_longer(
    proto: Proto, unreplied: float, replied: float
) -> None:
    flows = OwnFlows()
    flows.sent(proto, sent(1), 0)
    flows.sent(proto, sent(2), 0)
    assert flows.replied(proto, sent(2), 0)

    flows.expire(unreplied - 0.1, TIMEOUTS)
    assert len(flows) == 2
    flows.expire(unreplied, TIMEOUTS)
    assert not flows.replied(proto, sent(1), unreplied)
    flows.expire(replied - 0.1, TIMEOUTS)
    assert len(flows) == 1
    flows.expire(replied, TIMEOUTS)
    assert len(flows) == 0


def test_packets_of_both_ends_keep_a_flow() -> None:
    flows = OwnFlows()
    flows.sent(UDP, sent(1), 0)
    flows.sent(UDP, sent(1), 20)
    flows.expire(40, TIMEOUTS)
    assert flows.replied(UDP, sent(1), 45)
    flows.expire(200, TIMEOUTS)
    assert flows.replied(UDP, sent(1), 200)
    flows.expire(370, TIMEOUTS)
    flows.sent(UDP, sent(1), 370)
    flows.expire(540, TIMEOUTS)

    assert flows.replied(UDP, sent(1), 540)


def test_the_oldest_without_a_reply_is_evicted() -> None:
    flows = OwnFlows(most=3)
    for number in (1, 2, 3):
        flows.sent(UDP, sent(number), 0)
    assert flows.replied(UDP, sent(1), 0)
    flows.sent(UDP, sent(2), 1)  # heard of again
    flows.sent(UDP, sent(4), 2)

    assert [n for n in (1, 2, 3, 4) if flows.replied(UDP, sent(n), 2)] == [1, 2, 4]
    assert (len(flows), flows.evicted) == (3, 1)


def test_where_all_have_replies_the_oldest_is_evicted() -> None:
    flows = OwnFlows(most=2)
    for number in (1, 2):
        flows.sent(TCP, sent(number), 0)
        assert flows.replied(TCP, sent(number), 0)
    flows.sent(UDP, sent(3), 1)

    assert not flows.replied(TCP, sent(1), 1)
    assert flows.replied(TCP, sent(2), 1)
    assert flows.replied(UDP, sent(3), 1)
    assert flows.evicted == 1


def test_a_flood_of_own_flows_takes_bounded_room() -> None:
    flows = OwnFlows(most=100)
    for number in range(1000):
        flows.sent(UDP, sent(number), 0)

    assert (len(flows), flows.evicted) == (100, 900)
    flows.clear()
    assert not flows.replied(UDP, sent(999), 0)
