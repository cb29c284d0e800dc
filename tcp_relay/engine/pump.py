"""The bytes between the two sockets of one session, from the moment the server has accepted.

Each socket is registered once, edge-triggered, for everything, and never touched again: what an
event says goes into the session as a fact, and what is to be done follows from the facts
(channel.py).  A turn moves a bounded number of bytes; what is left to do then waits for the next
turn of the loop, behind all others, so that one fast connection can't starve a thousand slow
ones.

Most events say "there are bytes" about a session that holds none, and mean a few hundred.  For
these there is a short cut: one read, one write, two numbers; it leaves the facts as the long way
would.

How a session ends.  When both ends of file were passed on, in order: the kernel delivers what it
still has.  When a write fails, at once, both sides reset.  When a read fails (reset, timed out),
the source is gone but not what it said before: the sink gets that, and then the reset, as it would
without a relay.  A reset throws away what the sender's kernel still has to send; so before it, that
is waited for, by asking, because no event tells it.  An error never hides bytes that came before
it: tcp_recvmsg gives those first.  An error that no peer can cause, but a host that is out of
memory (sockets.HOST_FAILS), ends nothing: the same call is made again a little later.

An urgent byte (RFC 6093) is where it was in the stream, and is marked again.  While the source has
one, a read ends before it (tcp_recvmsg), and whether it is the next is asked (SIOCATMARK).
"""

import select
import socket
from typing import Protocol

from tcp_relay.engine.channel import READ, RESET, SHUT, WAIT, WRITE, Channel, Todo
from tcp_relay.engine.engine import Engine, Live
from tcp_relay.engine.session import CLIENT, SERVER, End, Session, SessionSide
from tcp_relay.engine.sockets import HOST_FAILS, Socket, at_mark, error_of, in_words, undelivered

STEPS = 4
"""Reads, writes and ends per direction and turn."""

SHORT = 16 * 1024
"""Bytes read by the short cut: a new string of that size is cheaper than a part of the buffer."""

AGAIN = 0.02
"""Seconds until a call is made again that failed for want of something at this host."""

FLUSH = 0.001
"""Seconds until it is asked again whether the kernel has delivered all; doubles up to FLUSH_MAX."""
FLUSH_MAX = 0.1

MASK = select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
"""What both sockets are registered for."""
FAILED = select.EPOLLERR | select.EPOLLHUP
_IN_OUT = select.EPOLLIN | select.EPOLLOUT
_HANGUP = select.EPOLLRDHUP
_ERROR = select.EPOLLERR
_HINT = FAILED | _HANGUP | select.EPOLLPRI
_READ = _HINT | select.EPOLLIN
_WRITE = FAILED | select.EPOLLOUT


class PumpOwner(Live, Protocol):
    """Owns the two sockets, and ends the session."""

    def guard(self) -> None:
        """Sees to it that the session is looked at when it may be overdue."""

    def check_deadline_at(self, when: float) -> None:
        """Has it looked at then."""


