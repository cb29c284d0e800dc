"""ufw and firewalld themselves in the relay host: what the doctor says to type there works.

Both run in the host's network and see files of their own: a copy of their settings, an empty /run
with a bus of its own.  So nothing of the machine's is read back or written.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from krelay_vm import Program, Result
from tests.net.test_doctor_firewalls import about_rules
from tests.net.world import GPORT, PYTHON, World

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("slow; test_firewall has what firewalls see"),
]

PATIENCE = 60.0
"""Seconds for what is typed: firewall-cmd takes a fifth of one, half a dozen times for a fix."""
SERVICES = "tcp/80 tcp/443=forward udp/53 udp/5000-5010"
NAME, ADDRESS = "host.example", "192.0.2.80"
COPIED = {"ufw": ("/etc/ufw", "/etc/default", "/lib/ufw"), "firewalld": ("/etc/firewalld",)}
BY = {"ufw": "ufw ", "firewalld": "firewall-cmd "}
NOT_SAID = {
    "ufw": ["iptables -w -I OUTPUT -p icmp --icmp-type destination-unreachable -j ACCEPT"],
    "firewalld": [],
}
"""What its own commands can't say: ufw's know no ICMP."""
RELOAD = {"ufw": "ufw reload", "firewalld": "firewall-cmd --reload"}
DEFAULTS = {
    "ufw": (
        f"tcp from clients to port {GPORT} is dropped by the policy of iptables -t filter chain "
        "INPUT (T1, input)",
        "tcp to the server to port 443 is dropped by the policy of iptables -t filter chain "
        "FORWARD (U1, forward)",
        "udp to the server to port 53,5000-5010 is dropped by the policy of iptables -t filter "
        "chain FORWARD (U1, forward)",
    ),
    "firewalld": (
        f"tcp from clients to port {GPORT} is dropped by `reject with icmpx admin-prohibited` in "
        "nft chain inet firewalld filter_IN_public (T1, input)",
        "tcp to the server to port 443 is dropped by `reject with icmpx admin-prohibited` in "
        "nft chain inet firewalld filter_FWD_public (U1, forward)",
        "udp to the server to port 53,5000-5010 is dropped by `reject with icmpx "
        "admin-prohibited` in nft chain inet firewalld filter_FWD_public (U1, forward)",
    ),
}
"""What is told of their defaults: nothing comes in, nothing is forwarded."""
CLIENTS = "172.20.5.0/24"
REFUSALS = {
    "ufw": (
        f"ufw deny {GPORT}/tcp",
        f"ufw reject from {CLIENTS}",
        f"ufw route reject from {CLIENTS}",
        "ufw route deny proto udp to any port 53",
        "ufw default deny outgoing",
    ),
    "firewalld": (
        f"firewall-cmd --permanent --add-rich-rule='rule family=ipv4 source address={CLIENTS} "
        "reject'",
        "firewall-cmd --permanent --new-policy=none",
        "firewall-cmd --permanent --policy=none --add-ingress-zone=ANY",
        "firewall-cmd --permanent --policy=none --add-egress-zone=ANY",
        "firewall-cmd --permanent --policy=none --set-priority=-500",
        "firewall-cmd --permanent --policy=none --set-target=DROP",
        "firewall-cmd --reload",
    ),
}
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


class Host:
    """The relay host with one of the tools in it, started as it comes."""

    def __init__(self, world: World, tool: str) -> None:
        self.world = world
        copies = "".join(
            f"mount -t tmpfs none /mnt && cp -a {path}/. /mnt && mount --move /mnt {path} && "
            for path in COPIED[tool]
        )
        script = (
            f"{copies} mount -t tmpfs none /run && mkdir /run/dbus && echo ready && exec sleep inf"
        )
        unshare = ("unshare", "--mount", "--propagation", "private")
        self._files = world.lab.start("relay", *unshare, "sh", "-c", script)
        world.until(lambda: "ready\n" in self._files.output, "files of its own")
        if tool == "ufw":
            self.type("ufw --force enable")
        else:
            config = world.lab.directory / "bus.conf"
            config.write_text(BUS)
            self._start("dbus-daemon", "--nofork", "--nopidfile", f"--config-file={config}")
            bus = Path(f"/proc/{self._files.pid}/root/run/dbus/system_bus_socket")
            world.until(bus.exists, "the bus")
            self._start("firewalld", "--nofork", "--nopid")
            world.until(
                lambda: self.type("firewall-cmd --state", check=False).status == 0,
                "firewalld",
                timeout=PATIENCE,
            )

    def type(self, command: str, *, check: bool = True) -> Result:
        """A line in a root shell there."""
        return self.world.lab.run(
            "relay", *self._enter("sh", "-c", command), timeout=PATIENCE, check=check
        )

    def doctor(self) -> tuple[int, list[dict[str, Any]]]:
        """The command's exit status, and its findings on the host's rules that aren't ok."""
        words = ("-m", "krelay", "doctor", "--root", str(self.world.root), "--json")
        command = self._enter(*PYTHON, *words, "--client", self.world.client)
        done = self.world.lab.run("relay", *command, timeout=PATIENCE, check=False)
        return done.status, about_rules([json.loads(line) for line in done.stdout.splitlines()])

    def fixed(self) -> list[str]:
        """Types what the doctor says until it says no more; all the fixes."""
        typed: list[str] = []
        for _ in range(3):
            status, wrong = self.doctor()
            if not wrong:
                assert status == 0
                return typed
            for finding in wrong:
                self.type(finding["fix"])
                typed.append(finding["fix"])
        pytest.fail(f"still not ok after {typed}: {wrong}")

    def _start(self, *argv: str) -> Program:
        return self.world.lab.start("relay", *self._enter(*argv))

    def _enter(self, *argv: str) -> tuple[str, ...]:
        return ("nsenter", "--mount", f"--target={self._files.pid}", "--wd=/", "--", *argv)


