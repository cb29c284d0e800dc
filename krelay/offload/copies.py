"""The kernel's packet log: copies of packets' heads, many at a time.

A rule `log group N snaplen 28` has the kernel copy a packet's head and send the packet on; it waits
for nobody.  The copies of some milliseconds come together (nflog.TOGETHER, HUNDREDTHS), so that
one costs little; what they mean for each other, the packets have done long since.  Or each comes at
once: then the worker can have read it before any packet that came after it.  Where nobody has
the group, or its buffer is full, there are no copies, and packets go on all the same.
"""

import errno

from knet import netlink
from knet.netlink import nflog
from knet.netlink.nflog import Copy
from knet.netlink.socket import NetlinkSocket
from knet.sockbuf import Direction, enlarge

SOCKET_BUFFER = 8 << 20
TIMEOUT = 5.0
"""Seconds that the kernel has to acknowledge the settings."""
_SEQUENCE = 1


class Copies:
    """The copies that one log group gets in this network namespace, until `close`.

    Raises OSError: EBUSY if another program has the group, EPERM without CAP_NET_ADMIN, EINVAL if
    the kernel has no such log (CONFIG_NETFILTER_NETLINK_LOG).
    """

    def __init__(
        self, group: int, *, buffer: int = SOCKET_BUFFER, together: int = nflog.TOGETHER
    ) -> None:
        """`buffer`: bytes that may wait in the kernel; a copy takes some more than its message.

        `together`: copies that the kernel holds back to give them together; 1: none.
        """
        self.lost = 0
        """How often the kernel told that it had dropped copies for want of buffer."""
        self._reader = nflog.Reader()
        self._socket = NetlinkSocket(netlink.FAMILY, timeout=TIMEOUT)
        self._receive = self._socket.recv
        try:
            enlarge(self._socket, Direction.RECEIVING, buffer)
            self._take(group, together)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when copies wait."""
        return self._socket.fileno()

    def read(self, most: int) -> list[Copy]:
        """Copies of packets in the order in which they were made; [] when none wait.

        About `most`: up to nflog.TOGETHER more, and fewer if there is also what isn't a copy of a
        plain IPv4 packet's first 28 bytes.  Never waits.  Raises OSError if the socket is lost.
        """
        found: list[Copy] = []
        left = most
        while left > 0:
            try:
                some = self._reader.copies(self._receive(nflog.ROOM))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    if found:
                        break  # it is met again, when there is nothing to lose
                    raise
                self.lost += 1
                some = []
            found += some
            left -= len(some) or 1
        return found

    def close(self) -> None:
        """Gives the group up; copies that wait are gone.  May be called twice."""
        self._socket.close()

    def _take(self, group: int, together: int) -> None:
        settings = nflog.settings(group, _SEQUENCE, together)
        try:
            self._socket.carry_out(settings, 1, _SEQUENCE)  # copies may come before it is answered
        except PermissionError:
            # Whose socket it is, not what he may, which nf_tables has granted before.
            raise OSError(errno.EBUSY, f"log group {group} is another program's") from None
