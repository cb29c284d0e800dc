"""What is seen of a host's network: its frames, and who listens in it."""

import socket

from krelay_vm import netns
from krelay_vm.errors import LabError
from krelay_vm.topology import Topology

ETH_P_ALL = 3  # linux/if_ether.h
LISTENING = {"tcp": "0A", "udp": "07"}
"""TCP_LISTEN; and TCP_CLOSE, which a bound UDP socket shows (include/net/tcp_states.h)."""


def listening_to(namespace: str, interface: str) -> socket.socket:
    """A packet socket that receives every frame of an interface.  Raises OSError."""
    with netns.inside(namespace):
        # Protocol 0 receives nothing: no frame of another interface gets in before the bind.
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            packets.bind((interface, ETH_P_ALL))
        except OSError:
            packets.close()
            raise
    return packets


def listens(table: str, proto: str, port: int) -> bool:
    """Whether /proc/net/{tcp,udp}[6] (proc(5)) shows a socket that waits at the port."""
    rows = (line.split() for line in table.splitlines() if ":" in line)
    return any(
        int(row[1].rpartition(":")[2], 16) == port and row[3] == LISTENING[proto] for row in rows
    )


def set_link(topology: Topology, lab: str, host: str, interface: str, *, up: bool) -> None:
    """Pulls the cable of a host's interface, or puts it in again.  Raises LabError."""
    topology.host(host)
    try:
        netns.set_link(topology, lab, host, interface, up=up)
    except OSError as error:
        raise LabError(f"{host} {interface}: {error.strerror}") from None
