"""A TCP connection as its two programs see it: scripts of calls, and what Linux answers to them.

    client write 100        one send, which the kernel takes at once
    client urgent           one byte with MSG_OOB; the receiver has SO_OOBINLINE
    client flood            a send of more than all buffers on the way hold; waits for the reader.
                            One in each direction
    server read 40          as many bytes, or until nothing more comes
    server read all         until the end of file, an error, or nothing more comes
    client shutdown         of its sending side
    client close            FIN, or RST if something is unread
    client abort            close with SO_LINGER 0: RST
    client pause            nothing for a while, by either

TCP is not deterministic, but what it leaves to chance is little: how much is under way when
something happens.  A script is therefore played in lock-step.  After each step its effect is waited
for, so that nothing is under way, and then each answer of the kernel follows from the calls so far.
`Model` says which: two queues of bytes, of which only the counts matter, and for each socket
whether FIN or RST came.  It is exact down to errno:

- A read gives the bytes first, whatever came behind them; then the end of file if there was a FIN,
  even if RST followed it; then the pending error, once; then the end of file.
- RST leaves EPIPE behind if FIN came before and none was sent, else ECONNRESET.  A write raises it
  once, and EPIPE from then on.
- Closing with unread bytes sends RST, and so does a closed socket that gets bytes.
- After both FINs the connection is over: nothing that one side does can be seen by the other.

Only a flood keeps something under way.  Its writer is `blocked`, and as long as it is, how much is
where depends on the buffers; a relay has more of them than a direct connection.  So the length of
what a reader gets is not predicted, but measured, when the sender cuts its flood short:

- shutdown and close deliver what `send` took: exactly that must be read, then the end of file.
- RST discards what is still in the sender's own queue.  What was acknowledged by then must be read,
  then ECONNRESET.  Of the rest, a part may be read, if it was on its way just then.
- RST while both directions are full.  A relay meets two rules, to deliver what it holds and to end
  the pair at the first write error.  At least what lay in the reader's own queue must be read.

In each case it is a prefix of what was written.  Until the reader has read all of it, directly it
would see a RST at once, through a relay perhaps behind the bytes; so in between it makes no call
that could tell (`Model.can`).  It may read everything, close, or abort.

Nor does TCP promise that a writer stays blocked until RST reaches it: a relay may have something to
deliver before, and meanwhile take what comes the other way, for nobody.  So that RST finds a flood
under way all the same, it is made longer here too (`Model.extend`), up to a bound.

    >>> model = Model()
    >>> model.play(parse("client write 100")), model.play(parse("client abort"))
    (Answer(result='ok', least=0, most=0), Answer(result='ok', least=0, most=0))
    >>> str(model.view(SERVER))
    '100 unread, CLOSE, RDHUP HUP ERR'
    >>> model.play(parse("server read all"))
    Answer(result='ECONNRESET', least=100, most=100)
    >>> model.play(parse("server write 1"))
    Answer(result='EPIPE', least=0, most=0)
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import NamedTuple

CLIENT, SERVER = ENDS = (0, 1)
NAMES = ("client", "server")

SMALL = 8192
"""Bytes that lie unread at most without a flood: any socket's receive buffer takes them."""

NIBBLE = 2000
"""Bytes that one step reads of a flood at most: its writer stays blocked."""

FLOOD = 1024 * 1024
"""Bytes: several times what a direct connection takes, and mostly more than one through a relay.

How much that takes is the kernel's choice: it makes the buffers of a fast stream larger, on a whim
by megabytes.  Where the flood finds room, it is made longer (`Model.extend`).
"""


