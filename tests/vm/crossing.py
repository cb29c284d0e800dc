"""DNS and HTTP through the relay between virtual machines: what a person would try, as one run.

    python -m tests.vm.crossing --runs 20                      # all six combinations; a table
    python -m tests.vm.crossing --ends uml --relay qemu        # one of them, once

Client and server are machines of one kind, the relay is a namespace or a machine of either kind,
and a second server is a namespace.  Each run boots its machines anew.  A run is whole if every
answer was right; the table tells how many were, and the median seconds of each of its parts.

Exit status: 0 if all runs were whole, 1 if one wasn't, 130 Ctrl-C.
"""

import argparse
import hashlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from krelay_vm import LabError, TopologyError, guest, relay_topology
from krelay_vm.errors import LabTimeout
from procfs_sim import DEFAULTS
from tests.net.world import World

ENDS = guest.BACKENDS[1:]
RELAYS = guest.BACKENDS
COMBINATIONS = [(ends, relay) for ends in ENDS for relay in RELAYS]
TOPOLOGY = relay_topology("172.20.5.0/24", "10.77.3.0/24", servers=2)
NAME = "www.crossing.test"
ANSWERS = {"server": "192.0.2.71", "server2": "192.0.2.72"}
"""What each server's dnsmasq answers for NAME."""
GPORT, OTHER_GPORT = 18000, 18001
RULES = {"uml": "iptables-legacy", "qemu": "nft"}
"""How a kernel of that kind is told what to queue."""
SIZE = 20_000_000
PARTS = (
    "boot", "begin", "nslookup", "dig", "wget", "curl", "download", "upload", "off, on", "gport",
    "real_ip", "end",
)  # fmt: skip
"""In order; each is measured from the end of the one before."""


class Wrong(Exception):
    """Something else came than should."""


class Clock:
    """Seconds by part."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """This part ends here."""
        now = time.monotonic()
        self.seconds[part], self._last = now - self._last, now
        self._tell(f"{part} {self.seconds[part]:.1f} s")


def cross(
    ends: str,
    relay: str,
    datapath: str = DEFAULTS.datapath,
    size: int = SIZE,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """One run; the seconds of each of its PARTS.  Raises Wrong, LabError."""
    clock = Clock(tell)
    backends = {"client": ends, "server": ends, "relay": relay}
    with World(TOPOLOGY, backends=backends, datapath=datapath) as world:
        clock.lap("boot")
        serve(world, size)
        world.begin(services="tcp/80 udp/53", gport=GPORT)
        _same("rules", f"rules={RULES.get(relay, '')}" in world.krelay_process.output, True)
        clock.lap("begin")
        for part, act in (
            ("nslookup", _nslookup), ("dig", _dig), ("wget", _wget), ("curl", _curl),
            ("download", _download), ("upload", _upload), ("off, on", _switch),
            ("gport", _move_gateway), ("real_ip", _change_server),
        ):  # fmt: skip
            act(world)
            clock.lap(part)
        world.put(start=0)
        world.until_state("stopped")
    clock.lap("end")
    return clock.seconds


def serve(world: World, size: int) -> None:
    """DNS and HTTP on both servers, whose answers differ; on the first one a file of that size."""
    for host, answer in ANSWERS.items():
        world.nginx(host, 80)
        world.dnsmasq(host, 53, {NAME: answer})
        (files(world, host) / "whose").write_text(host + "\n")
    content = random.Random(size).randbytes(size)  # the same each time
    for path in (files(world, "server") / "big", world.lab.directory / "big"):
        path.write_bytes(content)


def files(world: World, host: str) -> Path:
    """What its nginx serves below /files/."""
    return world.lab.directory / f"nginx-{host}" / "www" / "files"


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Wrong(f"{what}: {found!r} instead of {wanted!r}")


def _seen(world: World, log: str, words: Sequence[str]) -> None:
    """The server's log has a line with these words in this order, once it is written."""
    path = world.lab.directory / log
    wanted = " ".join(words)
    try:
        world.until(lambda: wanted in path.read_text(errors="replace"), wanted)
    except LabTimeout:
        last = path.read_text(errors="replace").splitlines()[-3:]
        raise Wrong(f"{log} has no {wanted!r}; it ends with {last}") from None


def _dns_log(world: World) -> str:
    (program,) = (p for p in world.lab.programs if p.argv[0] == "dnsmasq" and p.host == "server")
    return program.log.name


def _nslookup(world: World) -> None:
    printed = world.run("client", guest.BUSYBOX, "nslookup", "-type=a", NAME, world.relay)
    _same("nslookup", ANSWERS["server"] in printed.split(), True)
    _seen(world, _dns_log(world), ("query[A]", NAME, "from", world.client))


def _dig(world: World, server: str = "server") -> None:
    printed = world.run("client", "dig", "+short", "+tries=1", "+time=5", f"@{world.relay}", NAME)
    _same("dig", printed.split(), [ANSWERS[server]])


def _wget(world: World) -> None:
    url = f"http://{world.relay}/by-wget"
    _same("wget", world.run("client", guest.BUSYBOX, "wget", "-q", "-O-", url), "/by-wget\n")
    _seen(world, "nginx-server/access.log", (world.client, "80", "/by-wget"))


