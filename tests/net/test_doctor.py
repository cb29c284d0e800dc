"""`krelay doctor` in the relay host: each fault is made on purpose, named, fixed as printed."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from krelay_vm import Program
from tests.net.test_doctor_firewalls import doctor, type_as_root
from tests.net.world import GPORT, PYTHON, SERVICES, World

pytestmark = [pytest.mark.net, pytest.mark.one_datapath("what it finds is the host's")]


def finding(findings: list[dict[str, Any]], check: str) -> dict[str, Any]:
    """The gravest of that check."""
    grave = ["ok", "not tried", "warning", "failed"]
    return max((f for f in findings if f["check"] == check), key=lambda f: grave.index(f["level"]))


def sysctl(world: World, *settings: str) -> None:
    """In the relay host's namespace."""
    world.lab.run("relay", "sysctl", "-q", "-w", *settings)


def listen(world: World, port: int, address: str = "0.0.0.0") -> Program:
    """A server of the relay's own, which has nothing to do with krelay."""
    program = world.lab.start(
        "relay", sys.executable, "-m", "http.server", "--bind", address, str(port)
    )
    world.lab.wait_listening("relay", "tcp", port)
    return program


@pytest.fixture
def ready(world: World) -> World:
    """A server, and krelay not yet relaying."""
    world.serve("server", "tcp/80", "udp/7")
    world.start_krelay()
    world.put(gport=GPORT, services=SERVICES, real_ip=world.server)
    return world


def begin(world: World) -> None:
    """tcp-relay as well, and relaying."""
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")


def works(world: World) -> bool:
    """Whether a client is served and seen, by TCP and UDP."""
    return world.who("client", 80).startswith(f"{world.client}:") and world.who_udp(
        "client", 7
    ).startswith(f"{world.client}:")


def test_a_host_in_order_is_ok_before_and_while_it_relays(ready: World) -> None:
    before = ready.rules()
    for number in range(2):
        status, findings = doctor(ready, ready.client)
        wrong = [f for f in findings if f["level"] != "ok"]
        if number == 0:
            (told,) = wrong
            assert told["check"] == "krelay"
            assert "no tcp-relay" in told["text"]
            begin(ready)
        else:
            assert wrong == []
        assert status == 0
    assert finding(findings, "return")["text"].endswith("came back here")
    assert works(ready)
    ready.krelay("stop")
    assert ready.rules() == before
    shown = ready.krelay("doctor").stdout
    assert shown.startswith("ok       privileges")
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == len(findings)


def test_forwarding_that_is_off_is_mended_by_fix(ready: World) -> None:
    sysctl(ready, "net.ipv4.ip_forward=0")
    begin(ready)
    status, findings = doctor(ready)
    told = finding(findings, "forwarding")
    assert (status, told["level"], told["safe"]) == (1, "failed", True)
    with ready.open("client", socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.3)
        with pytest.raises(OSError):  # noqa: PT011  a timeout, or ICMP from whoever
            ready.exchange(sock, b"who", (ready.relay, 7))

    done = ready.krelay("doctor", "--fix")
    assert done.stdout.splitlines()[0] == f"ran {told['fix']}"
    assert "failed" not in done.stdout
    assert works(ready)


def test_a_link_that_does_not_forward_is_named(ready: World) -> None:
    sysctl(ready, "net.ipv4.conf.eth0.forwarding=0")
    begin(ready)
    status, findings = doctor(ready)
    told = finding(findings, "forwarding")
    assert (status, told["level"]) == (1, "failed")
    assert "eth0" in told["text"]
    type_as_root(ready, told["fix"])

    assert finding(doctor(ready)[1], "forwarding")["level"] == "ok"
    assert works(ready)


def test_a_strict_rp_filter_that_drops_clients_of_another_link_is_loosened(ready: World) -> None:
    """The client's packets come by a second cable, while the route to it leads by the first."""
    begin(ready)
    client = ready.lab.namespace("client")
    ready.lab.run("relay", "ip", "link", "add", "side", "type", "veth", "peer", "name", "side",
                  "netns", client)  # fmt: skip
    for host, number in (("relay", 1), ("client", 2)):
        ready.lab.run(host, "ip", "addr", "add", f"198.18.0.{number}/24", "dev", "side")
        ready.lab.run(host, "ip", "link", "set", "side", "up")
    ready.lab.run("client", "ip", "route", "add", f"{ready.relay}/32", "via", "198.18.0.1",
                  "src", ready.client)  # fmt: skip
    ready.lab.run("client", "sysctl", "-q", "-w", "net.ipv4.conf.side.arp_announce=2")
    sysctl(ready, "net.ipv4.conf.side.rp_filter=1", "net.ipv4.conf.eth1.rp_filter=1")
    with ready.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind((ready.client, 0))
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ready.exchange(sock, b"who", (ready.relay, 7))

    _, findings = doctor(ready, ready.client)
    told = finding(findings, "rp_filter")
    assert told["level"] == "warning"
    assert "side" in told["text"]
    done = ready.krelay("doctor", "--fix")
    assert f"ran {told['fix']}" in done.stdout
    assert works(ready)
    assert finding(doctor(ready)[1], "rp_filter")["level"] == "ok"


