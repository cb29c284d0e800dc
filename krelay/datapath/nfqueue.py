"""The netfilter queue: packets from the kernel to the worker, verdicts back.

All of NetfilterQueue's traps are closed here, so that no other module need know them:

- It asks the kernel for at most 4,016 bytes of a packet.  A longer one would come cut, and if
  rewritten leave cut (the kernel trims to what it is sent).  So the range is set again, by a
  message of our own on its socket, and packets are read by an object of ours with a large enough
  buffer.
- `run` reads until the queue is empty, which under load is never.  Our reader says "nothing more"
  (EAGAIN) after BATCH packets; the rest of the loop then has its turn.
- It swallows ENOBUFS, the only sign that the socket's buffer overflowed.  Our reader counts it.
- A callback that raises leaves its packet without a verdict, and the packet holds a place in the
  queue for good.  Ours catches everything, drops the packet, counts it, and logs each kind of fault
  once.
- It sends each verdict by itself.  Ours go together (verdicts.py), at the latest when the queue is
  empty: none waits for a packet that may not come.

What the kernel dropped because the queue was full, or the socket's buffer, it counts itself
(net/netfilter/nfnetlink_queue.c); `figures` reads that.
"""

import errno
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from netfilterqueue import NetfilterQueue

from knet import netlink
from knet.log import Log
from krelay.datapath.verdict import Verdict
from krelay.datapath.verdicts import ROOM, Verdicts
from krelay.datapath.worker import Worker

BATCH = 256
"""Packets handled before the loop's other events have a turn: some milliseconds."""
TOGETHER = 64
"""Verdicts given in one message: more makes it little cheaper, and every packet later."""
MAX_QUEUED = 8192
"""Packets the kernel holds for us before it drops."""
SOCKET_BUFFER = 8 << 20
COPY_RANGE = 0xFFFF
_BUFFER = 0x10000 + 4096
_FIGURES = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")

_SUBSYS_QUEUE, _MSG_CONFIG = 3, 2
_CFG_PARAMS, _COPY_PACKET = 2, 2

_log = Log("queue")


class QueueUnavailable(Exception):
    """The queue can't be served.  The text says why and what to do."""


class Figures(NamedTuple):
    """What the kernel says of a queue (/proc/net/netfilter/nfnetlink_queue)."""

    port_id: int
    """Netlink port of the process that serves it; often its process id."""
    waiting: int
    copy_range: int
    queue_dropped: int
    """Packets dropped because MAX_QUEUED were waiting."""
    socket_dropped: int
    """Packets dropped because the socket's buffer was full."""


class Queued(Protocol):
    """A packet of NetfilterQueue's, as far as it is used here."""

    hook: int
    id: int

    def get_payload(self) -> bytes: ...


def figures(number: int) -> Figures | None:
    """The kernel's figures of that queue in this network namespace; None if it is unserved."""
    try:
        lines = _FIGURES.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        queue, port_id, waiting, _, copy_range, queue_dropped, socket_dropped, *_ = map(
            int, line.split()
        )
        if queue == number:
            return Figures(port_id, waiting, copy_range, queue_dropped, socket_dropped)
    return None


def figures_shown() -> bool:
    """Whether the kernel shows its figures to this user: to root and its group, by no
    capability."""
    return os.access(_FIGURES, os.R_OK, effective_ids=True)


