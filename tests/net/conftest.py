"""Worlds for the end-to-end tests: one for each test, so that none sees what another has left.

Whatever they show holds whichever way packets take: a test whose world comes from here runs once
with each data path, unless a mark says why one is enough (`one_datapath`).
"""

from collections.abc import Iterator

import pytest

from procfs_sim.tree import DEFAULTS
from tests.net.world import World

DATAPATHS = ("queue", "auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    one = metafunc.definition.get_closest_marker("one_datapath")
    if "datapath" in metafunc.fixturenames and one is None:
        metafunc.parametrize("datapath", DATAPATHS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def datapath(request: pytest.FixtureRequest) -> str:
    """The setting `datapath` of this test's world."""
    return str(getattr(request, "param", DEFAULTS.datapath))


@pytest.fixture
def world(datapath: str) -> Iterator[World]:
    """A lab with nothing running in it yet."""
    with World(datapath=datapath) as world:
        yield world


@pytest.fixture(scope="module")
def relaying(datapath: str) -> Iterator[World]:
    """For a whole module, of tests that change nothing: our server on both servers, relaying."""
    with World(datapath=datapath) as world:
        for host in ("server", "server2"):
            world.serve(host, "tcp/80", "tcp/443", "udp/7", "udp/53")
        world.begin()
        yield world
