"""The two sockets of one session, and the bytes between them.

Each socket is registered once, edge-triggered, for everything, and never touched again: what an
event says goes into the session as a fact, and what is to be done follows from the facts
(channel.py).  A turn moves a bounded number of bytes; what is left to do then waits for the next
turn of the loop, behind everybody else, so that one fast connection can't starve a thousand slow
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

A server that is cut off says nothing, like one that has nothing to say, and the kernel would ask it
after two hours.  So while bytes move, and until it has been asked once after that, its leg is
watched: silence makes the kernel probe, and bytes in flight must be acknowledged, by either side
(Limits.silence).  A connection at rest isn't watched, so a thousand of them cost nothing.

A sink that takes nothing is not lost: bytes are held for it, for as long as Limits.stall.  What
counts is what its kernel acknowledges, not what ours accepts: with a send buffer of megabytes and a
reader of some kilobytes a second the next write is minutes away.
"""

import errno
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging import INFO
from typing import Any, Protocol

from knet.log import Log
from knet.loop import Timer
from tcp_relay.engine.channel import READ, RESET, SHUT, WAIT, WRITE, Channel, Todo
from tcp_relay.engine.counts import Row, state_of
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.portqueue import PortWaitQueue
from tcp_relay.engine.session import CLIENT, SERVER, End, Session, SessionSide
from tcp_relay.engine.sockets import (
    HOST_FAILS,
    Socket,
    at_mark,
    close,
    close_in_order,
    hasten,
    heard,
    in_words,
    probe_as_usual,
    probe_within,
    set_dscp,
    take_time,
    undelivered,
)
from tcp_relay.engine.timeouts import FixedTimeoutQueue

STEPS = 4
"""Reads, writes and ends per direction and turn."""

SHORT = 16 * 1024
"""Bytes read by the short cut: a new string of that size is cheaper than a part of the buffer."""

AGAIN = 0.02
"""Seconds until a call is made again that failed for want of something at this host."""

FLUSH = 0.001
"""Seconds until it is asked again whether the kernel has delivered all; doubles up to FLUSH_MAX."""
FLUSH_MAX = 0.1

_IN, _OUT, _HANGUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP
_IN_OUT = _IN | _OUT
_MASK = _IN_OUT | select.EPOLLPRI | _HANGUP | select.EPOLLET
_ERROR = select.EPOLLERR
_FAILED = _ERROR | select.EPOLLHUP
_HINT = _FAILED | _HANGUP | select.EPOLLPRI
_READ = _HINT | _IN
_WRITE = _FAILED | _OUT

log = Log("connection")


class SessionOwner(Protocol):
    """Whoever finds the server for a client.  `ended` is the last call."""

    def connected(self) -> None:
        """The server has accepted; bytes move from now on."""

    def connect_failed(self, error: int) -> None:
        """The server can't be reached (an errno): connect another, or end the pump."""

    def ended(self) -> None:
        """Both sockets are closed."""

    def names(self) -> Mapping[str, object]:
        """Who is connected, for the log and for tables: `client` and `server` at least."""


