"""One line for each rewritten packet, for people.

    T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 17

Behind the arrow stands only what has changed, with `>` on the side where the rest is: `=> > DST` a
new destination, `=> SRC >` a new source.
"""

from dataclasses import dataclass

from krelay.flow import Proto
from krelay.row import Rewrite, Row
from krelay.wire import BadPacket, tcp
from krelay.worker import flow_of


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows somebody wants to see; None means any."""

    proto: Proto | None = None
    client_addr: bytes | None = None
    client_port: int | None = None
    state: str | None = None
    service: tuple[Proto, int] | None = None

    def admits(self, row: Row) -> bool:
        """Whether the row is among them."""
        return (
            (self.proto is None or row.proto is self.proto)
            and (self.client_addr is None or row.client.addr == self.client_addr)
            and (self.client_port is None or row.client.port == self.client_port)
            and (self.service is None or (row.proto, row.service.port) == self.service)
            and (self.state is None or row.state == self.state)
        )


def line(rewrite: Rewrite, packet: bytes) -> str:
    """The line for a packet, as it is before it is rewritten."""
    try:
        flow = flow_of(packet)
    except BadPacket:
        return f"{rewrite.step.label} {len(packet)} bytes flow {rewrite.row.id}"
    at = (packet[0] & 0xF) * 4
    flags = f" [{tcp.flags_text(packet[at + tcp.FLAGS])}]" if flow.proto is Proto.TCP else ""
    length = len(packet) - at - (packet[at + 12] >> 4) * 4 if flow.proto is Proto.TCP else 0
    payload = f" {length} bytes" if length > 0 else ""
    if flow.proto is Proto.UDP:
        payload = f" {len(packet) - at - 8} bytes"
    src, dst = rewrite.src, rewrite.dst
    match (src != flow.src, dst != flow.dst):
        case (True, True):
            after = f"{src} > {dst}"
        case (True, False):
            after = f"{src} >"
        case (False, True):
            after = f"> {dst}"
        case _:
            after = "unchanged"
    return (
        f"{rewrite.step.label} {flow.src} > {flow.dst}{flags}{payload} => {after} "
        f"flow {rewrite.row.id}"
    )