class Verb(StrEnum):
    WRITE = "write"
    URGENT = "urgent"
    FLOOD = "flood"
    READ = "read"
    SHUTDOWN = "shutdown"
    CLOSE = "close"
    ABORT = "abort"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the program at `end`."""

    end: int
    verb: Verb
    count: int | None = None
    """Bytes of a write or a read; None reads all."""

    def __str__(self) -> str:
        words = [NAMES[self.end], self.verb.value]
        if self.verb in (Verb.WRITE, Verb.READ):
            words.append("all" if self.count is None else str(self.count))
        return " ".join(words)


def parse(line: str) -> Step:
    """The step that prints as `line`."""
    name, verb, *count = line.split()
    return Step(
        NAMES.index(name), Verb(verb), int(count[0]) if count and count != ["all"] else None
    )


class Answer(NamedTuple):
    """What a call gives: `result` is "ok", "EOF", "nothing", "blocked" or an errno's name.

    A read also gives from `least` to `most` bytes.
    """

    result: str
    least: int = 0
    most: int = 0


class View(NamedTuple):
    """What the program at one end could learn about its connection; None: not predicted."""

    unread: int | None
    state: str | None
    """Of TCP, as in RFC 9293."""
    flags: str | None
    """Of poll."""
    flood: str | None
    """What became of the last one: "", "blocked", "done" or an errno's name."""

    def __str__(self) -> str:
        shown = [
            "" if self.unread == 0 else f"{_known(self.unread)} unread",
            _known(self.state),
            _known(self.flags),
            self.flood and f"flood {self.flood}",
        ]
        return ", ".join(filter(None, shown))

    def allows(self, seen: "View") -> bool:
        """Whether `seen` agrees in all that is predicted."""
        return all(mine in (None, its) for mine, its in zip(self, seen, strict=True))


def _known(value: object) -> str:
    return "?" if value is None else str(value)


UNKNOWN = View(None, None, None, None)


class Cut(NamedTuple):
    """How far a blocked flood had come when its sender, or its RST, ended it.

    All three count from the beginning of the stream.
    """

    taken: int
    """By `send`."""
    acked: int
    """By the other end of the sender's connection, be it the peer or a relay."""
    arrived: int
    """In the peer's own receive queue, or read."""


class Ending(StrEnum):
    """What is behind the last byte of a stream."""

    OPEN = ""
    FIN = "FIN"
    RST = "RST"


@dataclass(slots=True)
class Stream:
    """One direction: from `least` to `most` bytes in all, of which `read` were read.

    While it is `full`, some of them are under way, and the ending is behind them.
    """

    least: int = 0
    most: int = 0
    read: int = 0
    full: bool = False
    ending: Ending = Ending.OPEN

    @property
    def has_unread(self) -> bool:
        return self.read < self.most

    @property
    def is_cut(self) -> bool:
        """It is full, and its sender will add nothing."""
        return self.full and self.ending is not Ending.OPEN

    def add(self, count: int) -> None:
        self.least += count
        self.most += count


@dataclass(slots=True)
class Socket:
    """One end, apart from the bytes."""

    shut: bool = False
    closed: bool = False
    got_fin: bool = False
    got_rst: bool = False
    error: str = ""
    """Pending."""
    flood: str = ""
    torn: bool = False
    """RST came while both directions were full: either call may be the one that reports it."""


