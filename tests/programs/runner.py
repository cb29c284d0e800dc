"""The runs: one lab, one relay; a server at a time, and its clients directly and in every way."""

import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from krelay_vm import LabError, Program
from tests.net.world import GPORT, PYTHON, World
from tests.programs import packages
from tests.programs.report import Row
from tests.programs.table import PYPI, SERVERS, Client, Server
from tests.programs.ways import KINDS, Run, Way, port, read, services, unlike, wrong

PEERS = Path(__file__).with_name("peers")
FIRST_STEP = {"terminated": "T1", "forwarded": "U1", "relayed": "U1"}
OUTPUT_KEPT = 4000
ALONE = (
    "unshare", "--mount", "--propagation", "private", "sh", "-euc",
    "[ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf\n"
    'mount -t tmpfs -o mode=755 tmpfs /run; exec sh -euc "$1"',
    "sh",
)  # fmt: skip
"""Runs shell text that has a /run of its own, where this machine's programs aren't met, and waits
for no name server: there is none in the lab."""

Tell = Callable[[str], None]


def run(clients: Sequence[Client], ways: Sequence[Way], tell: Tell) -> Iterator[Row]:
    """The flows of these clients, servers in the order of the table, as they are done.

    `tell` is given a line for each run that isn't as directly, and for each client.  Needs root.
    """
    order = {name: number for number, name in enumerate(SERVERS)}
    ordered = sorted(clients, key=lambda client: order[client.server])
    there = packages.versions({name for client in clients for name in packages.needed(client)})
    with World() as world:
        world.start_krelay()
        world.put(gport=GPORT, services="tcp/80", real_ip=world.server)
        world.start_tcp_relay()
        for name, group in groupby(ordered, key=lambda client: client.server):
            yield from Trial(world, name, there, tell).flows(list(group), ways)


