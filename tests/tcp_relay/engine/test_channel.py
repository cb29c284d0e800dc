"""A channel against its model: two byte strings, and any schedule of partial reads and writes."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcp_relay.engine.channel import NOTHING, Channel, Todo

steps = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 12)), max_size=200)


class Ends:
    """A source that gives pieces and a sink that takes pieces, as the kernel would."""

    def __init__(self, data: bytes, limit: int) -> None:
        self.limit = limit
        self.arrived = b""
        self.coming = data
        self.fin_arrived = False
        self.taken = b""
        self.space = 0
        self.fins = 0
        self.resets = 0

    def step(self, channel: Channel) -> bool:
        """Does what the channel says; False if it waits."""
        match channel.todo():
            case Todo.READ:
                assert not channel.held
                data, self.arrived = self.arrived[: self.limit], self.arrived[self.limit :]
                if data or (self.fin_arrived and not self.coming):
                    self._pass(channel, data)
                else:
                    channel.empty()
            case Todo.WRITE:
                if count := self._take(bytes(channel.held)):
                    channel.sent(count, now=0.0)
                else:
                    channel.full()
            case Todo.SHUT:
                self.fins += 1
                channel.shut(now=0.0)
            case Todo.RESET:
                self.resets += 1
                return False
            case Todo.WAIT:
                return False
        return True

    def _pass(self, channel: Channel, data: bytes) -> None:
        sent = self._take(data)
        channel.got(len(data), self.limit, now=0.0)
        if sent:
            channel.sent(sent, now=0.0)
        if sent < len(data):
            channel.hold(data[sent:])

    def _take(self, data: bytes) -> int:
        count = min(self.space, len(data))
        self.taken += data[:count]
        self.space -= count
        return count


@given(data=st.binary(max_size=300), limit=st.integers(1, 40), script=steps, is_reset=st.booleans())
def test_any_schedule_passes_the_same_bytes_and_then_the_end(
    data: bytes, limit: int, script: list[tuple[bool, bool, int]], is_reset: bool
) -> None:
    channel, ends = Channel(), Ends(data, limit)
    for arrives, drains, count in script:
        if arrives:
            ends.arrived += ends.coming[:count]
            ends.coming = ends.coming[count:]
            channel.readable = True  # the edge that the kernel would give
        if drains:
            ends.space += count
            channel.writable = True
        for _ in range(count):
            ends.step(channel)
        assert len(channel.held) <= limit
        assert data.startswith(ends.taken)
        assert channel.moved == len(ends.taken)
        assert ends.fins == ends.resets == 0
    if is_reset:  # what wasn't read is lost with the source; what is held is not
        expected = ends.taken + bytes(channel.held)
        channel.got_eof = channel.got_reset = True
    else:
        expected = data
        ends.arrived, ends.coming = ends.arrived + ends.coming, b""
        ends.fin_arrived = True
        channel.readable = channel.hinted = True
    ends.space = 10**6
    channel.writable = True
    for _ in range(10_000):
        if not ends.step(channel):
            break
    assert ends.taken == expected
    assert (ends.fins, ends.resets) == ((0, 1) if is_reset else (1, 0))
    assert channel.sent_eof is not is_reset
    assert channel.held is NOTHING


def in_words(case: object) -> str:
    """What is so in this channel; the same in each process."""
    if not isinstance(case, Channel):
        return str(case)
    return " ".join(each.name for each in fields(case) if getattr(case, each.name)) or "nothing"


@pytest.mark.parametrize(
    ("channel", "todo"),
    [
        (Channel(), Todo.WAIT),
        (Channel(readable=True), Todo.WAIT),
        (Channel(writable=True), Todo.WAIT),
        (Channel(readable=True, writable=True), Todo.READ),
        (Channel(readable=True, writable=True, held=memoryview(b"x")), Todo.WRITE),
        (Channel(readable=True, held=memoryview(b"x")), Todo.WAIT),
        (Channel(got_eof=True), Todo.SHUT),
        (Channel(got_eof=True, held=memoryview(b"x")), Todo.WAIT),
        (Channel(got_eof=True, held=memoryview(b"x"), writable=True), Todo.WRITE),
        (Channel(got_eof=True, sent_eof=True, readable=True, writable=True), Todo.WAIT),
        (Channel(got_eof=True, got_reset=True), Todo.RESET),
        (Channel(got_eof=True, got_reset=True, held=memoryview(b"x")), Todo.WAIT),
        (Channel(got_eof=True, sent_eof=True, got_reset=True), Todo.RESET),
    ],
    ids=in_words,
)
def test_what_is_to_be_done_follows_from_the_facts(channel: Channel, todo: Todo) -> None:
    assert channel.todo() is todo


@pytest.mark.parametrize(
    ("channel", "is_smooth"),
    [
        (Channel(), False),
        (Channel(writable=True), True),
        (Channel(writable=True, readable=True), True),
        (Channel(writable=True, held=memoryview(b"x")), False),
        (Channel(writable=True, got_eof=True), False),
        (Channel(writable=True, hinted=True), False),
    ],
    ids=in_words,
)
def test_it_is_smooth_while_whatever_comes_may_go_through(
    channel: Channel, is_smooth: bool
) -> None:
    assert channel.is_smooth is is_smooth


@pytest.mark.parametrize("hinted", [False, True])
def test_a_short_read_empties_the_socket_unless_something_was_announced(hinted: bool) -> None:
    channel = Channel(readable=True, hinted=hinted)
    channel.got(1, asked=100, now=0.0)
    assert channel.readable is hinted
    channel.empty()
    assert channel.readable is hinted  # a signal at the mark of urgent data looks like that, too
    channel.empty()
    assert not channel.readable
    assert not channel.hinted


@pytest.mark.parametrize("ending", [False, True])
def test_a_full_read_leaves_the_socket_readable(ending: bool) -> None:
    channel = Channel(readable=True, hinted=ending, ending=ending)
    channel.got(100, asked=100, now=0.0)
    assert channel.readable
    assert not channel.got_eof


def test_a_short_read_before_nothing_but_the_end_of_file_has_met_it() -> None:
    channel = Channel(readable=True, writable=True, hinted=True, ending=True)
    channel.got(1, asked=100, now=0.0)
    channel.hold(b"x")
    assert channel.got_eof
    channel.writable = True
    channel.sent(1, now=0.0)
    assert channel.todo() is Todo.SHUT


def test_a_full_sink_is_written_to_when_it_says_so() -> None:
    channel = Channel(readable=True, writable=True)
    channel.hold(b"abc")
    assert not channel.writable
    channel.writable = True
    channel.sent(1, now=0.0)
    assert bytes(channel.held) == b"bc"
    assert not channel.writable
    channel.writable = True
    channel.full()
    assert channel.todo() is Todo.WAIT


def test_an_idle_channel_holds_no_buffer() -> None:
    channel = Channel(readable=True, writable=True)
    channel.hold(b"abc")
    channel.writable = True
    channel.sent(3, now=0.0)
    assert channel.held is NOTHING
    assert channel.writable


def test_what_moves_is_noted_with_its_time() -> None:
    channel = Channel(at=1.0)
    channel.got(1, asked=100, now=2.0)
    assert channel.at == 2.0
    channel.sent(1, now=3.0)
    assert (channel.at, channel.moved) == (3.0, 1)
    channel.shut(now=4.0)
    assert channel.at == 4.0
    channel.empty()
    channel.full()
    channel.hold(b"x")
    assert (channel.at, channel.moved) == (4.0, 1)


def test_nothing_is_owed_to_a_sink_that_is_gone_but_its_source_is_read_on() -> None:
    channel = Channel(readable=True, writable=True)
    channel.hold(b"abc")
    channel.cut()
    assert channel.held is NOTHING
    assert channel.sent_eof
    assert channel.todo() is Todo.READ
    channel.empty()
    assert channel.todo() is Todo.WAIT
    channel.readable = True
    channel.got(0, 100, now=1.0)
    assert channel.todo() is Todo.WAIT


def test_an_urgent_byte_that_is_held_is_urgent_until_something_else_is() -> None:
    channel = Channel(readable=True, writable=True)
    channel.hold(b"!", urgent=True)
    assert channel.held_urgent
    channel.writable = True
    channel.sent(1, now=1.0)
    channel.hold(b"rest")
    assert not channel.held_urgent