def test_a_server_that_no_route_leads_to_is_told_by_doctor_and_start(ready: World) -> None:
    ready.put(real_ip="203.0.113.9")
    begin(ready)
    ready.krelay("stop")
    status, findings = doctor(ready)
    told = finding(findings, "server")
    assert (status, told["level"]) == (1, "failed")
    assert told["fix"] == "ip route add 203.0.113.9 via GATEWAY"
    done = ready.krelay("start")
    assert "failed  server  there is no route to the server, 203.0.113.9" in done.stderr
    type_as_root(ready, told["fix"].replace("GATEWAY", ready.server))

    assert finding(doctor(ready)[1], "server")["level"] == "ok"


def test_a_server_whose_answers_go_another_way_is_found_out_by_asking_it(ready: World) -> None:
    neighbour = ready.lab.address("neighbour")
    ready.lab.run("server", "ip", "route", "replace", "default", "via", neighbour)
    begin(ready)
    status, findings = doctor(ready, ready.client)
    told = finding(findings, "return")
    assert (status, told["level"]) == (1, "failed")
    type_as_root(ready, told["fix"])

    assert finding(doctor(ready, ready.client)[1], "return")["level"] == "ok"
    assert ready.who("client", 80).startswith(f"{ready.relay}:")
    assert ready.who_udp("client", 7).startswith(f"{ready.relay}:")


def test_the_probe_asks_a_port_where_echo_is_not_answered(ready: World) -> None:
    ready.nft(
        "server",
        "table ip t { chain c { type filter hook input priority 0;\n"
        "icmp type echo-request drop;\n}\n}\n",
    )
    told = finding(doctor(ready, ready.client)[1], "return")
    assert (told["level"], "came back" in told["text"]) == ("ok", True)
    ready.nft("server", "add rule ip t c tcp dport 80 drop\nadd rule ip t c tcp dport 443 drop\n")
    told = finding(doctor(ready, ready.client)[1], "return")
    assert (told["level"], "can't tell" in told["text"]) == ("warning", True)


def test_a_gateway_port_in_use_keeps_relaying_from_beginning(ready: World) -> None:
    other = listen(ready, GPORT)
    before = ready.rules()
    _, findings = doctor(ready)
    told = finding(findings, "gateway port")
    assert told["level"] == "failed"
    assert told["fix"] == f"kill {other.pid}"
    done = ready.krelay("start", check=False)
    assert done.status == 1
    assert f"port {GPORT} is in use by python" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith(told["fix"])
    assert ready.read("start") == "0"
    ready.write("start", "1")
    ready.until(lambda: ready.read("status/state").startswith("failed: "), "failed")
    assert f"port {GPORT}, the gateway port, is in use by python" in ready.read("status/state")
    assert ready.rules() == before

    type_as_root(ready, told["fix"])
    other.wait()
    assert finding(doctor(ready)[1], "gateway port")["level"] == "ok"
    begin(ready)
    assert works(ready)


