"""What `krelay doctor` says of a set-up that isn't written yet, and whom it takes for tcp-relay."""

import json
import shlex
from typing import Any

import pytest

from krelay_vm import Program
from tests.net.test_doctor import finding, listen
from tests.net.test_doctor_firewalls import about_rules
from tests.net.world import GPORT, PYTHON, SERVICES, World

pytestmark = [pytest.mark.net, pytest.mark.one_datapath("what it finds is the host's")]


def asked(world: World, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """`krelay doctor --json` with these options: its exit status and its findings."""
    done = world.krelay("doctor", "--json", *options, check=False)
    return done.status, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_set_up_is_checked_before_there_is_a_tree(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    options = ("--real-ip", world.server, "--services", "tcp/80", "udp/7", "--gport", "17000")
    status, findings = asked(world, *options, "--client", world.client)

    assert status == 0
    assert [f for f in findings if f["level"] in ("warning", "failed")] == []
    shown = finding(findings, "settings")["text"]
    assert shown.startswith(f"real_ip {world.server}, gport 17000, services tcp/80 udp/7, source")
    assert finding(findings, "return")["text"].endswith("came back here")
    assert not world.root.exists()


def test_what_would_stop_it_is_told_and_nothing_of_the_values_in_force(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.start_krelay()
    world.put(gport=GPORT, services="tcp/80", real_ip=world.server)
    world.start_tcp_relay()
    other = listen(world, 17000)
    world.nft(
        "relay",
        "table ip t { chain c { type filter hook input priority 0; policy drop;\n"
        f"tcp dport {GPORT} accept\nct state established accept\n}}\n"
        "chain f { type filter hook forward priority 0; policy drop;\n}\n}\n",
    )
    assert finding(asked(world)[1], "firewall")["level"] == "ok"
    status, findings = asked(
        world, "--gport", "17000", "--services", "tcp/80 udp/7", "--real-ip", "203.0.113.9"
    )

    assert status == 1
    assert finding(findings, "gateway port")["fix"] == f"kill {other.pid}"
    assert finding(findings, "server")["text"].endswith("no route to the server, 203.0.113.9")
    told = [f["text"] for f in about_rules(findings)]
    assert any("to port 17000 is dropped" in text for text in told)
    assert any("udp from clients" in text or "(U1, forward)" in text for text in told)
    assert world.read("gport") == str(GPORT)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--gport", "80", "--services", "tcp/80"), 1, "'80' is a relayed service port (tcp/80)"),
        (("--real-ip", "10.77.3.2"), 1, "it is an address of this host"),
        (("--source", "relay"), None, "source relay"),
    ],
)
def test_values_that_do_not_go_together_are_told(
    world: World, options: tuple[str, ...], status: int | None, words: str
) -> None:
    found, findings = asked(world, *options)

    assert status is None or found == status
    assert any(words in f["text"] for f in findings)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--gport", "x"), "gport: 'x' is not a port (1-65535)"),
        (("--services", "tcp/22"), "services: 'tcp/22' would relay ssh"),
        (("--real-ip", "::1"), "real_ip: '::1' is not an IPv4 address"),
    ],
)
def test_a_value_that_is_none_is_refused(
    world: World, options: tuple[str, ...], reason: str
) -> None:
    done = world.krelay("doctor", *options, check=False)

    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith(f"krelay doctor: {reason}")


# Whose is the gateway port


def tcp_relay(world: World, script: str) -> Program:
    """tcp-relay as this shell text starts it, in the lab's directory."""
    program = world.lab.start(
        "relay", "sh", "-c", f"cd {shlex.quote(str(world.lab.directory))}; exec {script}"
    )
    world.until(lambda: "listening gport=" in program.output, "tcp-relay listening")
    return program


@pytest.mark.parametrize(
    "script",
    [
        "{python} -m tcp_relay --root run",
        "{python} -m tcp_relay --root=./run/../run/",
        "{python} -m tcp_relay --root link",
        "env KRELAY_ROOT=run {python} -m tcp_relay",
        "{python} -X dev -W ignore -m tcp_relay --roo run --workers 2",
    ],
)
@pytest.mark.parametrize("served", [True, False])
def test_our_own_tcp_relay_is_never_a_stranger(world: World, script: str, served: bool) -> None:
    (world.lab.directory / "link").symlink_to(world.root)
    world.start_krelay()
    world.put(gport=GPORT, services=SERVICES, real_ip=world.server)
    tcp_relay(world, script.format(python=shlex.join(PYTHON)))
    if served:
        world.until(lambda: world.values("status")["gateway_port"] == "served", "served")
    else:
        world.kill(world.krelay_process)
    for root in (world.root, world.lab.directory / "link"):
        script = f"cd {root.parent}; {shlex.join(PYTHON)} -m krelay doctor --root {root.name}"
        shown = world.lab.run("relay", "sh", "-c", script, check=False).stdout.splitlines()
        (line,) = [line for line in shown if " gateway port " in line]
        assert line.startswith("ok "), line


def test_a_tcp_relay_of_another_tree_is_a_stranger(world: World) -> None:
    other = world.lab.directory / "other"
    krelay = world.start_krelay(tree=other)
    world.write("gport", "16000", other)
    program = tcp_relay(world, f"{shlex.join(PYTHON)} -m tcp_relay --root other")
    told = finding(asked(world)[1], "gateway port")

    assert told["level"] == "failed"
    assert told["fix"] in [f"kill {each.pid}" for each in (program, krelay)]  # both have it open


def test_the_rules_of_a_tree_are_its_own_by_each_of_its_names(world: World) -> None:
    before = world.rules()
    link = world.lab.directory / "link"
    link.symlink_to(world.root)
    world.begin()
    for program in (world.krelay_process, world.tcp_relay_process):
        world.kill(program)
    assert world.rules() != before
    done = world.lab.run(
        "relay", *PYTHON, "-m", "krelay", "clean", "--keep-settings", "--root", str(link)
    )

    assert "removed rules of krelay-" in done.stdout
    assert world.rules() == before
