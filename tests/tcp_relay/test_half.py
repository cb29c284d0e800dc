"""A half against its model: two byte strings, and any schedule of partial reads and writes."""

from hypothesis import given
from hypothesis import strategies as st

from tcp_relay.half import CHUNK, Half, Todo

steps = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 12)), max_size=200)


class Ends:
    """A source that gives pieces and a sink that takes pieces, as the kernel would."""

    def __init__(self, data: bytes) -> None:
        self.arrived = b""
        self.coming = data
        self.fin_arrived = False
        self.taken = b""
        self.space = 0
        self.fins = 0

    def step(self, half: Half) -> bool:
        """Does what the half says; False if it waits."""
        match half.todo():
            case Todo.READ:
                room = half.room
                assert 0 < room <= CHUNK
                data, self.arrived = self.arrived[:room], self.arrived[room:]
                if data or (self.fin_arrived and not self.coming):
                    half.got(data, room)
                else:
                    half.empty()
            case Todo.WRITE:
                assert half.held
                count = min(self.space, len(half.held))
                if count:
                    self.taken += half.held[:count]
                    self.space -= count
                    half.sent(count)
                else:
                    half.full()
            case Todo.SHUT:
                self.fins += 1
                half.shut()
            case Todo.WAIT:
                return False
        return True


@given(data=st.binary(max_size=300), limit=st.integers(1, 40), script=steps)
def test_any_schedule_passes_the_same_bytes_and_then_the_end(
    data: bytes, limit: int, script: list[tuple[bool, bool, int]]
) -> None:
    half, ends = Half(limit=limit), Ends(data)
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
        assert ends.fins == 0
    ends.arrived, ends.coming = ends.arrived + ends.coming, b""
    ends.fin_arrived, ends.space = True, 10**6
    half.readable = half.writable = half.hinted = True
    for _ in range(10_000):
        if not ends.step(half):
            break
    assert ends.taken == data
    assert ends.fins == 1
    assert half.ended
    assert half.held == b""


def test_what_is_held_bounds_what_is_read() -> None:
    half = Half(limit=10, readable=True)
    assert half.room == 10
    half.got(b"12345678", asked=8)
    assert half.room == 2
    half.got(b"90", asked=2)
    assert half.todo() is Todo.WAIT
    half.writable = True
    half.sent(1)
    assert half.todo() is Todo.READ
    assert half.room == 1


def test_a_short_read_empties_the_socket_unless_something_was_announced() -> None:
    for hinted in (False, True):
        half = Half(readable=True, hinted=hinted)
        half.got(b"x", asked=100)
        assert half.may_read is hinted
        half.empty()
        assert not half.may_read
        assert not half.hinted


def test_a_full_read_leaves_the_socket_readable() -> None:
    half = Half(readable=True)
    half.got(b"x" * 100, asked=100)
    assert half.may_read


def test_the_end_waits_for_the_bytes_before_it_and_goes_once() -> None:
    half = Half(readable=True)
    half.got(b"last", asked=100)
    half.got(b"", asked=100)
    assert half.todo() is Todo.WAIT
    assert not half.must_shut
    half.writable = True
    assert half.todo() is Todo.WRITE
    half.sent(4)
    assert half.todo() is Todo.SHUT
    assert not half.ended
    half.shut()
    half.readable = True
    assert half.todo() is Todo.WAIT
    assert half.ended


def test_nothing_is_written_to_a_full_sink() -> None:
    half = Half(readable=True, writable=True)
    half.got(b"abc", asked=3)
    half.sent(1)
    assert bytes(half.held) == b"bc"
    assert not half.may_write
    half.writable = True
    half.full()
    assert not half.may_write


def test_an_idle_half_holds_no_buffer() -> None:
    half = Half(readable=True, writable=True)
    half.got(b"abc", asked=3)
    half.sent(1)
    half.sent(2)
    assert half.held == b""
    assert isinstance(half.held, bytes)