def test_up_says_what_is_wrong_before_it_relays(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    sysctl(world, "net.ipv4.ip_forward=0")
    world.nft(
        "relay", "table ip t { chain c { type filter hook input priority 0; policy drop; }\n}\n"
    )
    command = (*PYTHON, "-m", "krelay", "up", "--root", str(world.root), "--gport", str(GPORT))
    program = world.lab.start("relay", *command, "--real-ip", world.server)
    world.until(lambda: "Ctrl-C ends it" in program.output or program.poll() is not None, "up")
    said, _, _ = program.output.partition("Ctrl-C ends it")
    for words in ("failed  forwarding  ", "failed  firewall  ", "fix: nft insert rule ip t c"):
        assert words in said
    program.terminate()
    assert program.wait() == 130


def test_a_server_on_a_relayed_port_and_one_on_the_loopback(ready: World) -> None:
    hidden, local = listen(ready, 80), listen(ready, 443, "127.0.0.1")
    begin(ready)
    status, findings = doctor(ready)
    told = finding(findings, "services")
    assert (status, told["level"], told["fix"]) == (0, "warning", f"kill {hidden.pid}")
    assert works(ready)
    type_as_root(ready, told["fix"])
    hidden.wait()

    told = finding(doctor(ready)[1], "services")
    assert told["level"] == "ok"
    assert "on the loopback alone" in told["text"]
    local.terminate()


def test_what_a_killed_krelay_left_is_removed_and_the_settings_stay(ready: World) -> None:
    before = ready.rules()
    begin(ready)
    for program in (ready.krelay_process, ready.tcp_relay_process):
        ready.kill(program)
    status, findings = doctor(ready)
    told = finding(findings, "leftovers")
    assert (status, told["level"], told["safe"]) == (0, "warning", True)
    assert "krelay-" in told["text"]
    done = ready.krelay("doctor", "--fix", "--json")
    assert json.loads(done.stdout.splitlines()[0]) == {"ran": told["fix"], "failure": None}

    assert ready.rules() == before
    assert ready.read("real_ip") == ready.server
    assert finding(doctor(ready)[1], "leftovers")["level"] == "ok"
    ready.write("start", "0")
    ready.start_krelay()
    begin(ready)
    assert works(ready)


def test_rules_of_a_dead_krelay_of_another_tree_are_named_and_their_removal_works(
    ready: World,
) -> None:
    tree = ready.lab.directory / "other"
    other = ready.start_krelay("--queue-num", "1777", tree=tree)
    for name, text in (("gport", "17000"), ("services", "udp/5353"), ("start", "1")):
        ready.write(name, text, tree)
    ready.until_state("running", tree)
    assert finding(doctor(ready)[1], "leftovers")["level"] == "ok"
    ready.kill(other)
    told = finding(doctor(ready)[1], "leftovers")
    assert (told["level"], told["safe"]) == ("warning", False)
    type_as_root(ready, told["fix"])

    assert finding(doctor(ready)[1], "leftovers")["level"] == "ok"
    assert "krelay" not in ready.rules()  # iptables leaves its tables, empty


def test_a_queue_of_another_program_keeps_relaying_from_beginning(ready: World) -> None:
    script = (
        "from netfilterqueue import NetfilterQueue as Q\nimport time\n"
        "q = Q(); q.bind(1600, print); print('bound', flush=True); time.sleep(60)"
    )
    other = ready.lab.start("relay", sys.executable, "-c", script)
    ready.until(lambda: "bound" in other.output, "a queue")
    status, findings = doctor(ready)
    told = finding(findings, "queue")
    assert (status, told["level"]) == (1, "failed")
    assert told["fix"] == f"krelay daemon --root {ready.root} --queue-num 1601"
    done = ready.krelay("start", check=False)
    assert (done.status, ready.read("start")) == (1, "0")
    assert "queue 1600 is served by another program" in done.stderr
    other.terminate()
    other.wait()

    assert finding(doctor(ready)[1], "queue")["level"] == "ok"
    begin(ready)


def test_udp_that_is_joined_on_its_way_through_is_switched_off(ready: World) -> None:
    ready.lab.run("relay", "ethtool", "-K", "eth0", "rx-udp-gro-forwarding", "on")
    told = finding(doctor(ready)[1], "UDP GRO")
    assert told["level"] == "warning"
    type_as_root(ready, told["fix"])

    assert finding(doctor(ready)[1], "UDP GRO")["level"] == "ok"


def test_without_privileges_it_says_what_it_cannot_see(ready: World) -> None:
    command = (*PYTHON, "-m", "krelay", "doctor", "--root", str(ready.root))
    done = ready.lab.run(
        "relay", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command,
        check=False,
    )  # fmt: skip
    assert done.status == 1
    assert done.stdout.startswith("failed   privileges    CAP_NET_ADMIN and CAP_NET_RAW wanting")
    assert "Traceback" not in done.stdout + done.stderr


def test_tools_that_are_not_there_or_break_are_a_line_each(ready: World, tmp_path: Path) -> None:
    for name, text in (("nft", "echo '{\"nftables\": [{}, 3'"), ("iptables-save", "exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = (*PYTHON, "-m", "krelay", "doctor", "--root", str(ready.root))
    done = ready.lab.run(
        "relay", "env", f"PATH={tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin", *command, check=False
    )
    assert "warning  firewall      can't be looked at: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_services_among_the_hosts_own_ports_are_told_with_a_fix(ready: World) -> None:
    sysctl(ready, "net.ipv4.ip_local_port_range=40000 59999")
    sysctl(ready, "net.ipv4.ip_local_reserved_ports=45000,50001-50002")
    begin(ready)
    ready.put(services="tcp/80 udp/7 udp/50000-50010")
    told = finding(doctor(ready)[1], "own ports")
    assert told["level"] == "warning"
    assert "udp/50000-50010" in told["text"]
    type_as_root(ready, told["fix"])

    assert finding(doctor(ready)[1], "own ports")["level"] == "ok"
    reserved = ready.run("relay", "sysctl", "-n", "net.ipv4.ip_local_reserved_ports")
    assert reserved.strip() == "45000,50000-50010"
    assert works(ready)