class Pump:
    """Owns a client's socket and, from `use_server` on, a server's; closes both together.

    Both have the options of sockets.set_options, and don't block.
    """

    __slots__ = (
        "_client",
        "_engine",
        "_is_probed",
        "_is_queued",
        "_is_registered",
        "_is_retrying",
        "_is_smooth",
        "_is_watched",
        "_owner",
        "_server",
        "_timer",
        "_waiting",
        "_why",
        "alive",
        "is_connected",
        "session",
        "since",
    )

    def __init__(self, engine: Engine, owner: SessionOwner, client: Socket) -> None:
        self.session = Session()
        self.alive = True
        self.is_connected = False
        self._engine = engine
        self._owner = owner
        self._client = client
        self._server: Socket | None = None
        self.since = engine.loop.now
        self._waiting: FixedTimeoutQueue[Any] | None = (
            None  # where this pump is, if it waits for anything;
        )
        self._timer: Timer | None = None  # or this, if it is to look at a certain time
        self._why = ""  # one side was lost
        self._is_registered = False  # the server's socket, in the loop
        self._is_queued = self._is_retrying = False
        self._is_smooth = False  # connected, and the session is: the short cut may be taken
        self._is_watched = self._is_probed = False
        engine.loop.add(client.fileno(), _MASK, self._on_client)
        engine.born(self)

    def use_server(self, server: Socket) -> None:
        """Takes over a socket that isn't connected yet; one taken before is closed."""
        self.drop_server()
        self._server = server

    def drop_server(self) -> None:
        """Closes the server's socket, which isn't connected (any more)."""
        if self._server is not None:
            self._close_server()
            self._server = None

    def connect(self, address: tuple[Any, ...]) -> None:
        """Begins to connect the server's socket; the owner hears how that ends."""
        server = self._server
        assert server is not None
        code = server.connect_ex(address)
        if code not in _UNDER_WAY:
            self._owner.connect_failed(code)
            return
        try:
            # Not before: an unconnected socket reports HUP.
            self._engine.loop.add(server.fileno(), _MASK, self._on_server)
        except OSError as error:
            self._engine.host_failed(error)
            self._owner.connect_failed(errno.ENOBUFS)
            return
        self._is_registered = True
        self.wait(self._engine.connecting)

    def send_with(self, dscp: int, answers: int) -> None:
        """From now on packets to the server have this DSCP, and those to the client the other."""
        assert self._server is not None
        set_dscp(self._server, dscp)
        set_dscp(self._client, answers)

    def wait(self, waiting: FixedTimeoutQueue[Any]) -> None:
        """Waits there, and nowhere else any more."""
        self._stop_waiting()
        self._waiting = waiting
        waiting.add(self)

    def end(self, end: End, detail: str = "") -> None:
        """Ends it now: in order if CLOSED, else both sides are reset.  Harmless if repeated."""
        if not self.alive:
            return
        self.alive = self._is_smooth = False
        self._stop_waiting()
        engine = self._engine
        engine.watched.discard(self)
        names = self._owner.names() if log.enabled(INFO) else None  # while the sockets can be asked
        engine.loop.closing(self._client.fileno())
        if end is _CLOSED:
            self._leave_to_the_kernel(self.session.down, self._client)
        else:
            close(self._client)
        self._close_server(in_order=end is _CLOSED)
        if names is not None:
            log.info(
                "connection ended" if self.is_connected else "connection refused",
                **names,
                reason=end,
                detail=detail or None,
                seconds=round(engine.loop.now - self.since, 3),
                from_client=self.session.up.moved,
                from_server=self.session.down.moved,
            )
        self._owner.ended()
        del self._owner  # which refers to this pump: without a collector a circle is for ever
        engine.died(self, end)

    def wait_in(
        self, line: PortWaitQueue, retry: Callable[[], None], error: OSError | None = None
    ) -> None:
        """There is no local port for the server leg now: has `retry` called when there may be.

        Or no socket at all: then `error` says why.  Nobody stands in line for longer than a server
        may take to accept.
        """
        self._stop_waiting()
        limit = self._engine.limits.connect
        if self._engine.loop.now - self.since < limit:
            line.join(retry, error)
        else:
            missing = in_words(error.errno) if error else "no local port was free"
            self.end(End.CONNECT_FAILED, f"{missing} for {limit:g} s")

    def not_connected(self) -> None:
        """The server has not accepted in time."""
        self._waiting = None
        self._owner.connect_failed(errno.ETIMEDOUT)

    def look(self) -> None:
        """Nothing may have moved for long: ends it if that is too long, or looks again later."""
        self._waiting = self._timer = None
        session, engine = self.session, self._engine
        self._ask_the_sinks()
        if not self.alive:
            return
        now = engine.loop.now
        end = session.overdue(now, engine.limits)
        if end is not None:
            self.end(end, self._overdue_in_words(end))
        elif session.is_resetting:
            self._turn(CLIENT)
        elif (due := session.deadline(engine.limits)) is not None:
            if session.may_stall and due > now + engine.stalled.seconds:
                self.wait(engine.stalled)
            else:
                self._look_at(due)

    def _ask_the_sinks(self) -> None:
        """Whether those who are owed something take it, slowly, or are gone."""
        engine = self._engine
        for channel, side, sink in (
            (self.session.up, SERVER, self._server),
            (self.session.down, CLIENT, self._client),
        ):
            if sink is None or channel.sink_gone or not (channel.held or channel.got_reset):
                continue
            try:
                if not channel.is_hastened:
                    hasten(sink)
                    channel.is_hastened = True
                peer = heard(sink)
            except OSError as error:
                engine.host_failed(error)
                continue
            channel.taken(peer.acked, engine.loop.now)
            limit = engine.limits.silence
            if peer.is_silent(limit, engine.awake):
                why = _nothing_acked(side, limit)
                if self.session.is_resetting:
                    self.end(End.RESET, f"{self._why}; {why}")
                else:
                    self.end(End.STALLED, why)
                return

    def check(self) -> None:
        """Ends it if a side acknowledges nothing; watches it no longer if it rests."""
        try:
            self._check()
        except OSError as error:  # of the calls that ask and set: once more, later
            self._engine.host_failed(error)
            self._engine.watched.add(self)

    def _check(self) -> None:
        engine, server = self._engine, self._server
        assert server is not None
        limit = engine.limits.silence
        if not self._is_probed:  # not earlier: most connections are over before
            self._is_probed = True
            probe_within(server, limit)
        else:
            peers = heard(self._client), heard(server)
            for side, peer in zip((CLIENT, SERVER), peers, strict=True):
                if peer.is_silent(limit, engine.awake):
                    self.end(End.STALLED, _nothing_acked(side, limit))
                    return
            if engine.loop.now - max(self.since, self.session.at) >= limit:
                client, server_ = peers
                answers = server_.ago <= limit / 2  # a probe, if nothing else
                if answers and not client.in_flight and not server_.in_flight:
                    self._is_watched = self._is_probed = False
                    probe_as_usual(server)
                    return
        engine.watched.add(self)

    def row(self) -> Row:
        """As people see it."""
        session, now = self.session, self._engine.loop.now
        names = self._owner.names()
        return Row(
            client=str(names["client"]),
            server=str(names["server"] or "-"),
            state=state_of(session, self.is_connected),
            age=now - self.since,
            idle=now - max(self.since, session.at),
            from_client=session.up.moved,
            from_server=session.down.moved,
            held=f"{len(session.up.held)}/{len(session.down.held)}",
        )

    def _on_client(self, events: int) -> None:
        if events == _IN_OUT and self._is_smooth:
            assert self._server is not None
            self._short_cut(self.session.up, CLIENT, self._client, self._server)
            return
        self._note(CLIENT, events)
        if self.is_connected:
            self._turn(CLIENT)
            if events & _ERROR:
                self._failed(CLIENT, self._client)
        elif events & _FAILED:
            self.end(End.RESET, _words(CLIENT, _error_of(self._client)))

    def _on_server(self, events: int) -> None:
        if events == _IN_OUT and self._is_smooth:
            assert self._server is not None
            self._short_cut(self.session.down, SERVER, self._server, self._client)
            return
        if self.is_connected or self._has_connected(events):
            self._note(SERVER, events)
            self._turn(SERVER)
            if events & _ERROR and self._server is not None:
                self._failed(SERVER, self._server)

    def _has_connected(self, events: int) -> bool:
        if events & _FAILED:
            error = self._peek_at_server()
            if error and error != errno.ECONNRESET:
                self._stop_waiting()
                self._owner.connect_failed(error)
                return False
            if error:  # it had accepted
                self._lost(SERVER, error)
        elif not events & _OUT:
            return False
        self._stop_waiting()
        self.is_connected = True
        self._engine.counts.opened += 1
        self._owner.connected()
        if log.enabled(INFO):
            log.info("connection opened", **self._owner.names())
        return True

    def _peek_at_server(self) -> int:
        """The error that a read would meet; SO_ERROR would hide it from the read itself."""
        assert self._server is not None
        try:
            self._server.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return 0
        except OSError as error:
            return 0 if error.errno in HOST_FAILS else error.errno or 0  # a read will meet it
        return 0

    def _note(self, side: SessionSide, events: int) -> None:
        """What an event says, as facts."""
        if events & _READ:
            channel = self.session.fed_by(side)
            channel.readable = True
            if events & _HINT:
                channel.hinted = True
                channel.urgent |= bool(events & select.EPOLLPRI)
                channel.ending = events & _HINT == _HANGUP
        if events & _WRITE:
            self.session.drained_by(side).writable = True

    def _short_cut(self, channel: Channel, side: SessionSide, source: Socket, sink: Socket) -> None:
        try:
            data = source.recv(SHORT)
        except OSError as error:
            self._not_read(channel, side, error)
            self._turn(side)
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
            if not self._is_watched:
                self._is_watched = True
                engine.watched.add(self)
        elif self.alive:
            channel.readable = True
            self._passed(channel, side, data, sent, SHORT)
            self._turn(side)

    def _turn(self, first: SessionSide) -> None:
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
            self.end(_CLOSED)
            return
        self._is_smooth = session.is_smooth
        if not self._is_watched:
            self._is_watched = True
            self._engine.watched.add(self)
        if more:
            self._is_queued = True
            self._engine.loop.call_soon(self._queued_turn)
        if not self._is_smooth:
            self._guard()

    def _queued_turn(self) -> None:
        self._is_queued = False
        self._turn(CLIENT)

    def _move(self, channel: Channel, side: SessionSide, step: Todo) -> bool:
        """Takes that step and the next ones; whether there is more to do than one turn may."""
        assert self._server is not None
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
            waiting = undelivered(sink)
        except OSError:
            waiting = 1  # asked again
        if not waiting:
            self.end(End.RESET, self._why)
        else:
            now = self._engine.loop.now
            self._look_at(now + min(max(now - channel.at, FLUSH), FLUSH_MAX))

    def _not_read(self, channel: Channel, side: SessionSide, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            channel.empty()
        elif error.errno in HOST_FAILS:
            channel.readable = False
            self._again(error)
        else:
            self._lost(side, error.errno or 0)

    def _failed(self, side: SessionSide, sock: Socket) -> None:
        """A socket has an error that no read will meet: its end of file was read before."""
        channel = self.session.fed_by(side)
        if self.alive and channel.got_eof and not channel.got_reset and (error := _error_of(sock)):
            self._lost(side, error)
            self._turn(side)

    def _lost(self, side: SessionSide, error: int) -> None:
        if self.session.is_resetting:  # the other side was lost before
            self.end(End.RESET, self._why)
            return
        self._why = _words(side, error)
        self._is_smooth = False
        self.session.lost(side, self._engine.loop.now)

    def _not_sent(self, side: SessionSide, error: OSError) -> int:
        """0: the sink is full; else it is gone, and with it this pump."""
        if isinstance(error, BlockingIOError):
            return 0
        if error.errno in HOST_FAILS:
            self._again(error)
            return 0
        self.end(End.RESET, _words(_OTHER[side], error.errno or 0))
        return -1

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
            self._note(CLIENT, _IN_OUT)
            self._note(SERVER, _IN_OUT)
            self._turn(CLIENT)

    def _guard(self) -> None:
        """Sees to it that somebody looks when the session may be overdue."""
        engine = self._engine
        if self.session.may_stall:
            waiting = engine.stalled
        elif self.session.is_channel_closed:
            waiting = engine.half_closed
        else:
            return
        timer = self._timer
        if self._waiting is not waiting and not (
            timer is not None and timer.when <= engine.loop.now + waiting.seconds
        ):
            self.wait(waiting)

    def _look_at(self, when: float) -> None:
        self._stop_waiting()
        self._timer = self._engine.loop.call_at(when, self.look)

    def _overdue_in_words(self, end: End) -> str:
        limits, session = self._engine.limits, self.session
        if end is End.STALLED:
            channel, sink = (session.up, SERVER) if session.up.held else (session.down, CLIENT)
            return f"the {sink} took none of {len(channel.held)} bytes for {limits.stall:g} s"
        if end is End.FORGOTTEN:
            side = CLIENT if session.up.sent_eof else SERVER
            return f"the {side} has finished, and nothing came for {limits.half_close:g} s"
        return self._why

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.discard(self)
            self._waiting = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave_to_the_kernel(self, channel: Channel, sink: Socket) -> None:
        if channel.is_hastened:
            with suppress(OSError):
                take_time(sink)
        close_in_order(sink)

    def _close_server(self, in_order: bool = False) -> None:
        server = self._server
        if server is None:
            return
        if self._is_registered:
            self._engine.loop.closing(server.fileno())
            self._is_registered = False
        if in_order:
            self._leave_to_the_kernel(self.session.up, server)
        else:
            close(server)


def _nothing_acked(side: SessionSide, seconds: float) -> str:
    return f"the {side} has acknowledged nothing for {seconds:g} s"


def _error_of(sock: Socket) -> int:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError as error:
        return error.errno or 0


def _words(side: SessionSide, error: int) -> str:
    return f"{side}: {in_words(error)}"


_OTHER = (SERVER, CLIENT)
_CLOSED = End.CLOSED
_UNDER_WAY = (0, errno.EINPROGRESS)
