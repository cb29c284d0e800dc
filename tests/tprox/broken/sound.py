"""A proxy without a fault that the tester knows of; the broken ones exchange a part of it.

A thread for each session, which waits with poll(2) for what its two channels want next.
"""

import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

LIMIT = CHUNK = 1 << 16
RESET = struct.pack("ii", 1, 0)


class Stalled(Exception):
    """The limit is over."""


@dataclass(slots=True)
class Channel:
    """Bytes from source to sink; each step does what can be done, and raises OSError."""

    source: socket.socket
    sink: socket.socket
    stall: float
    held: bytearray = field(default_factory=bytearray)
    limit: int = LIMIT
    got_eof: bool = False
    sent_eof: bool = False
    moved_at: float = field(default_factory=time.monotonic)

    def step(self) -> None:
        """Reads, writes, passes the end of file on."""
        if self.may_read:
            self.read()
        if self.held:
            self.write()
        if self.got_eof and not self.held and not self.sent_eof:
            self.sent_eof = True
            self.sink.shutdown(socket.SHUT_WR)

    @property
    def may_read(self) -> bool:
        """There is room."""
        return not self.got_eof and len(self.held) < self.limit

    @property
    def overdue(self) -> bool:
        """Held bytes have not moved for too long."""
        return bool(self.held) and time.monotonic() > self.moved_at + self.stall

    def read(self) -> None:
        """What is there, or the end of file."""
        try:
            data = self.source.recv(CHUNK)
        except BlockingIOError:
            return
        if not self.held:
            self.moved_at = time.monotonic()
        self.held += data
        self.got_eof = not data

    def write(self) -> None:
        """What the sink takes."""
        try:
            del self.held[: self.sink.send(self.held[:CHUNK])]
        except BlockingIOError:
            return
        self.moved_at = time.monotonic()


def relay(channels: tuple[Channel, Channel]) -> None:
    """Until both have ended.  Raises OSError, and Stalled."""
    poll = select.poll()
    while not all(channel.sent_eof for channel in channels):
        for channel, back in (channels, channels[::-1]):
            wanted = channel.may_read * select.POLLIN | bool(back.held) * select.POLLOUT
            poll.register(channel.source, wanted)
        poll.poll(100)
        for channel in channels:
            channel.step()
            if channel.overdue:
                raise Stalled


def session(
    client: socket.socket,
    to: tuple[str, int],
    stall: float,
    channel: Callable[..., Channel] = Channel,
    relay: Callable[[tuple[Channel, Channel]], None] = relay,
) -> None:
    """One client, to the end; whatever isn't an end of file is a RST for both."""
    server = socket.create_connection(to)
    for sock in (client, server):
        sock.setblocking(False)
    try:
        relay((channel(client, server, stall), channel(server, client, stall)))
    except (OSError, Stalled):
        for sock in (client, server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    server.close()


def main(session: Callable[[socket.socket, tuple[str, int], float], None] = session) -> None:
    """Accepts for ever."""
    stall, host, port, listen = sys.argv[1:]
    with socket.create_server(("127.0.0.1", int(listen)), backlog=256) as listener:
        while True:
            client, _ = listener.accept()
            arguments = (client, (host, int(port)), float(stall))
            threading.Thread(target=session, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
