"""Sends packets of our own making: the answers to what is refused."""

import socket
from contextlib import suppress


class RawSender:
    """A raw socket that takes whole IPv4 packets.  Raises PermissionError without CAP_NET_RAW."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._socket.setblocking(False)

    def send(self, packet: bytes) -> None:
        """Sends it if that is possible now: an answer is a courtesy, and nobody waits for it."""
        with suppress(OSError):
            self._socket.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
