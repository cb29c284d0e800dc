"""What most people write first: a netfilter queue worker that lets scapy take each packet apart.

    scapy_worker.py QUEUE SERVER RELAY

It dissects the packet, sets the destination, or of an answer the source, deletes both checksums so
that scapy computes them anew, and puts the packet together.  Here only to be measured against.
"""

import sys
from typing import Any

from netfilterqueue import NetfilterQueue
from scapy.layers.inet import IP, UDP


def main(queue_number: str, server: str, relay: str) -> None:
    """Serves the queue until it is ended."""

    def readdress(packet: Any) -> None:
        datagram = IP(packet.get_payload())
        if datagram.src == server:
            datagram.src = relay
        else:
            datagram.dst = server
        del datagram.chksum
        del datagram[UDP].chksum
        packet.set_payload(bytes(datagram))
        packet.accept()

    queue = NetfilterQueue()
    queue.bind(int(queue_number), readdress)
    print("serving", flush=True)
    queue.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
