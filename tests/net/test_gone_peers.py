"""A host that is gone in the middle of a transfer: whoever is left is told within half a minute."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from krelay_vm.errors import LabTimeout
from tests.net.test_slow_peers import DEAD, FULL, SEED, begin, flooding
from tests.net.world import World

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("what is asked, and how often, is the kernel's TCP's"),
]


class End(NamedTuple):
    """How long the connection lasted then, and what tcp-relay says of its end."""

    seconds: float
    line: str


def held(world: World) -> int:
    """Bytes that tcp-relay holds, as it tells krelay every second."""
    return int(world.values("status")["tcp_held"])


@pytest.fixture(scope="module")
def ends(datapath: str) -> Iterator[dict[str, End]]:
    """Of a connection whose client is gone, and of one whose server is: both at the same time.

    The first is between client and server, the second between client2 and server2.
    """
    with World(datapath=datapath) as world:
        begin(world, "client", "server", "client2", "server2")
        world.put(timeouts__stall=3600)
        world.connect("client", 80).sendall(f"download {SEED} {FULL} 0\n".encode())
        world.until(lambda: held(world), "bytes that are held")
        time.sleep(3)  # so that its window is asked for now and then
        world.put(real_ip=world.lab.address("server2"))
        before, other = held(world), world.connect("client2", 80)
        other.sendall(b"sip 0\n")
        flooding(other)
        world.until(lambda: held(world) > before, "more bytes that are held")
        time.sleep(3)
        world.lab.link_down("client")
        world.lab.link_down("server2")
        began = time.monotonic()
        addresses = {"client": world.client, "server": world.lab.address("client2")}
        found: dict[str, End] = {}

        def all_over() -> bool:
            for line in world.tcp_relay_process.output.splitlines():
                for side, client in addresses.items():
                    if f"connection ended client={client}:" in line:
                        found.setdefault(side, End(time.monotonic() - began, line))
            return len(found) == len(addresses)

        with suppress(LabTimeout):
            world.until(all_over, "both ends", DEAD)
        yield found


@pytest.mark.parametrize("side", ["client", "server"])
def test_who_answers_nothing_is_reset_within_half_a_minute(ends: dict[str, End], side: str) -> None:
    assert side in ends
    assert DEAD / 3 < ends[side].seconds < DEAD
    assert f"the {side} has acknowledged nothing for 25 s" in ends[side].line
