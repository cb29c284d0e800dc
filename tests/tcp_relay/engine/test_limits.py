"""The defaults, which are a contract, and that limits don't change under a running session."""

from dataclasses import FrozenInstanceError

import pytest

from knet.relayoptions import MAX_HOLD
from tcp_relay.engine.limits import SessionLimits


def test_the_defaults_are_those_that_are_documented() -> None:
    limits = SessionLimits()
    assert 1 <= limits.hold <= 1 << 20 <= MAX_HOLD
    assert (limits.stall, limits.half_close, limits.connect, limits.drain) == (10, 3600, 10, 30)


def test_limits_dont_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SessionLimits().stall = 1.0  # type: ignore[misc]