class Queue:
    """One netfilter queue, bound from construction to `close`.

    Raises QueueUnavailable if it is taken, not permitted, or unknown to the kernel.
    """

    def __init__(
        self,
        number: int,
        worker: Worker,
        send: Callable[[bytes], object],
        *,
        most: int | None = None,
        batch: int | None = None,
        before_verdicts: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most` packets wait in the kernel, and `batch` of them are handled in one turn.

        `before_verdicts` is called before packets go on; `clock` tells when they came.
        """
        self.number = number
        self._batch = batch or BATCH
        self.overflows = 0
        """How often the kernel told that it had dropped packets for want of buffer."""
        self.errors = 0
        """Packets dropped because our own code failed."""
        self._worker = worker
        self._handle = worker.handle
        self._verdicts = Verdicts(number)
        self._send = send
        self._before_verdicts = before_verdicts
        self._clock = clock
        self._now = 0.0
        self._left = 0
        self._seen_errors: set[str] = set()
        if (taken := figures(number)) is not None:
            raise QueueUnavailable(
                f"queue {number} is served by another program (netlink port {taken.port_id}); "
                f"choose another with --queue-num"
            )
        try:
            self._queue = NetfilterQueue()
            with warnings.catch_warnings():
                # Of a smaller buffer, where the host allows no other: the doctor tells of that.
                warnings.simplefilter("ignore", RuntimeWarning)
                # A kernel that has it as a module loads it now, at the first request.
                self._queue.bind(
                    number, self._on_packet, max_len=most or MAX_QUEUED, sock_len=SOCKET_BUFFER
                )
        except OSError as error:
            if not _FIGURES.exists():
                raise QueueUnavailable(
                    "the kernel has no netfilter queue (CONFIG_NETFILTER_NETLINK_QUEUE); "
                    "try: modprobe nfnetlink_queue"
                ) from None
            raise QueueUnavailable(
                f"queue {number} can't be bound ({error}); krelay needs CAP_NET_ADMIN"
            ) from error
        try:
            self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        except OSError:
            self._queue.unbind()
            raise
        try:
            self._socket.setblocking(False)
            self._receive = self._socket.recv
            self._ask_for_whole_packets()
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when packets wait."""
        return self._socket.fileno()

    def serve(self, _: int = 0) -> None:
        """Handles the packets that wait, BATCH at most.  Raises OSError if the queue is lost."""
        self._now = self._clock()
        self._left = self._batch
        try:
            self._queue.run_socket(self)  # type: ignore[arg-type]  # it calls recv alone
        finally:
            self._give_verdicts()

    def recv(self, _: int) -> bytes:
        """What run_socket reads by: one message from the kernel, or EAGAIN when it is enough."""
        if not self._left:
            raise BlockingIOError(errno.EAGAIN, "enough for this turn")
        self._left -= 1
        if self._verdicts.size > ROOM or not self._left % TOGETHER:
            self._give_verdicts()
        try:
            return self._receive(_BUFFER)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self.overflows += 1
            raise

    def close(self) -> None:
        """Unbinds; packets that still wait are dropped by the kernel.  May be called twice."""
        try:
            self._queue.unbind()
        finally:
            self._socket.close()

    def _on_packet(self, packet: Queued) -> None:
        verdicts = self._verdicts
        try:
            verdict = self._handle(packet.get_payload(), packet.hook, self._now)
            if isinstance(verdict, bytes):
                verdicts.replace(packet.id, verdict)
            elif verdict is Verdict.PASS:
                verdicts.accept(packet.id)
            else:
                verdicts.drop(packet.id)
                for answer in self._worker.answers:
                    self._send(answer)
                self._worker.answers.clear()
        except Exception as error:
            self._failed(packet, error)

    def _give_verdicts(self) -> None:
        if self._verdicts.size:
            self._before_verdicts()
            told = self._verdicts.take()
            try:
                self._socket.send(told)
            except OSError:
                self._socket.send(told)  # packets wait for it, and for nothing else

    def _failed(self, packet: Queued, error: Exception) -> None:
        self.errors += 1
        self._worker.answers.clear()
        self._verdicts.drop(packet.id)  # of two verdicts on a packet the kernel takes the first
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else ""
        if place not in self._seen_errors:
            self._seen_errors.add(place)
            _log.error("packet dropped by a fault of ours", error=repr(error), at=place)

    def _ask_for_whole_packets(self) -> None:
        params = netlink.attribute(_CFG_PARAMS, struct.pack("!IB", COPY_RANGE, _COPY_PACKET))
        request = netlink.message(
            _SUBSYS_QUEUE, _MSG_CONFIG, 0, params, family=0, resource=self.number
        )
        self._socket.sendto(request, (0, 0))
        if not figures_shown():
            return  # no kernel refuses this to the process that has bound the queue
        got = figures(self.number)
        if got is None or got.copy_range < COPY_RANGE - 8:
            self.close()
            raise QueueUnavailable(f"the kernel doesn't hand whole packets to queue {self.number}")
