"""A half against its model: two byte strings, and any schedule of partial reads and writes."""

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

    def step(self, half: Channel) -> bool:
        """Does what the half says; False if it waits."""
        match half.todo():
            case Todo.READ:
                assert not half.held
                data, self.arrived = self.arrived[: self.limit], self.arrived[self.limit :]
                if data or (self.fin_arrived and not self.coming):
                    self._pass(half, data)
                else:
                    half.empty()
            case Todo.WRITE:
                if count := self._take(bytes(half.held)):
                    half.sent(count, now=0.0)
                else:
                    half.full()
            case Todo.SHUT:
                self.fins += 1
                half.shut(now=0.0)
            case Todo.RESET:
                self.resets += 1
                return False
            case Todo.WAIT:
                return False
        return True

    def _pass(self, half: Channel, data: bytes) -> None:
        sent = self._take(data)
        half.got(len(data), self.limit, now=0.0)
        if sent:
            half.sent(sent, now=0.0)
        if sent < len(data):
            half.hold(data[sent:])

    def _take(self, data: bytes) -> int:
        count = min(self.space, len(data))
        self.taken += data[:count]
        self.space -= count
        return count


@given(data=st.binary(max_size=300), limit=st.integers(1, 40), script=steps, is_reset=st.booleans())
def test_any_schedule_passes_the_same_bytes_and_then_the_end(
    data: bytes, limit: int, script: list[tuple[bool, bool, int]], is_reset: bool
) -> None:
    half, ends = Channel(), Ends(data, limit)
    for arrives, drains, count in script:
        if arrives:
            ends.arrived += ends.coming[:count]
            ends.coming = ends.coming[count:]
            half.readable = True  # the edge that the kernel would give
        if drains:
            ends.space += count
            half.writable = True
        for _ in range(count):
            ends.step(half)
        assert len(half.held) <= limit
        assert data.startswith(ends.taken)
        assert half.moved == len(ends.taken)
        assert ends.fins == ends.resets == 0
    if is_reset:  # what wasn't read is lost with the source; what is held is not
        expected = ends.taken + bytes(half.held)
        half.got_eof = half.got_reset = True
    else:
        expected = data
        ends.arrived, ends.coming = ends.arrived + ends.coming, b""
        ends.fin_arrived = True
        half.readable = half.hinted = True
    ends.space = 10**6
    half.writable = True
    for _ in range(10_000):
        if not ends.step(half):
            break
    assert ends.taken == expected
    assert (ends.fins, ends.resets) == ((0, 1) if is_reset else (1, 0))
    assert half.sent_eof is not is_reset
    assert half.held is NOTHING


def in_words(case: object) -> str:
    """What is so in this half; the same in each process."""
    if not isinstance(case, Channel):
        return str(case)
    return " ".join(each.name for each in fields(case) if getattr(case, each.name)) or "nothing"


@pytest.mark.parametrize(
    ("half", "todo"),
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
def test_what_is_to_be_done_follows_from_the_facts(half: Channel, todo: Todo) -> None:
    assert half.todo() is todo


@pytest.mark.parametrize(
    ("half", "is_smooth"),
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
def test_it_is_smooth_while_whatever_comes_may_go_through(half: Channel, is_smooth: bool) -> None:
    assert half.is_smooth is is_smooth


@pytest.mark.parametrize("hinted", [False, True])
def test_a_short_read_empties_the_socket_unless_something_was_announced(hinted: bool) -> None:
    half = Channel(readable=True, hinted=hinted)
    half.got(1, asked=100, now=0.0)
    assert half.readable is hinted
    half.empty()
    assert half.readable is hinted  # a signal at the mark of urgent data looks like that, too
    half.empty()
    assert not half.readable
    assert not half.hinted


@pytest.mark.parametrize("ending", [False, True])
def test_a_full_read_leaves_the_socket_readable(ending: bool) -> None:
    half = Channel(readable=True, hinted=ending, ending=ending)
    half.got(100, asked=100, now=0.0)
    assert half.readable
    assert not half.got_eof


def test_a_short_read_before_nothing_but_the_end_of_file_has_met_it() -> None:
    half = Channel(readable=True, writable=True, hinted=True, ending=True)
    half.got(1, asked=100, now=0.0)
    half.hold(b"x")
    assert half.got_eof
    half.writable = True
    half.sent(1, now=0.0)
    assert half.todo() is Todo.SHUT


def test_a_full_sink_is_written_to_when_it_says_so() -> None:
    half = Channel(readable=True, writable=True)
    half.hold(b"abc")
    assert not half.writable
    half.writable = True
    half.sent(1, now=0.0)
    assert bytes(half.held) == b"bc"
    assert not half.writable
    half.writable = True
    half.full()
    assert half.todo() is Todo.WAIT


def test_an_idle_half_holds_no_buffer() -> None:
    half = Channel(readable=True, writable=True)
    half.hold(b"abc")
    half.writable = True
    half.sent(3, now=0.0)
    assert half.held is NOTHING
    assert half.writable


def test_what_moves_is_noted_with_its_time() -> None:
    half = Channel(at=1.0)
    half.got(1, asked=100, now=2.0)
    assert half.at == 2.0
    half.sent(1, now=3.0)
    assert (half.at, half.moved) == (3.0, 1)
    half.shut(now=4.0)
    assert half.at == 4.0
    half.empty()
    half.full()
    half.hold(b"x")
    assert (half.at, half.moved) == (4.0, 1)


def test_nothing_is_owed_to_a_sink_that_is_gone_but_its_source_is_read_on() -> None:
    half = Channel(readable=True, writable=True)
    half.hold(b"abc")
    half.cut()
    assert half.held is NOTHING
    assert half.sent_eof
    assert half.todo() is Todo.READ
    half.empty()
    assert half.todo() is Todo.WAIT
    half.readable = True
    half.got(0, 100, now=1.0)
    assert half.todo() is Todo.WAIT


def test_an_urgent_byte_that_is_held_is_urgent_until_something_else_is() -> None:
    half = Channel(readable=True, writable=True)
    half.hold(b"!", urgent=True)
    assert half.held_urgent
    half.writable = True
    half.sent(1, now=1.0)
    half.hold(b"rest")
    assert not half.held_urgent
