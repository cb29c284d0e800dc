"""Mixed traffic, an hour of it with KRELAY_LONG=1: nothing fails, and nothing grows."""

import os

import pytest

from tests.net import soak
from tests.net.world import World

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("an hour; python -m tests.net.soak 60 queue has the other"),
]

LONG = bool(os.environ.get("KRELAY_LONG"))
SECONDS = 3600.0 if LONG else 24.0


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_mixed_traffic_fails_nowhere_and_makes_nothing_grow(world: World) -> None:
    """In less than an hour all sorts happen, too, but memory has no time to settle."""
    found = soak.run(world, SECONDS, restart_every=soak.RESTART_EVERY if LONG else 6.0)

    assert found.errors == []
    assert found.restarts >= 2
    kinds = {"page", "bulk", "forwarded", "forwarded bulk", "question", "datagrams", "control"}
    assert kinds <= set(found.done)
    assert len(found.samples) >= SECONDS / soak.SAMPLE_EVERY / 2
    if LONG:
        assert found.grown() == []
