"""What comes together with its end of file is thrown away.

They do come together where the sender could not send all before it closed: the kernel then puts the
FIN on the last segment that waits (tcp_send_fin in net/ipv4/tcp_output.c).
"""

import socket
from contextlib import suppress
from functools import partial

from tests.tprox.broken.sound import Channel, main, session


class Forgetful(Channel):
    """Looks behind what it has read, and keeps it only if no end of file is there."""

    def read(self) -> None:
        """As it should be, but for the end."""
        before = len(self.held)
        super().read()
        with suppress(BlockingIOError):
            if len(self.held) > before and not self.source.recv(1, socket.MSG_PEEK):
                del self.held[before:]


if __name__ == "__main__":
    main(partial(session, channel=Forgetful))