class Trial:
    """A server and what is tried with it."""

    def __init__(self, world: World, name: str, versions: dict[str, str], tell: Tell) -> None:
        self._world = world
        self._name = name
        self._server: Server = SERVERS[name]
        self._versions = versions
        self._tell = tell
        self._directory = world.lab.directory / f"server-{name}"
        self._runs = 0

    def flows(self, clients: Sequence[Client], ways: Sequence[Way]) -> list[Row]:
        """What became of each."""
        reasons = {client: self._why_not(client) for client in clients}
        able = [client for client in clients if not reasons[client]]
        direct: dict[Client, Run] = {}
        runs: dict[Client, dict[Way, Run]] = {client: {} for client in able}
        if able:
            try:
                program = self._serve()
            except LabError as error:
                reason = f"its server did not start: {str(error).splitlines()[0]}"
                reasons |= dict.fromkeys(able, reason)
                self._tell(f"{self._name}: {error}")
            else:
                try:
                    direct = self._directly(able)
                    self._through_the_relay(able, ways, direct, runs)
                finally:
                    self._end(program)
        return [
            Row(
                client,
                self._server,
                {name: v for name, v in self._versions.items() if name in packages.needed(client)},
                direct.get(client),
                runs.get(client),
                reasons[client] or "",
            )
            for client in clients
        ]

    def _why_not(self, client: Client) -> str | None:
        missing = [name for name in packages.needed(client) if name not in self._versions]
        if missing:
            return f"needs {', '.join(missing)}"
        if client.needs:
            done = subprocess.run(("sh", "-c", client.needs), capture_output=True, text=True)
            return (done.stdout.strip() or "it can't run here") if done.returncode else None
        return None

    def _serve(self) -> Program:
        """Raises LabError unless the server is ready in time."""
        self._directory.mkdir()
        lab, server = self._world.lab, self._server
        if server.setup:
            lab.run("server", *ALONE, server.setup, timeout=60.0, env=self._environment())
        program = lab.start("server", *ALONE, server.serve, env=self._environment())
        try:
            for word in server.services if server.ready is None else server.ready:
                lab.wait(partial(self._is_ready, program, word), word, server.seconds)
                if program.poll() is not None:
                    raise LabError(f"it ended with status {program.poll()}")
        except LabError as error:
            program.kill()
            reason = str(error).splitlines()[0]
            raise LabError(f"{reason}\n{_indented(program.output)}") from None
        return program

    def _is_ready(self, program: Program, word: str) -> bool:
        if program.poll() is not None:
            return True
        if "/" in word:
            return self._world.lab.is_listening("server", *port(word))
        return (self._directory / word).exists()

    def _end(self, program: Program) -> None:
        program.terminate()
        try:
            program.wait(2.0)
        except LabError:
            program.kill()
            program.wait()
        program.kill()  # a child may be left of it
        shutil.rmtree(self._directory, ignore_errors=True)

    def _environment(self, **more: str) -> dict[str, str]:
        python = packages.PYTHON if self._server.package in PYPI else Path(PYTHON[0])
        return {
            "SERVER": self._world.server,
            "CLIENT": self._world.client,
            "DIR": str(self._directory),
            "PYTHON": str(python),
            "PEERS": str(PEERS),
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            **more,
        }

    def _directly(self, clients: Iterable[Client]) -> dict[Client, Run]:
        self._stop()
        direct = {client: self._ask(client, self._world.server) for client in clients}
        for client, run in direct.items():
            self._report(client, "directly", run, wrong(client, run))
        return direct

    def _through_the_relay(
        self,
        clients: Iterable[Client],
        ways: Iterable[Way],
        direct: dict[Client, Run],
        runs: dict[Client, dict[Way, Run]],
    ) -> None:
        comparable = [client for client in clients if wrong(client, direct[client]) is None]
        for way in ways:
            chosen = [client for client in comparable if client.transport == KINDS[way.kind]]
            if not chosen:
                continue
            self._switch(way)
            for client in chosen:
                run = runs[client][way] = self._counted(client, way)
                self._report(client, str(way), run, unlike(client, direct[client], run))

    def _report(self, client: Client, way: str, run: Run, trouble: str | None) -> None:
        said = f": {trouble}" if trouble else ""
        self._tell(f"{client.name}: {way}, {run.seconds:.1f} s{said}")
        if trouble and not client.fails:
            self._tell(_indented(run.said))

    def _stop(self) -> None:
        self._world.put(start=0)
        self._world.until_state("stopped")

    def _switch(self, way: Way) -> None:
        self._stop()
        text = services(self._server, way.kind)
        self._world.put(services=text, datapath=way.datapath, source=way.source)
        self._world.put(start=1)
        self._world.until_state("running")
        self._world.until(
            lambda: self._world.in_kernel == (way.datapath == "auto"), "the data path"
        )

    def _counted(self, client: Client, way: Way) -> Run:
        """A run through the relay, and how many packets that counted."""
        step = FIRST_STEP[way.kind]
        before = self._world.values("counters")[step]
        done = self._ask(client, self._world.relay)

        def grown() -> int:
            return int(self._world.values("counters")[step] - before)

        try:
            packets = self._world.soon(grown, "packets")
        except (LabError, AssertionError):
            packets = 0
        return Run(done.status, done.seconds, done.found, done.lost, packets, done.said)

    def _ask(self, client: Client, to: str) -> Run:
        self._runs += 1
        here = self._directory.parent / f"run-{self._name}-{self._runs}"
        here.mkdir()
        env = self._environment(TO=to, HERE=str(here), HOME=str(here))
        try:
            result = self._world.lab.run(
                "client", *ALONE, client.ask, timeout=client.seconds, check=False, env=env
            )
        except LabError as error:
            return Run(None, client.seconds, said=str(error)[-OUTPUT_KEPT:])
        finally:
            shutil.rmtree(here, ignore_errors=True)
        done = read(client, to, result.status, result.seconds, result.stdout + result.stderr)
        return Run(done.status, done.seconds, done.found, done.lost, said=done.said[-OUTPUT_KEPT:])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-15:])
