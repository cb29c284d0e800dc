"""Each system call that krelay makes while it serves fails once, with each error: it goes on.

The calls are those that it makes when these things happen; nobody keeps a list (tools/faults.py).
Some of them, told apart by what they are on, are made to fail: each with one error, all errors
coming round; with KRELAY_LONG=1 all of them, with each.  After each all must be well again.
"""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from krelay_vm.errors import LabTimeout
from tests.net.world import GPORT, World, control_socket, echo, greet
from tests.tools import faults
from tests.tools.faults import ERRORS, Call

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("by itself it makes the calls of both"),
]

LONG = bool(os.environ.get("KRELAY_LONG"))
MOST = 14
"""Calls of one happening that are made to fail, unless the test is a long one."""
SHIFTS = (0, 1, -1, 2)
"""By how many calls of the same name a call is looked for: others may come or not."""
MOST_TOLD = 4
"""Warnings that one failure may lead to: what failed, and what comes of it."""
HEALED_WITHIN = 10.0
"""Seconds after which all is well again, whatever failed."""

Happens = Callable[[World, int], None]


def a_setting_is_written(world: World, turn: int) -> None:
    (world.root / "timeouts" / "udp").write_text(f"{100 + turn % 50}\n")


def nonsense_is_written(world: World, turn: int) -> None:
    (world.root / "gport").write_text(f"nonsense {turn}\n")


def an_address_comes(world: World, turn: int) -> None:
    world.lab.run("relay", "ip", "addr", "replace", f"10.77.3.{60 + turn % 9}/24", "dev", "eth1")
    world.lab.run(
        "relay",
        "ip",
        "addr",
        "del",
        f"10.77.3.{60 + (turn + 4) % 9}/24",
        "dev",
        "eth1",
        check=False,
    )
    time.sleep(0.25)


def a_service_comes(world: World, turn: int) -> None:
    services = f"tcp/80 udp/7 udp/53 udp/{1000 + turn % 50}"
    (world.root / "services").write_text(services + "\n")
    time.sleep(0.1)


def somebody_asks(world: World, turn: int) -> None:
    for request in ("show status", "show nat json", "show counters", "nonsense"):
        with suppress(OSError), control_socket(world.root) as connection:
            connection.settimeout(2)
            connection.sendall(request.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


def a_client_comes(world: World, turn: int) -> None:
    with suppress(OSError), world.open("client") as sock:
        sock.settimeout(2)
        sock.connect((world.relay, 80))
        greet(sock)
    with suppress(OSError), world.open("client", socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.sendto(b"who", (world.relay, 7))
        sock.recv(100)


def a_tcp_relay_comes(world: World, turn: int) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(2)
        link.connect(str(world.root / "relay.sock"))
        query = {"op": "open", "id": 1, "client": ["172.20.5.1", 1], "gport": GPORT}
        link.send(json.dumps({**query, "relay": ["10.77.3.2", 45678]}).encode())
        link.recv(4096)
        link.send(b"nonsense")
        link.recv(4096)


def relaying_ends_and_begins(world: World, turn: int) -> None:
    for flag, state in (("0", "stopped"), ("1", "running")):
        (world.root / "start").write_text(flag + "\n")
        with suppress(LabTimeout):
            world.until(lambda: world.read("status/state") == state, state, 0.5)  # noqa: B023


def rules_are_taken_out(world: World, turn: int) -> None:
    world.lab.run("relay", "nft", "flush", "ruleset")
    time.sleep(0.3)


def the_tree_is_replaced(world: World, turn: int) -> None:
    world.root.rename(world.lab.directory / f"away-{time.monotonic_ns()}")
    world.root.mkdir(exist_ok=True)
    time.sleep(0.3)


def a_second_passes(world: World, turn: int) -> None:
    time.sleep(1.2)


HAPPENINGS: list[Happens] = [
    a_setting_is_written,
    nonsense_is_written,
    an_address_comes,
    a_service_comes,
    somebody_asks,
    a_client_comes,
    a_tcp_relay_comes,
    relaying_ends_and_begins,
    rules_are_taken_out,
    the_tree_is_replaced,
    a_second_passes,
]


ENDING = [relaying_ends_and_begins, rules_are_taken_out]
"""What connections don't outlive, whether calls fail or not."""


@pytest.fixture(scope="module")
def served(datapath: str) -> Iterator[World]:
    """Relaying; whatever is done to it, it is for the next test to go on with."""
    if (reason := faults.why_not()) is not None:
        pytest.skip(reason)
    with World(datapath=datapath) as world:
        world.serve("server", "tcp/80", "udp/7", "udp/53")
        world.begin(services="tcp/80 udp/7 udp/53")
        yield world


def is_well(world: World, turn: int) -> bool:
    """Whether new clients are served, and a new setting is in force."""
    assert world.krelay_process.poll() is None, world.krelay_process.output[-4000:]
    text = str(151 + turn % 99)
    try:
        (world.root / "timeouts" / "udp_dns").write_text(text + "\n")
        with world.open("client") as sock:
            sock.settimeout(2)
            sock.connect((world.relay, 80))
            assert greet(sock).startswith(f"{world.client}:")
        with world.open("client", socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.sendto(b"who", (world.relay, 7))
            sock.recv(100)
        return "running" in world.ask("show status")[0] and world.applies("timeouts/udp_dns", text)
    except (OSError, AssertionError):
        return False


def failure(world: World, happens: Happens, turn: int, call: Call, error: str) -> Call | None:
    """Has that call fail meanwhile; the call that did fail.  Then all must be well again."""
    program = world.krelay_process
    before = len(program.output)
    with faults.broken(program.pid, call, error) as broke:
        happens(world, turn)
    world.until(lambda: is_well(world, turn), f"all well after {call} {error}", HEALED_WITHIN)
    said = program.output[before:]
    assert "Traceback" not in said, (call, error, said)
    told = [line for line in said.splitlines() if line.split()[1:2] in (["warning"], ["error"])]
    told = [line for line in told if "value refused" not in line]
    assert len(told) <= MOST_TOLD, (call, error, told)
    assert len(set(map(message, told))) == len(told), ("said twice", call, error, told)
    return broke()


def message(line: str) -> str:
    """A line of the log without its time and the count of its like."""
    return line.partition(" ")[2].partition(" again=")[0]


@pytest.mark.timeout(1200 if LONG else 240)
@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda each: each.__name__)
def test_no_call_that_fails_ends_krelay(served: World, happens: Happens) -> None:
    pid = served.krelay_process.pid
    turn = 0
    happens(served, turn)
    table = faults.recorded(pid, lambda: happens(served, 1))
    if not LONG and len(table) > MOST:
        table = [table[at * len(table) // MOST] for at in range(MOST)]
    hit: Counter[Call] = Counter()
    lasting = served.connect("client", 80)
    greet(lasting)
    for number, call in enumerate(table):
        for error in ERRORS if LONG else (ERRORS[number % len(ERRORS)],):
            for shift in SHIFTS:
                turn += 1
                wanted = call._replace(nth=max(1, call.nth + shift))
                found = failure(served, happens, turn, wanted, error)
                if happens not in ENDING:
                    echo(lasting, b"still here")
                if found is not None:
                    hit[found._replace(nth=0)] += 1
                    if found[:2] == call[:2]:
                        break
    lasting.close()
    missed = [call for call in table if call._replace(nth=0) not in hit]
    print(
        f"\n    {len(table)} calls, {hit.total()} failures, not hit: {[*map(str, missed)]}", end=""
    )
    assert hit.total() >= len(table) * 3 // 4
    served.put(gport=GPORT)
