"""`krelay demo`: a client, a relay and a server on this one machine, and what happens between them.

The three hosts are network namespaces (krelay_vm.Lab), or with `--vm` virtual machines, each with a
kernel of its own: nothing of this machine's own network is touched.  On the server run dnsmasq and
nginx as anybody has them, on the relay the two daemons as a service manager would start them; what
is done with them is done as a person would, with echo, dig and curl, and shown.  Meanwhile both
wires are captured.  What is then claimed is not what the demo knows it has set up but what was
seen (evidence.py).

Leaving by whatever way (the end, a failure, Ctrl-C, SIGTERM) closes the lab, and with it goes
everything: all programs run inside it, and all files are in its directory.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from rich.console import Console

from knet import children
from krelay.demo import evidence, servers
from krelay.demo.evidence import Cast, Check, ShownStep
from krelay.demo.page import DemoFailed, Page, console, nat_table, step_table
from krelay.demo.witnesses import Witnesses
from krelay_vm import DEFAULT, Lab, LabError, LabTimeout, Program, draw, guest, netns
from procfs_sim import DEFAULT_ROOT

TOOLS = ("dnsmasq", "nginx", "dig", "curl", "socat")
LEGEND = "What no wire shows is between kernel and tcp-relay, inside the relay."
LEGEND_OF_FLAGS = "Beside the counts TCP's flags: S SYN, . ACK, P PSH, F FIN, R RST."
START_WITHIN = {"netns": 20.0, "uml": 60.0, "qemu": 120.0}
SETTLE_WITHIN = {"netns": 3.0, "uml": 10.0, "qemu": 20.0}
"""Seconds.  Both take milliseconds, and seconds under emulation; these are for busy machines."""
LISTERS = ("nft list ruleset", "iptables-save", "iptables-legacy-save")
HOSTS = {
    "netns": "three hosts in network namespaces on this one machine",
    "uml": "three virtual machines (User-Mode Linux), each with a kernel of its own",
    "qemu": "three virtual machines (QEMU, emulated PCs), each with a kernel of its own",
}


def run(args: argparse.Namespace) -> int:
    """Runs the demo; the exit status: 0 if every check held.

    `args.keep`: relay again at the end, and wait for Enter before cleaning up.  `args.vm`: the
    backend of all hosts, `uml` or `qemu`; None for namespaces.  KeyboardInterrupt passes through,
    after everything is cleaned up.
    """
    try:
        _look_for_tools()
        return _run(console(), args.vm or guest.BACKENDS[0], keep=args.keep)
    except (DemoFailed, LabError) as error:
        print(f"krelay demo: {error}", file=sys.stderr)
    except OSError as error:
        print(f"krelay demo: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("krelay demo: interrupted; everything is removed", file=sys.stderr)
        raise
    return 1


def _look_for_tools() -> None:
    if os.geteuid() != 0:
        raise DemoFailed("needs root (network namespaces); try: sudo krelay demo")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise DemoFailed(f"{', '.join(missing)} not installed; `make demo` installs what it needs")


def _run(console: Console, backend: str, *, keep: bool) -> int:
    page = Page(console)
    page.text(f"krelay demo: {HOSTS[backend]}", "bold")
    page.text(f"\n  {draw(DEFAULT).splitlines()[0]}\n")
    with ExitStack() as held:
        with page.step(f"three hosts are there: {backend}"):
            lab = held.enter_context(Lab(DEFAULT, backends=backend))
        play = Play(lab, page, backend)
        with closing(play):
            play.set_up()
            play.ask()
            play.show_the_way()
            play.switch_off()
            if keep:
                play.wait_for_enter()
        remains = [Path(lab.record.directory), *(netns.RUN / n for n in lab.record.namespaces)]
    left = [str(path) for path in remains if path.exists()]
    left += [str(program) for program in lab.programs if program.poll() is None]
    left += [f"the machine {host}" for host in lab.backends if lab.alive(host)]
    page.check(Check("programs, namespaces and files of the demo are gone", not left, str(left)))
    return page.verdict()


class Play:
    """The demo in a lab, act by act.  Close it before the lab."""

    def __init__(self, lab: Lab, page: Page, backend: str) -> None:
        self._lab = lab
        self._page = page
        self._backend = backend
        # Sockets are of one kernel: a machine's file tree lies in its own file system.
        self._root = Path(DEFAULT_ROOT) if lab.backends else lab.directory / "run"
        self._cast = Cast(
            client=lab.address("client"),
            relay=lab.address("relay", towards="server"),
            server=lab.address("server"),
            gport=16000,
        )
        # Neither root's own settings nor a proxy have a say in what dig and curl do here.
        self._env = {"HOME": str(lab.directory), "no_proxy": "*", "PYTHONDONTWRITEBYTECODE": "1"}
        self._seen = Witnesses(lab, self._root, self._cast)

    def close(self) -> None:
        """Closes the captures and the trace."""
        self._seen.close()

    # The acts

    def set_up(self) -> None:
        """Both servers, both daemons, and the switch."""
        lab, page, cast = self._lab, self._page, self._cast
        with page.step(f"the hosts are wired: {lab.name}-client, -relay, -server"):
            serving = [lab.start("server", *command) for command in servers.commands(lab, cast)]
            daemons = [
                self._start_daemon("krelay", "daemon"),
                self._start_daemon("tcp_relay"),
            ]
        with page.step(f"server: nginx serves tcp/{cast.http}, dnsmasq udp/{cast.dns}"):
            for proto, number in (("tcp", cast.http), ("udp", cast.dns)):
                self._wait_for(serving, proto, number)
        with page.step(f"relay: krelay and tcp-relay run; file tree {self._root}"):
            self._wait_for(daemons, "tcp", cast.gport)
            self._wait(self._tcp_relay_is_connected, "tcp-relay at the relay socket", daemons)
        with page.step(f"relay: switched on, relaying to {cast.server}"):
            for value, name in ((cast.server, "real_ip"), ("1", "start")):
                self._echo(value, name)
            self._wait(self._is_running, "relaying", daemons)
        self._show_echo(cast.server, "real_ip")
        self._show_echo("1", "start")

    def ask(self) -> None:
        """The client asks the relay's address, watched by captures and trace."""
        lab, page, cast = self._lab, self._page, self._cast
        self._wait(self._seen.is_traced, "a trace", [self._seen.watch()])
        dig = f"dig +short +tries=1 +time=3 @{cast.relay} {servers.NAME}"
        curl = f"curl -sS --max-time 5 http://{cast.relay}/"
        with page.step("client: asks the relay's address, the only one it knows"):
            self._dug = lab.run("client", *dig.split(), check=False, env=self._env)
            self._curled = lab.run("client", *curl.split(), check=False, env=self._env)
        page.command("$", dig, self._dug.stdout + self._dug.stderr)
        page.command("$", curl, self._curled.stdout + self._curled.stderr)
        with suppress(LabTimeout):  # what is missing is told by the checks
            lab.wait(self._seen.is_settled, "both conversations over", SETTLE_WITHIN[self._backend])

    def show_the_way(self) -> None:
        """What became of the packets, by all witnesses."""
        page, cast = self._page, self._cast
        flows = self._seen.flows()
        tcp_flow, udp_flow = (evidence.flow_of(flows, proto) for proto in ("tcp", "udp"))
        relayed = {"server": f"{cast.server}:{cast.http}", "source": "client", "gport": cast.gport}
        tabled = [
            evidence.tabled(
                "the NAT table has the HTTP connection, both its legs ended in order",
                tcp_flow,
                {"service": f"{cast.relay}:{cast.http}", "state": "closed", **relayed},
            ),
            evidence.tabled(
                "the NAT table has the DNS query, answered",
                udp_flow,
                {
                    "service": f"{cast.relay}:{cast.dns}",
                    "server": f"{cast.server}:{cast.dns}",
                    "state": "replied",
                },
            ),
        ]
        if tcp_flow and udp_flow:
            self._show_steps(evidence.steps(cast, tcp_flow, udp_flow))
        page.title("NAT table (as `krelay nat` shows it)")
        page.table(nat_table(flows))
        for check in tabled:
            page.check(check)
        if tcp_flow and udp_flow:
            self._show_logs(evidence.port(tcp_flow["relay"]), evidence.port(udp_flow["client"]))

    def _show_steps(self, steps: Sequence[ShownStep]) -> None:
        page, cast, wires, trace = self._page, self._cast, self._seen.wires, self._seen.trace()
        page.title("Each packet, before and after (=>), and where it was seen")
        page.table(step_table(steps, wires, wide=page.wide))
        page.text(f"{LEGEND}\n{LEGEND_OF_FLAGS}\n" if page.wide else LEGEND + "\n", "dim", indent=2)
        for step in steps:
            page.check(evidence.rewritten(step, trace, wires))
        for claim, name, other in (
            (
                "the client talks to the relay alone: no other address on its wire",
                "client",
                "relay",
            ),
            (
                "the server talks to the client alone: no other address on its wire",
                "server",
                "client",
            ),
        ):
            both = {"client": cast.client, "relay": cast.relay, "server": cast.server}
            wire = wires[name]
            page.check(evidence.only_between(claim, wire, both[name], both[other]))
        claim = f"the gateway port {cast.gport} is seen on no wire"
        page.check(evidence.unseen(claim, wires, cast.gport))
        page.check(evidence.sound("checksums of all that arrives are right", wires))

    def _show_logs(self, relay_port: int, dns_port: int) -> None:
        page, cast = self._page, self._cast
        http, dns = self._seen.logs()
        page.title("What the server says: its answers, and its own logs")
        page.text(f"dnsmasq  {dns}\nnginx    {http}\n", indent=2)
        printed = self._dug.stdout
        page.check(
            evidence.answers(
                f"the DNS answer is the server's: {servers.ADDRESS}", printed, servers.ADDRESS
            )
        )
        asked_from = f"{cast.client}/{dns_port}"
        claim = f"dnsmasq was asked by {asked_from}: the client, as it sent"
        page.check(evidence.logged(claim, dns, asked_from))
        asked_from = f"{cast.client}:{relay_port}"
        printed = self._curled.stdout
        claim = "the HTTP answer is the server's, which tells who asked"
        page.check(evidence.answers(claim, printed, servers.greeting(asked_from)))
        claim = f"nginx was asked by {asked_from}: client's address, relay's own port"
        page.check(evidence.logged(claim, http, asked_from))

    def switch_off(self) -> None:
        """The relay is out of the way."""
        lab, page, cast = self._lab, self._page, self._cast
        page.title("Switched off")
        with page.step("relay: switched off"):
            self._echo("0", "start")
            self._wait(lambda: self._state() == "stopped", "relaying stopped", [])
        self._show_echo("0", "start")
        listings = []
        for lister in LISTERS:
            if shutil.which(lister.split()[0]):
                listed = lab.run("relay", *lister.split(), check=False)
                if listed.status == 0:  # else the kernel doesn't have that kind of rules
                    listings.append(listed.stdout)
                    page.command("#", lister, listed.stdout)
        self._seen.drain()
        self._seen.forget()
        by_relay, direct = (
            f"curl -sS --max-time 5 http://{host}/" for host in (cast.relay, cast.server)
        )
        refused = lab.run("client", *by_relay.split(), check=False, env=self._env)
        page.command("$", by_relay, refused.stdout + refused.stderr)
        self._seen.drain()
        no_way = list(self._seen.wires["client"])
        self._seen.forget()
        answered = lab.run("client", *direct.split(), check=False, env=self._env)
        page.command("$", direct, answered.stdout + answered.stderr)
        self._seen.drain()
        ports = {p.src.port for p in self._seen.wires["client"] if not p.arrived and p.flags == "S"}
        asked_from = f"{cast.client}:{ports.pop() if len(ports) == 1 else '?'}"
        wanted = servers.greeting(asked_from)
        page.check(evidence.no_rules("no rule is left on the relay", listings))
        at = (cast.relay, cast.http)
        claim = f"{cast.relay}:{cast.http} is the relay host's own again, and nobody listens there"
        page.check(evidence.refused(claim, refused.status, no_way, *at))
        claim = f"directly the server answers: it is asked by {asked_from}, as sent"
        page.check(evidence.answers(claim, answered.stdout, wanted))

    def wait_for_enter(self) -> None:
        """Relays again until Enter is pressed, and says how to look around."""
        page, cast = self._page, self._cast
        self._echo("1", "start")
        self._wait(self._is_running, "relaying", [])
        python = shlex.quote(sys.executable)
        vm, name = f"{python} -m krelay_vm", f"--name {self._lab.name}"
        krelay = f"{vm} exec {name} relay {python} -m krelay"
        page.title("Relaying again until you press Enter. In another terminal, as root:")
        for command in (
            f"{vm} exec {name} client curl http://{cast.relay}/",
            f"{krelay} trace --root {self._root}",
            f"{krelay} nat --root {self._root}",
            f"{vm} console {name} relay",
        ):
            page.command("#", command)
        with suppress(EOFError):
            input()

    # Programs

    def _start_daemon(self, module: str, *arguments: str) -> Program:
        command = children.python(module, *arguments, "--root", str(self._root))
        return self._lab.start("relay", *command, env=self._env)

    def _wait_for(self, programs: Sequence[Program], proto: str, port: int) -> None:
        host = programs[0].host
        self._wait(
            lambda: self._lab.is_listening(host, proto, port),
            f"{host} listening at {proto}/{port}",
            programs,
        )

    def _wait(self, condition: Callable[[], bool], what: str, programs: Sequence[Program]) -> None:
        """Waits for a condition, but not longer than these programs live."""

        def holds() -> bool:
            for program in programs:
                if (status := program.poll()) is not None:
                    name = _name(program)
                    last = (program.output.strip().splitlines() or [f"exit status {status}"])[-1]
                    raise DemoFailed(f"{name} ended on the {program.host}: {last}")
            return condition()

        self._lab.wait(holds, what, START_WITHIN[self._backend])

    def _tcp_relay_is_connected(self) -> bool:
        status = self._seen.ask("show status json")
        return bool(status and status[0]["gateway_port"] == "served")

    # The file tree

    def _echo(self, value: str, name: str) -> None:
        self._lab.run("relay", "sh", "-c", f"echo {value} > {self._root / name}")

    def _show_echo(self, value: str, name: str) -> None:
        self._page.command("#", f"echo {value} > {self._root / name}")

    def _state(self) -> str:
        path = str(self._root / "status" / "state")
        return self._lab.run("relay", "cat", path, check=False).stdout.strip()

    def _is_running(self) -> bool:
        state = self._state()
        if state.startswith("failed: "):
            raise DemoFailed(f"relaying can't start: {state.removeprefix('failed: ')}")
        return state == "running"


def _name(program: Program) -> str:
    """What to call a program: tcp-relay and krelay are modules of ours (children.python)."""
    argv = program.argv
    if argv[0] != sys.executable:
        return Path(argv[0]).name
    return argv[len(children.python("")) - 1].replace("_", "-")
