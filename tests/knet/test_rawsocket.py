"""Packets of our own making, from one host of a lab to the next."""

import os
import socket
import subprocess
import sys

import pytest

from knet.endpoint import Endpoint, FiveTuple, Proto
from knet.rawsocket import RawSender
from krelay_vm import Lab
from tests.tools.packets import Template

pytestmark = pytest.mark.net


def datagram(src: str, dst: str) -> bytes:
    there = FiveTuple(Proto.UDP, Endpoint.parse(src), Endpoint.parse(dst))
    return Template(there, payload=b"hello", ident=77).build()


def test_a_packet_arrives_at_the_neighbour_as_it_was_made() -> None:
    packet = datagram("10.0.0.77:5000", "10.0.0.254:7000")  # nobody's source address
    with Lab() as lab, lab.capture("relay") as wire:
        with lab.enter("client"):
            sender = RawSender()
        sender.send(packet)
        sender.close()
        wire.settimeout(30)
        for _ in range(100):
            frame = wire.recv(2000)
            if frame[12:14] == b"\x08\x00":
                break

        assert frame[14:] == packet


def test_a_packet_for_which_there_is_no_route_is_let_go() -> None:
    with Lab() as lab:
        with lab.enter("relay"):
            sender = RawSender()
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.send(datagram("192.168.0.2:1", "203.0.113.1:1"))
        with receiver:
            receiver.bind(("192.168.0.2", 7000))
            receiver.settimeout(30)
            sender.send(datagram("192.168.0.2:5000", "192.168.0.2:7000"))

            assert receiver.recvfrom(100) == (b"hello", ("192.168.0.2", 5000))
        sender.close()


@pytest.mark.parametrize("verdict", ["drop", "reject"])
def test_what_rules_of_the_host_stop_is_counted(verdict: str) -> None:
    rules = "table ip t { chain c { type filter hook output priority 0; udp sport 5 VERDICT; }\n}\n"
    with Lab() as lab:
        with lab.enter("relay"):
            sender = RawSender()
        for sport in (5000, 5, 5):
            sender.send(datagram(f"192.168.0.2:{sport}", "192.168.0.1:7000"))
        assert sender.stopped == 0
        lab.run("relay", "nft", "-f", "-", input=rules.replace("VERDICT", verdict))
        for sport in (5000, 5, 5):
            sender.send(datagram(f"192.168.0.2:{sport}", "192.168.0.1:7000"))
        assert sender.stopped == 2
        sender.send(datagram("192.168.0.2:1", "203.0.113.1:1"))  # no route: not a rule's doing
        assert sender.stopped == 2
        sender.close()


def test_without_the_capability_there_is_no_sender() -> None:
    program = (
        "from knet.rawsocket import RawSender\n"
        "try: RawSender()\n"
        "except PermissionError: print('no')"
    )
    done = subprocess.run(
        (
            "setpriv",
            "--bounding-set=-net_raw",
            "--inh-caps=-net_raw",
            sys.executable,
            "-c",
            program,
        ),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert (done.stdout, done.stderr) == ("no\n", "")
