"""A flood of fragments: what it takes of the relay's host, and that others don't notice.

While it lasts, one client downloads and another asks 50 DNS questions a second, each from a port of
its own; neither may meet an error.  KRELAY_LONG=1 floods for longer, and prints figures that are
worth something on a machine with nothing else to do.
"""

import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.net.programs import fragments
from tests.net.world import PYTHON, World

pytestmark = [pytest.mark.net, pytest.mark.slow]

LONG = bool(os.environ.get("KRELAY_LONG"))
SECONDS, RATE, SIZE = (30, 20_000, 100 << 20) if LONG else (4, 5_000, 10 << 20)
QUESTIONS = 50
"""A second."""
QUERY = bytes.fromhex("0d0d01000001000000000000") + b"\x03www\x07example\0" + b"\0\1\0\1"
"""A question for the address of www.example (RFC 1035, section 4)."""
ADDRESS = bytes([10, 9, 8, 7])
TICKS = os.sysconf("SC_CLK_TCK")


class Asker:
    """Asks for a name again and again; what went wrong is in `failed`."""

    def __init__(self, world: World, host: str) -> None:
        self.asked = 0
        self.failed: list[str] = []
        self.slowest = 0.0
        self._world = world
        self._host = host
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        with self._world.lab.enter(self._host):
            while not self._over.is_set():
                with socket.socket(type=socket.SOCK_DGRAM) as sock:
                    self._ask(sock)
                self.asked += 1
                self._over.wait(max(0.0, began + self.asked / QUESTIONS - time.monotonic()))

    def _ask(self, sock: socket.socket) -> None:
        sock.settimeout(5)
        sock.connect((self._world.relay, 53))
        began = time.monotonic()
        try:
            sock.send(QUERY)
            if not sock.recv(512).endswith(ADDRESS):
                self.failed.append("a wrong answer")
        except OSError as error:
            self.failed.append(str(error))
        self.slowest = max(self.slowest, time.monotonic() - began)

    def finish(self) -> None:
        """Asks no more."""
        self._over.set()
        self._thread.join()


def seconds_of_cpu(pid: int) -> float:
    """What this process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid: int) -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def fragments_held(world: World) -> int:
    """Bytes that the relay host's kernel holds of datagrams that aren't whole."""
    shown = world.lab.run("relay", "cat", "/proc/net/sockstat").stdout
    found = re.search(r"FRAG: inuse \d+ memory (\d+)", shown)
    assert found
    return int(found[1])


@pytest.mark.timeout(240)
def test_downloads_and_dns_go_on_in_a_flood_of_fragments(world: World) -> None:
    world.serve("server", "tcp/80")
    world.dnsmasq("server", 53, {"www.example": "10.9.8.7"})
    world.begin()
    pid = world.krelay_process.pid
    bound = int(world.lab.run("relay", "sysctl", "-n", "net.ipv4.ipfrag_high_thresh").stdout)
    asker = Asker(world, "client")
    download = world.download("client", 80, seed=9, size=SIZE, rate=SIZE // SECONDS)
    world.until(lambda: asker.asked > QUESTIONS // 2 or None, "questions asked")
    before, used, began = memory(pid), seconds_of_cpu(pid), time.monotonic()
    counters = world.values("counters")

    command = (*PYTHON, fragments.__file__, world.relay, "53", str(RATE), str(SECONDS))
    flood = world.lab.start("client2", *command)
    held = rows = 0
    while flood.poll() is None:
        held = max(held, fragments_held(world))
        rows = max(rows, len(world.rows()))
        time.sleep(0.1)
    share = (seconds_of_cpu(pid) - used) / (time.monotonic() - began)
    grown = memory(pid) - before
    asker.finish()
    download.finish(120)

    after = world.values("counters")
    print(
        f"\n    {flood.output.strip()} fragments in {SECONDS} s: the kernel held {held >> 10} KB "
        f"of them (bound {bound >> 10}), krelay grew by {grown >> 10} KB, had {rows} rows and took "
        f"{share:.0%} of a core; {asker.asked} questions, the slowest {asker.slowest * 1000:.0f} ms"
    )
    assert int(flood.output) > RATE * SECONDS / 3
    assert asker.failed == []
    assert 0 < held < bound * 1.1
    assert grown < 8 << 20
    assert rows <= 25 * QUESTIONS  # one for each question of 20 s, looked at once a second; no more
    assert after.get("passed_fragment", 0) == counters.get("passed_fragment", 0)  # none is queued
    assert after["queue_overflow"] == after["errors"] == 0