@dataclass(slots=True)
class Model:
    """The reference: plays the steps that it `can`, one after the other."""

    sockets: tuple[Socket, Socket] = field(default_factory=lambda: (Socket(), Socket()))
    streams: tuple[Stream, Stream] = field(default_factory=lambda: (Stream(), Stream()))
    """By sender."""
    events: Counter[str] = field(default_factory=Counter)
    """What has happened that scripts have to cover."""

    @property
    def over(self) -> bool:
        """No program is left."""
        return all(socket.closed for socket in self.sockets)

    def can(self, step: Step) -> bool:
        """Whether the step makes sense, and its answer can be told."""
        me, peer, out, into = self._from(step.end)
        if me.closed:
            return False
        everything = step.verb is Verb.READ and step.count is None
        if step.verb is Verb.PAUSE:
            return True
        if into.full and (peer.closed or me.torn):
            return everything or step.verb in (Verb.CLOSE, Verb.ABORT)
        match step.verb:
            case Verb.WRITE | Verb.URGENT:
                count = 1 if step.verb is Verb.URGENT else step.count or 0
                fails = me.shut or me.got_rst or peer.closed
                return not out.full and (fails or out.most - out.read + count <= SMALL)
            case Verb.FLOOD:
                return out.most < FLOOD  # the first
            case Verb.READ:
                return (
                    everything or not into.full or (not into.is_cut and (step.count or 0) <= NIBBLE)
                )
            case Verb.SHUTDOWN:
                return not out.is_cut
            case Verb.CLOSE | Verb.ABORT:
                resets = step.verb is Verb.ABORT or into.has_unread
                # After both FINs: a relay may have acknowledged the peer's already, or not.
                may_be_over = out.is_cut or (into.is_cut and me.shut)
                return not (resets and may_be_over)

    def extend(self, end: int) -> None:
        """A flood that is blocked, or will be ended by RST, found room for all: as much again."""
        self.streams[end].add(FLOOD)

    def may_cut(self, step: Step) -> bool:
        """Whether `play` needs to know how far the floods are."""
        return step.verb in (Verb.SHUTDOWN, Verb.CLOSE, Verb.ABORT) and (
            self.streams[0].full or self.streams[1].full
        )

    def play(self, step: Step, cut: Cut | None = None) -> Answer:
        """Takes a step; `cut` is about its own end's stream."""
        me, _, out, into = self._from(step.end)
        match step.verb:
            case Verb.WRITE | Verb.URGENT:
                self._note(step.verb)
                return self._write(step.end, 1 if step.verb is Verb.URGENT else step.count or 0)
            case Verb.FLOOD:
                return self._flood(step.end)
            case Verb.READ:
                return self._read(step.end, step.count)
            case Verb.SHUTDOWN:
                if self._is_done(step.end):
                    self._note("shutdown of what is over")
                    return Answer("ENOTCONN")
                self._fin(step.end, cut)
            case Verb.CLOSE | Verb.ABORT:
                by_rst = step.verb is Verb.ABORT or into.has_unread
                if not self._is_done(step.end):
                    if by_rst:
                        self._note(
                            "abort" if step.verb is Verb.ABORT else "close with unread bytes"
                        )
                        self._rst(step.end, cut)
                    else:
                        self._fin(step.end, cut)
                me.closed = True
                into.full = into.full and not by_rst
            case Verb.PAUSE:
                self._note("pause")
                if out.full or into.full:
                    self._note("pause while full")
        return Answer("ok")

    def view(self, end: int) -> View | None:
        """What the end sees once nothing moves any more; None if it is closed."""
        me, _, out, into = self._from(end)
        if me.closed:
            return None
        if into.full and (me.torn or into.ending is Ending.RST):
            return UNKNOWN
        over = me.got_rst or (me.shut and me.got_fin)
        flags = (("RDHUP", me.got_fin or me.got_rst), ("HUP", over), ("ERR", bool(me.error)))
        return View(
            None if into.full else into.most - into.read,
            None if out.is_cut and not me.got_rst else self._state(end),
            " ".join(name for name, is_set in flags if is_set),
            me.flood,
        )

    def _from(self, end: int) -> tuple[Socket, Socket, Stream, Stream]:
        """As the program at `end` sees it: my socket, the peer's, the stream out, the one in."""
        return self.sockets[end], self.sockets[1 - end], self.streams[end], self.streams[1 - end]

    def _is_done(self, end: int) -> bool:
        return self._state(end) == "CLOSE"

    def _state(self, end: int) -> str:
        me, _, out, _ = self._from(end)
        if me.got_rst or (me.shut and me.got_fin and not out.full):
            return "CLOSE"
        if me.shut:
            return "FIN-WAIT-2"
        return "CLOSE-WAIT" if me.got_fin else "ESTABLISHED"

    def _write(self, end: int, count: int) -> Answer:
        me, peer, out, _ = self._from(end)
        if refusal := self._refusal(end):
            self._note("write that fails")
            return Answer(refusal)
        if not count:
            self._note("write of nothing")
        elif peer.closed:
            self._note("write to a closed peer")
            self._got_rst(end)
        else:
            if me.got_fin:
                self._note("write after the other's FIN")
            out.add(count)
        return Answer("ok")

    def _flood(self, end: int) -> Answer:
        me, peer, out, into = self._from(end)
        if refusal := self._refusal(end):
            return Answer(refusal)
        if peer.closed:
            self._note("flood to a closed peer")
            me.flood = "blocked"
            self._got_rst(end)
            return Answer("ok")
        self._note("both full" if into.full else "flood")
        out.add(FLOOD)
        out.full = True
        me.flood = "blocked"
        return Answer("ok")

    def _refusal(self, end: int) -> str:
        """The error of a write, "" if it is taken."""
        me = self.sockets[end]
        if me.error or me.shut or me.got_rst:
            error, me.error = me.error or "EPIPE", ""
            return error
        return ""

    def _read(self, end: int, count: int | None) -> Answer:
        me, _, out, into = self._from(end)
        if count is not None and (into.full or count <= into.most - into.read):
            into.read += count
            return Answer("ok", count, count)
        least, most = max(into.least - into.read, 0), into.most - into.read
        into.read = into.least = into.most
        self._drained(end)
        if me.torn:
            me.torn, me.got_rst, me.flood, out.full = False, True, "RST", False
            return Answer("RST", least, most)
        if me.got_fin:
            result = "EOF"
        elif me.error:
            result, me.error = me.error, ""
        else:
            result = "EOF" if me.got_rst else "nothing"
        if me.got_rst and most:
            self._note("read of bytes before a RST")
        return Answer(result, least, most)

    def _drained(self, end: int) -> None:
        """All of a flood was read: its ending arrives, or its writer goes on."""
        me, peer, _, into = self._from(end)
        if not into.full:
            return
        into.full = False
        match into.ending:
            case Ending.OPEN:
                peer.flood = "done"
            case Ending.FIN:
                me.got_fin = True
            case Ending.RST:
                self._got_rst(end)

    def _fin(self, end: int, cut: Cut | None) -> None:
        me, peer, out, _ = self._from(end)
        if me.shut:
            return
        me.shut = True
        self._note("FIN after FIN" if me.got_fin else "FIN")
        if not out.full:
            out.ending = Ending.FIN
            peer.got_fin = True
            return
        assert cut
        self._note("FIN behind a flood")
        out.ending = Ending.FIN
        out.least = out.most = cut.taken
        me.flood = ""

    def _rst(self, end: int, cut: Cut | None) -> None:
        me, peer, out, into = self._from(end)
        self._note("RST before any byte" if not (out.most or into.most) else "RST")
        if me.shut:
            self._note("RST after FIN")
        if not out.full:
            self._got_rst(1 - end)
            return
        assert cut
        out.ending = Ending.RST
        out.least, out.most = cut.acked, cut.taken
        me.flood = ""
        if not into.full:
            self._note("RST behind a flood")
            return
        self._note("RST while both are full")
        out.least = cut.arrived
        peer.torn = peer.flood == "blocked"

    def _got_rst(self, end: int) -> None:
        me, _, out, into = self._from(end)
        if me.closed or self._is_done(end):
            return
        if into.has_unread:
            self._note("RST to one with unread bytes")
        me.got_rst = True
        me.error = "EPIPE" if me.got_fin and not me.shut else "ECONNRESET"
        if me.flood == "blocked":
            self._note("RST to a blocked writer")
            me.flood, me.error = me.error, ""
        out.full = False

    def _note(self, event: str) -> None:
        self.events[event] += 1


