"""Sends whole IPv4 packets that krelay has built: its answers to what it refuses (raw(7))."""

import socket


class RawSender:
    """A raw socket that takes whole IPv4 packets.  Raises PermissionError without CAP_NET_RAW."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._socket.setblocking(False)
        self.stopped = 0
        """Packets that the packet filter of this host dropped on their way out."""

    def send(self, packet: bytes) -> None:
        """Sends it if the kernel takes it now; else it is lost, like any packet."""
        try:
            self._socket.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
        except PermissionError:  # the verdict of a rule (raw_send_hdrinc, net/ipv4/raw.c)
            self.stopped += 1
        except OSError:
            pass

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