def _curl(world: World, path: str = "/by-curl", answer: str = "/by-curl\n") -> None:
    url = f"http://{world.relay}{path}"
    _same("curl", world.run("client", "curl", "-sS", "-m60", url), answer)


def _download(world: World) -> None:
    fetch = f"curl -sS -m150 http://{world.relay}/files/big | {guest.BUSYBOX} sha256sum"
    found = world.run("client", "sh", "-c", fetch).split()[0]
    _same("SHA-256 of the download", found, _digest(world.lab.directory / "big"))


def _upload(world: World) -> None:
    url = f"http://{world.relay}/files/from-client"
    status = ("-o", "/dev/null", "-w", "%{http_code}")
    put = ("curl", "-sS", "-m150", *status, "-T", f"{world.lab.directory}/big", url)
    _same("status of the upload", world.run("client", *put), "201")
    found = _digest(files(world, "server") / "from-client")
    _same("SHA-256 of the upload", found, _digest(world.lab.directory / "big"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _switch(world: World) -> None:
    """Off: the relay's host answers for itself, and has no rule of ours.  And on again."""
    world.put(start=0)
    world.until_state("stopped")
    curl = ("curl", "-sS", "-m10", f"http://{world.relay}/")
    refused = world.lab.run("client", *curl, check=False, timeout=world.patience)
    _same("curl's exit status when it is off", refused.status, 7)
    rules = "; ".join(("nft list ruleset", "iptables-save", "iptables-legacy-save"))
    shown = world.lab.run("relay", "sh", "-c", rules, check=False, timeout=world.patience).stdout
    _same("rules of krelay's when it is off", "krelay" in shown, False)
    world.put(start=1)
    world.until_state("running")
    _curl(world)


def _move_gateway(world: World) -> None:
    world.put(gport=OTHER_GPORT)
    world.until(lambda: world.lab.is_listening("relay", "tcp", OTHER_GPORT), "the new gateway port")
    _curl(world)
    newest = max(world.flows("proto=tcp"), key=lambda flow: int(flow["id"]))
    _same("the new connection's gateway port", newest["gport"], OTHER_GPORT)


def _change_server(world: World) -> None:
    world.put(real_ip=world.lab.address("server2"))
    _dig(world, "server2")
    _curl(world, "/files/whose", "server2\n")
    world.put(real_ip=world.server)
    _curl(world, "/files/whose", "server\n")


# The table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for, and prints the table after each round."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.crossing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each (default: 1)")
    parser.add_argument("--ends", choices=ENDS, help="what client and server are (default: each)")
    parser.add_argument("--relay", choices=RELAYS, help="what the relay is (default: each)")
    parser.add_argument(
        "--datapath",
        choices=("auto", "queue"),
        default=DEFAULTS.datapath,
        help=f"the relay's setting (default: {DEFAULTS.datapath})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(arguments)
    chosen = [
        (ends, relay)
        for ends, relay in COMBINATIONS
        if options.ends in (None, ends) and options.relay in (None, relay)
    ]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in chosen}
    failures: list[str] = []
    tell = (lambda _: None) if options.quiet else _progress
    try:
        for number in range(1, options.runs + 1):
            for ends, relay in chosen:
                tell(f"run {number} of {options.runs}: {ends}, relay {relay}")
                try:
                    with _silent():
                        runs[ends, relay].append(cross(ends, relay, options.datapath, tell=tell))
                except (Wrong, LabError, TopologyError, AssertionError) as error:
                    failures.append(f"run {number}, {ends}, relay {relay}: {error}")
                    tell(failures[-1])
    except KeyboardInterrupt:
        return 130
    finally:
        print("\n".join(table(runs, options.runs)), flush=True)
    print("\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


def table(runs: dict[tuple[str, str], list[dict[str, float]]], wanted: int) -> Iterator[str]:
    """The lines of the table: median seconds of each part over the whole runs, and their count.

    >>> for line in table({("uml", "qemu"): [dict.fromkeys(PARTS, 1.0)]}, 2):
    ...     print([cell.strip() for cell in line.split("|")[1:5]])
    ['client, server', 'relay', 'whole runs', 'boot']
    ['---', '---', '---', '---']
    ['uml', 'qemu', '1 of 2', '1.0']
    """
    yield f"| client, server | relay | whole runs | {' | '.join(PARTS)} |"
    yield "|---" * (3 + len(PARTS)) + "|"
    for (ends, relay), whole in runs.items():
        medians = [
            f"{statistics.median(run[part] for run in whole):.1f}" if whole else "-"
            for part in PARTS
        ]
        yield f"| {ends} | {relay} | {len(whole)} of {wanted} | {' | '.join(medians)} |"


def _progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def _silent() -> Iterator[None]:
    """What a world prints at its end is for pytest."""
    before, sys.stdout = sys.stdout, sys.__stderr__
    try:
        with open("/dev/null", "w") as nowhere:
            sys.stdout = nowhere
            yield
    finally:
        sys.stdout = before


if __name__ == "__main__":
    sys.exit(main())