NOMINAL = Cut(FLOOD // 2, FLOOD // 4, FLOOD // 8)
"""For a model that is played without a connection."""

# How often, in proportion, by the mood of a script.
_WEIGHTS = {
    #           write urgent flood read shutdown close abort pause
    "talk":     (30,    3,    2,   30,    3,      1,    1,    1),
    "bulk":     (10,    1,   10,   15,    4,      2,    2,    2),
    "end":      (10,    1,    2,   10,    8,      4,    4,    1),
}  # fmt: skip


def random_script(seed: int) -> list[Step]:
    """The script with that number: 1 to some 20 steps, all of which can be played."""
    rng = Random(seed)
    model = Model()
    steps: list[Step] = []
    weights = _WEIGHTS[rng.choice(list(_WEIGHTS))]

    def play(step: Step) -> None:
        if model.can(step):
            model.play(step, NOMINAL if model.may_cut(step) else None)
            steps.append(step)

    for _ in range(rng.randint(1, 24)):
        (verb,) = rng.choices(list(Verb), weights)
        play(Step(rng.choice(ENDS), verb, _random_count(rng, verb)))
    # What is left in the queues is looked at, mostly.
    for end in rng.sample(ENDS, 2):
        if rng.random() < 0.8:
            play(Step(end, Verb.READ))
            play(Step(end, Verb.SHUTDOWN))
    for end in ENDS:
        play(Step(end, Verb.READ))
    return steps


def _random_count(rng: Random, verb: Verb) -> int | None:
    if verb is Verb.WRITE:
        return rng.choice(
            (0, 1, 2, rng.randint(1, 100), rng.randint(1, 1500), rng.randint(1, SMALL))
        )
    if verb is Verb.READ:
        return rng.choice((None, None, 1, rng.randint(1, 100), rng.randint(1, NIBBLE)))
    return None
