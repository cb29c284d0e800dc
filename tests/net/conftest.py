"""Worlds for the end-to-end tests: none sees what another test has left.

`world`     a new lab, nothing running: for tests of how daemons begin and end, are killed or fail,
            of what they do at first, or of a host that is not as usual
`shared`    a lab that relays, for one test after the other: each may open flows, write settings,
            start programs and put tables of nft in; all that is put back and looked for
`relaying`  a lab that relays, for tests that change nothing but flows that end

Whatever they show holds whichever way packets take: a test whose world comes from here runs once
with each data path, unless a mark says why one is enough (`one_datapath`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Self

import pytest

from procfs_sim.tree import DEFAULTS
from tests.net.sharing import Shared, relay_anew
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


@contextmanager
def relaying_world(datapath: str) -> Iterator[World]:
    """Our server on both servers, krelay and tcp-relay relaying to the first."""
    with World(datapath=datapath) as world:
        for host in ("server", "server2"):
            world.serve(host, "tcp/80", "tcp/443", "udp/7", "udp/53")
        world.begin()
        yield world


@pytest.fixture(scope="module")
def relaying(datapath: str) -> Iterator[World]:
    """For a whole module, of tests that change nothing: our server on both servers, relaying."""
    with relaying_world(datapath) as world:
        yield world


@contextmanager
def prepared_world(datapath: str, prepare: Callable[[World], object]) -> Iterator[World]:
    """The same, with what all tests of a module need."""
    with relaying_world(datapath) as world:
        prepare(world)
        relay_anew(world)
        yield world


class SharedWorlds:
    """The shared world of a module and data path: `make` is called when it is first asked for."""

    def __init__(self, make: Callable[[], AbstractContextManager[World]]) -> None:
        self._make = make
        self._held = ExitStack()
        self._shared: Shared | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    @contextmanager
    def lend(self) -> Iterator[World]:
        """For one test.  Raises AssertionError if it can't be put back as it was."""
        if self._shared is None:
            self._shared = Shared(self._held.enter_context(self._make()))
        yield self._shared.world
        try:
            self._shared.restore()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """The next test gets a new one."""
        self._shared = None
        self._held.close()


@pytest.fixture(scope="module")
def shared_worlds(datapath: str) -> Iterator[SharedWorlds]:
    """A module that needs other servers or settings has a fixture of this name, of its own."""
    with SharedWorlds(lambda: relaying_world(datapath)) as worlds:
        yield worlds


@pytest.fixture
def shared(shared_worlds: SharedWorlds) -> Iterator[World]:
    """For tests that need a lab as `relaying` has it, and change what `Shared` puts back.

    Counters and logs go on: `World.counted` and `World.logged` tell those of this test.  What a
    test leaves fails that test, and the next has a new lab.
    """
    with shared_worlds.lend() as world:
        yield world
