"""The two legs of one session: the client's, and the server's as soon as there is one.

The legs own both sockets.  They connect the server's, hand both to a pump once it has accepted, and
close both together; and they judge whether the peers are still there.

A server that is cut off says nothing, like one that has nothing to say, and the kernel would ask it
after two hours.  So while bytes move, and until it has been asked once after that, its leg is
watched: silence makes the kernel probe, and bytes in flight must be acknowledged, by either side
(SessionLimits.silence).  A connection at rest isn't watched, so a thousand of them cost nothing.

A sink that takes nothing is not lost: bytes are held for it, for as long as SessionLimits.stall.
What counts is what its kernel acknowledges, not what ours accepts: with a send buffer of megabytes
and a reader of some kilobytes a second the next write is minutes away.
"""

import errno
import select
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging import INFO
from typing import Any, Protocol

from knet.log import Log
from knet.loop import Timer
from tcp_relay.engine.channel import Channel
from tcp_relay.engine.counts import Row, state_of
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.portqueue import PortWaitQueue
from tcp_relay.engine.pump import FAILED, MASK, Pump, lost_in_words, note
from tcp_relay.engine.session import CLIENT, SERVER, End, Session, SessionSide
from tcp_relay.engine.sockets import (
    Socket,
    close,
    close_in_order,
    error_ahead,
    error_of,
    hasten,
    heard,
    in_words,
    probe_as_usual,
    probe_within,
    set_dscp,
    take_time,
)
from tcp_relay.engine.timeouts import FixedTimeoutQueue

log = Log("connection")


class SessionOwner(Protocol):
    """Finds the server for a client.  `ended` is the last call."""

    def connected(self) -> None:
        """The server has accepted; bytes move from now on."""

    def connect_failed(self, error: int) -> None:
        """The server can't be reached (an errno): connect another, or end it."""

    def ended(self) -> None:
        """Both sockets are closed."""

    def names(self) -> Mapping[str, object]:
        """Who is connected, for the log and for tables: `client` and `server` at least."""