@contextmanager
def host_with(world: World, tool: str) -> Iterator[Host]:
    """Relaying, and the tool beside it; what it is told must not reach the machine's own files."""
    for program in (tool, *(("dbus-daemon",) if tool == "firewalld" else ())):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    world.begin(services=SERVICES)
    before = {path: contents(path) for path in COPIED[tool]}
    yield Host(world, tool)
    assert {path: contents(path) for path in COPIED[tool]} == before
    assert all(before.values())


def contents(folder: str) -> dict[Path, bytes]:
    """Every file below."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def served(world: World) -> World:
    """nginx at 80 and 443, dnsmasq at 53."""
    world.nginx("server", 80, 443)
    world.dnsmasq("server", 53, {NAME: ADDRESS})
    return world


def passing(world: World, within: float) -> dict[str, bool]:
    """What of HTTP, HTTP that is forwarded, and DNS is answered."""
    base = ("curl", "-s", "-m", f"{within}")
    dig = ("dig", "+short", "+tries=1", f"+timeout={max(1, int(within))}", f"@{world.relay}", NAME)
    asked: dict[str, Callable[[], Result]] = {
        "tcp": lambda: world.lab.run("client", *base, f"http://{world.relay}/a", check=False),
        "forwarded": lambda: world.lab.run(
            "client", *base, f"http://{world.relay}:443/a", check=False
        ),
        "udp": lambda: world.lab.run("client", *dig, check=False),
    }
    return {name: ask().stdout.strip() in ("/a", ADDRESS) for name, ask in asked.items()}


NOTHING = dict.fromkeys(("tcp", "forwarded", "udp"), False)
ALL = dict.fromkeys(NOTHING, True)


@pytest.mark.parametrize("tool", COPIED)
def test_the_doctors_mends_work_as_they_are_printed_and_last(served: World, tool: str) -> None:
    with host_with(served, tool) as host:
        assert passing(served, 0.5) == NOTHING
        status, wrong = host.doctor()
        shown = "\n".join(finding["text"] for finding in wrong)
        assert status == 1
        for words in DEFAULTS[tool]:
            assert words in shown
        told = [finding["fix"] for finding in wrong]
        assert all(fix.startswith(BY[tool]) for fix in told), told

        assert host.fixed() == told  # one round
        assert passing(served, 5) == ALL
        host.type(RELOAD[tool])
        assert passing(served, 5) == ALL
        assert host.doctor() == (0, [])


@pytest.mark.parametrize("tool", COPIED)
def test_rules_of_the_tools_users_are_overcome_by_the_tool(served: World, tool: str) -> None:
    """What they refuse comes before what is let by; ports are more than one rule can hold."""
    many = " ".join(f"udp/{port}" for port in range(6001, 6036, 2))
    with host_with(served, tool) as host:
        served.put(services=f"{SERVICES} {many}")
        for command in REFUSALS[tool]:
            host.type(command)

        assert passing(served, 0.5) == NOTHING
        typed = host.fixed()
        by_others = [fix for fix in typed if not fix.startswith(BY[tool])]
        assert by_others == NOT_SAID[tool]
        assert passing(served, 5) == ALL
        host.type(RELOAD[tool])
        assert passing(served, 5) == ALL
