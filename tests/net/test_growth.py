"""A daemon that has been up for long holds what it needs: nothing is left for the collector.

KRELAY_LONG=1 lets things happen for twice as long.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import pytest

from tests.net.world import GPORT, PYTHON, SERVICES, World

pytestmark = pytest.mark.net

HOUR = 3600
BUSY = HOUR // 4 if os.environ.get("KRELAY_LONG") else 480
"""Seconds in which all happens, the rarest, the removal of the tree, twice."""
STORIES = {
    "idle": (),
    "asked": ("control", "traces", "flows"),
    "relaying": ("flows", "relays", "traces"),
    "all": ("control", "traces", "flows", "relays", "settings", "links", "rules", "tree"),
}


def hour(world: World, seconds: int, *stories: str) -> Mapping[str, Any]:
    """What is left of so much of these in krelay, and what has happened."""
    for folder in ("limits", "timeouts"):
        (world.root / folder).mkdir(parents=True)
    settings = {
        "gport": GPORT,
        "services": SERVICES,
        "real_ip": world.server,
        "datapath": world.datapath,
        "start": 1,
    }
    for name, value in settings.items():
        (world.root / name).write_text(f"{value}\n")
    program = world.lab.start(
        "relay", *PYTHON, "-m", "tests.net.programs.hour", str(world.root), str(seconds), *stories
    )
    assert program.wait(100) == 0, program.output
    (result,) = (line for line in program.output.splitlines() if line.startswith("RESULT "))
    found: Mapping[str, Any] = json.loads(result.removeprefix("RESULT "))
    return found


@pytest.mark.parametrize("stories", STORIES.values(), ids=STORIES)
def test_an_hour_of_krelay_leaves_nothing_for_the_collector(
    world: World, stories: tuple[str, ...]
) -> None:
    found = hour(world, BUSY if stories else HOUR, *stories)

    assert found["left"] == {}
    assert bool(found["happened"]) == bool(stories)
