"""Worlds for the end-to-end tests: one for each test, so that none sees what another has left."""

from collections.abc import Iterator

import pytest

from tests.net.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """A lab with nothing running in it yet."""
    with World() as world:
        yield world


@pytest.fixture(scope="module")
def relaying() -> Iterator[World]:
    """For a whole module, of tests that change nothing: our server on both servers, relaying."""
    with World() as world:
        for host in ("server", "server2"):
            world.serve(host, "tcp/80", "tcp/443", "udp/7", "udp/53")
        world.begin()
        yield world