class Pump:
    """Moves what comes from either socket into the other, until `stop`.

    The owner has both sockets registered for MASK, and has their events told to `on_client` and
    `on_server`.
    """

    __slots__ = (
        "_client",
        "_engine",
        "_is_queued",
        "_is_retrying",
        "_is_smooth",
        "_owner",
        "_server",
        "alive",
        "is_watched",
        "session",
    )

    def __init__(
        self, engine: Engine, owner: PumpOwner, session: Session, client: Socket, server: Socket
    ) -> None:
        self.session = session
        self.alive = True
        self.is_watched = False
        """The owner is among the engine's `watched`."""
        self._engine = engine
        self._owner = owner
        self._client = client
        self._server = server
        self._is_queued = self._is_retrying = False
        self._is_smooth = False  # the session is: the short cut may be taken

    def stop(self) -> None:
        """Moves nothing any more: both sockets are about to be closed."""
        self.alive = self._is_smooth = False
        del self._owner  # which refers to this pump: without a collector a circle is for ever

    def on_client(self, events: int) -> None:
        """What epoll says of the client's socket."""
        if events == _IN_OUT and self._is_smooth:
            self._short_cut(self.session.up, CLIENT, self._client, self._server)
            return
        note(self.session, CLIENT, events)
        self.turn(CLIENT)
        if events & _ERROR:
            self._failed(CLIENT, self._client)

    def on_server(self, events: int) -> None:
        """What epoll says of the server's socket."""
        if events == _IN_OUT and self._is_smooth:
            self._short_cut(self.session.down, SERVER, self._server, self._client)
            return
        note(self.session, SERVER, events)
        self.turn(SERVER)
        if events & _ERROR:
            self._failed(SERVER, self._server)

    def turn(self, first: SessionSide) -> None:
        """Moves what can be moved, beginning with what comes from `first`."""
        if self._is_queued or not self.alive:
            return
        session = self.session
        more = False
        for side in (first, _OTHER[first]):
            channel = session.fed_by(side)
            step = channel.todo()
            if step is not WAIT:
                more |= self._move(channel, side, step)
                if not self.alive:
                    return
        if session.ended:
            self._owner.end(_CLOSED)
            return
        self._is_smooth = session.is_smooth
        if not self.is_watched:
            self.is_watched = True
            self._engine.watched.add(self._owner)
        if more:
            self._is_queued = True
            self._engine.loop.call_soon(self._queued_turn)
        if not self._is_smooth:
            self._owner.guard()

    def lost(self, side: SessionSide, error: int) -> None:
        """A read from that side met this error (an errno): its connection is gone."""
        if self.session.is_resetting:  # the other side was lost before
            self._owner.end(End.RESET, self.session.why)
            return
        self._is_smooth = False
        self.session.lost(side, self._engine.loop.now, lost_in_words(side, error))

    def _short_cut(self, channel: Channel, side: SessionSide, source: Socket, sink: Socket) -> None:
        try:
            data = source.recv(SHORT)
        except OSError as error:
            self._not_read(channel, side, error)
            self.turn(side)
            return
        try:
            sent = sink.send(data)
        except OSError as error:
            sent = self._not_sent(side, error)
        if 0 < sent == len(data) < SHORT:
            engine = self._engine
            engine.counts.moved[side] += sent
            channel.moved += sent
            channel.at = engine.loop.now
            if not self.is_watched:
                self.is_watched = True
                engine.watched.add(self._owner)
        elif self.alive:
            channel.readable = True
            self._passed(channel, side, data, sent, SHORT)
            self.turn(side)

    def _queued_turn(self) -> None:
        self._is_queued = False
        self.turn(CLIENT)

    def _move(self, channel: Channel, side: SessionSide, step: Todo) -> bool:
        """Takes that step and the next ones; whether there is more to do than one turn may."""
        source, sink = self._client, self._server
        if side is SERVER:
            source, sink = sink, source
        for _ in range(STEPS):
            if step is READ:
                self._pass(channel, side, source, sink)
            elif step is WRITE:
                self._write(channel, side, sink)
            elif step is SHUT:
                self._shut(channel, side, sink)
            elif step is RESET:
                self._reset(channel, sink)
                return False
            if not self.alive:
                return False
            step = channel.todo()
            if step is WAIT:
                return False
        return True

    def _pass(self, channel: Channel, side: SessionSide, source: Socket, sink: Socket) -> None:
        """From one socket into the other; what that doesn't take is held."""
        if channel.urgent and not channel.sink_gone and at_mark(source):
            self._pass_urgent(channel, side, source, sink)
            return
        view = self._engine.view
        try:
            count = source.recv_into(view)
        except OSError as error:
            self._not_read(channel, side, error)
            return
        if channel.sink_gone:
            channel.got(count, len(view), self._engine.loop.now)
            return
        sent = 0
        if count:
            # Before an end of file the kernel is told to wait for it: one segment instead of two.
            flags = socket.MSG_MORE if channel.ending and count < len(view) else 0
            try:
                sent = sink.send(view[:count], flags)
            except OSError as error:
                sent = self._not_sent(side, error)
        if self.alive:
            self._passed(channel, side, view[:count], sent, len(view))

    def _pass_urgent(
        self, channel: Channel, side: SessionSide, source: Socket, sink: Socket
    ) -> None:
        """The one byte at the mark, which is marked again; a read of those before it ends there."""
        try:
            data = source.recv(1)
        except OSError as error:
            self._not_read(channel, side, error)
            return
        channel.urgent = False
        sent = 0
        try:
            sent = sink.send(data, socket.MSG_OOB)
        except OSError as error:
            sent = self._not_sent(side, error)
        if self.alive:
            self._passed(channel, side, data, sent, 1, urgent=True)

    def _passed(
        self,
        channel: Channel,
        side: SessionSide,
        data: bytes | memoryview,
        sent: int,
        asked: int,
        *,
        urgent: bool = False,
    ) -> None:
        now = self._engine.loop.now
        channel.got(len(data), asked, now)
        if sent:
            channel.sent(sent, now)
            self._engine.counts.moved[side] += sent
        if sent < len(data):
            channel.hold(bytes(data[sent:]), urgent)

    def _write(self, channel: Channel, side: SessionSide, sink: Socket) -> None:
        try:
            sent = sink.send(channel.held, socket.MSG_OOB if channel.held_urgent else 0)
        except OSError as error:
            if not self._not_sent(side, error):
                channel.full()
            return
        channel.sent(sent, self._engine.loop.now)
        self._engine.counts.moved[side] += sent

    def _shut(self, channel: Channel, side: SessionSide, sink: Socket) -> None:
        # The second end of file needs no call of its own: closing sends it.
        if not self.session.fed_by(_OTHER[side]).sent_eof:
            try:
                sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno in HOST_FAILS:
                    self._engine.host_failed(error)  # this is the next step, too
                else:
                    self._not_sent(side, error)
                return
        channel.shut(self._engine.loop.now)

    def _reset(self, channel: Channel, sink: Socket) -> None:
        """Passes a reset on, as soon as nothing would be lost by it."""
        try:
            left = undelivered(sink)
        except OSError:
            left = 1  # asked again
        if not left:
            self._owner.end(End.RESET, self.session.why)
        else:
            now = self._engine.loop.now
            self._owner.check_deadline_at(now + min(max(now - channel.at, FLUSH), FLUSH_MAX))

    def _not_read(self, channel: Channel, side: SessionSide, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            channel.empty()
        elif error.errno in HOST_FAILS:
            channel.readable = False
            self._again(error)
        else:
            self.lost(side, error.errno or 0)

    def _not_sent(self, side: SessionSide, error: OSError) -> int:
        """0: the sink is full; else it is gone, and with it this pump."""
        if isinstance(error, BlockingIOError):
            return 0
        if error.errno in HOST_FAILS:
            self._again(error)
            return 0
        self._owner.end(End.RESET, lost_in_words(_OTHER[side], error.errno or 0))
        return -1

    def _failed(self, side: SessionSide, sock: Socket) -> None:
        """A socket has an error that no read will meet: its end of file was read before."""
        channel = self.session.fed_by(side)
        if self.alive and channel.got_eof and not channel.got_reset and (error := error_of(sock)):
            self.lost(side, error)
            self.turn(side)

    def _again(self, error: OSError) -> None:
        """A call failed that may do better later: as if an event said so then."""
        engine = self._engine
        engine.host_failed(error)
        if not self._is_retrying:
            self._is_retrying = True
            engine.loop.call_at(engine.loop.now + AGAIN, self._retry)

    def _retry(self) -> None:
        self._is_retrying = False
        if self.alive:
            note(self.session, CLIENT, _IN_OUT)
            note(self.session, SERVER, _IN_OUT)
            self.turn(CLIENT)


def note(session: Session, side: SessionSide, events: int) -> None:
    """What an event at that side's socket says, as facts."""
    if events & _READ:
        channel = session.fed_by(side)
        channel.readable = True
        if events & _HINT:
            channel.hinted = True
            channel.urgent |= bool(events & select.EPOLLPRI)
            channel.ending = events & _HINT == _HANGUP
    if events & _WRITE:
        session.drained_by(side).writable = True


def lost_in_words(side: SessionSide, error: int) -> str:
    """Which side was lost by which error."""
    return f"{side}: {in_words(error)}"


_OTHER = (SERVER, CLIENT)
_CLOSED = End.CLOSED