class Legs:
    """Owns a client's socket and, from `use_server` on, a server's; closes both together.

    Both have the options of sockets.set_options, and don't block.
    """

    __slots__ = (
        "_client",
        "_engine",
        "_is_probed",
        "_is_registered",
        "_owner",
        "_pump",
        "_queue",
        "_server",
        "_timer",
        "alive",
        "session",
        "since",
    )

    def __init__(self, engine: Engine, owner: SessionOwner, client: Socket) -> None:
        self.session = Session()
        self.alive = True
        self.since = engine.loop.now
        self._engine = engine
        self._owner = owner
        self._client = client
        self._server: Socket | None = None
        self._is_registered = False  # the server's socket, in the loop
        self._pump: Pump | None = None  # from the moment the server has accepted
        self._queue: FixedTimeoutQueue[Any] | None = None  # where it waits, if for anything
        self._timer: Timer | None = None  # or this, if it is to be looked at at a certain time
        self._is_probed = False  # the kernel probes the server when it says nothing
        engine.loop.add(client.fileno(), MASK, self._on_client)
        engine.opened(self)

    @property
    def is_connected(self) -> bool:
        """The server has accepted, now or before it ended."""
        return self._pump is not None

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
            self._engine.loop.add(server.fileno(), MASK, self._on_server)
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

    def wait(self, queue: FixedTimeoutQueue[Any]) -> None:
        """Waits there, and nowhere else any more."""
        self._stop_waiting()
        self._queue = queue
        queue.add(self)

    def wait_in(
        self, queue: PortWaitQueue, retry: Callable[[], None], error: OSError | None = None
    ) -> None:
        """There is no local port for the server leg now: has `retry` called when there may be.

        Or no socket at all: then `error` says why.  The wait is no longer than that for a
        server to accept.
        """
        self._stop_waiting()
        limit = self._engine.limits.connect
        if self._engine.loop.now - self.since < limit:
            queue.join(retry, error)
        else:
            missing = in_words(error.errno) if error else "no local port was free"
            self.end(End.CONNECT_FAILED, f"{missing} for {limit:g} s")

    def end(self, end: End, detail: str = "") -> None:
        """Ends it now: in order if CLOSED, else both sides are reset.  Harmless if repeated."""
        if not self.alive:
            return
        self.alive = False
        if self._pump is not None:
            self._pump.stop()
        self._stop_waiting()
        engine = self._engine
        engine.watched.discard(self)
        names = self._owner.names() if log.enabled(INFO) else None  # while the sockets can be asked
        engine.loop.closing(self._client.fileno())
        if end is _CLOSED:
            _leave_to_the_kernel(self.session.down, self._client)
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
        del self._owner  # which refers to these legs: without a collector a circle is for ever
        engine.closed(self, end)

    def not_connected(self) -> None:
        """The server has not accepted in time."""
        self._queue = None
        self._owner.connect_failed(errno.ETIMEDOUT)

    def check_deadline(self) -> None:
        """Nothing may have moved for long: ends it if that is too long, or looks again later."""
        self._queue = self._timer = None
        session, engine = self.session, self._engine
        self._ask_the_sinks()
        if not self.alive:
            return
        now = engine.loop.now
        end = session.overdue(now, engine.limits)
        if end is not None:
            self.end(end, session.overdue_in_words(end, engine.limits))
        elif session.is_resetting and self._pump is not None:
            self._pump.turn(CLIENT)
        elif (due := session.deadline(engine.limits)) is not None:
            if session.may_stall and due > now + engine.stalled.seconds:
                self.wait(engine.stalled)
            else:
                self.check_deadline_at(due)

    def check_deadline_at(self, when: float) -> None:
        """Has the session looked at then, and waits for nothing else."""
        self._stop_waiting()
        self._timer = self._engine.loop.call_at(when, self.check_deadline)

    def guard(self) -> None:
        """Has the session looked at when it may be overdue."""
        engine = self._engine
        if self.session.may_stall:
            queue = engine.stalled
        elif self.session.is_channel_closed:
            queue = engine.half_closed
        else:
            return
        timer = self._timer
        if self._queue is not queue and not (
            timer is not None and timer.when <= engine.loop.now + queue.seconds
        ):
            self.wait(queue)

    def check(self) -> None:
        """Ends it if a side acknowledges nothing; watches it no longer if it rests."""
        try:
            self._check()
        except OSError as error:  # of the calls that ask and set: once more, later
            self._engine.host_failed(error)
            self._engine.watched.add(self)

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
        """Until the server has accepted."""
        note(self.session, CLIENT, events)
        if events & FAILED:
            self.end(End.RESET, lost_in_words(CLIENT, error_of(self._client)))

    def _on_server(self, events: int) -> None:
        """Until it has accepted, or can't be reached."""
        assert self._server is not None
        error = 0
        if events & FAILED:
            error = error_ahead(self._server)
            if error and error != errno.ECONNRESET:
                self._stop_waiting()
                self._owner.connect_failed(error)
                return
        elif not events & select.EPOLLOUT:
            return
        pump = self._connected()
        if error:  # it had accepted
            pump.lost(SERVER, error)
        pump.on_server(events)

    def _connected(self) -> Pump:
        """From now on the pump has all events."""
        engine, client, server = self._engine, self._client, self._server
        assert server is not None
        pump = self._pump = Pump(engine, self, self.session, client, server)
        engine.loop.set_handler(client.fileno(), pump.on_client)
        engine.loop.set_handler(server.fileno(), pump.on_server)
        self._stop_waiting()
        engine.counts.opened += 1
        self._owner.connected()
        if log.enabled(INFO):
            log.info("connection opened", **self._owner.names())
        return pump

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
                    self.end(End.RESET, f"{self.session.why}; {why}")
                else:
                    self.end(End.STALLED, why)
                return

    def _check(self) -> None:
        engine, server, pump = self._engine, self._server, self._pump
        assert server is not None
        assert pump is not None
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
                    pump.is_watched = self._is_probed = False
                    probe_as_usual(server)
                    return
        engine.watched.add(self)

    def _stop_waiting(self) -> None:
        if self._queue is not None:
            self._queue.discard(self)
            self._queue = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_server(self, in_order: bool = False) -> None:
        server = self._server
        if server is None:
            return
        if self._is_registered:
            self._engine.loop.closing(server.fileno())
            self._is_registered = False
        if in_order:
            _leave_to_the_kernel(self.session.up, server)
        else:
            close(server)


def _leave_to_the_kernel(channel: Channel, sink: Socket) -> None:
    """Closes a socket into which everything was written."""
    if channel.is_hastened:
        with suppress(OSError):
            take_time(sink)
    close_in_order(sink)


def _nothing_acked(side: SessionSide, seconds: float) -> str:
    return f"the {side} has acknowledged nothing for {seconds:g} s"


_CLOSED = End.CLOSED  # see channel.py
_UNDER_WAY = (0, errno.EINPROGRESS)
