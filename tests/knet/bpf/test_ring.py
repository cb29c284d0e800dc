"""What programs tell: a ring as the kernel fills it, and one that the tests fill themselves.

The latter is a file that lies in memory as a ring does, so that records that are being written,
which no program leaves behind, can be laid there.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.bpf.kernel import RING, BpfMap, BpfProgram
from knet.bpf.objectfile import MapSpec
from knet.bpf.ring import BUSY, DISCARDED, BpfRing
from tests.tools.instructions import tells, tells_nothing

SIZE = mmap.PAGESIZE
SPEC = MapSpec(RING, 0, 0, SIZE, 0)
RECORD = struct.Struct("=8xQ")
FRAME = bytes(64)


class Written:
    """A ring in a file, and its writer."""

    def __init__(self, record: int, start: int = 0) -> None:
        self._file = os.memfd_create("ring")
        os.ftruncate(self._file, 2 * mmap.PAGESIZE + 2 * SIZE)
        self._memory = mmap.mmap(self._file, 2 * mmap.PAGESIZE + 2 * SIZE)
        self._record, self._at = record, start
        for place in (0, mmap.PAGESIZE):
            self._put(place, start)
        self.ring = BpfRing(BpfMap(self._file, SPEC), record)

    def _put(self, at: int, position: int) -> None:
        self._memory[at : at + 8] = struct.pack("=Q", position)

    @property
    def read_to(self) -> int:
        """The reader's position."""
        return int(struct.unpack_from("=Q", self._memory, 0)[0])

    @property
    def written_to(self) -> int:
        return self._at

    def head(self, at: int, bits: int) -> None:
        """The length of the record at this position, with these bits."""
        self._both(at, struct.pack("=II", self._record | bits, 0))

    def write(self, body: bytes, bits: int = 0) -> int:
        """Lays a record down; its position."""
        at = self._at
        self.head(at, bits)
        self._both(at + 8, body.ljust(self._record + 7 & ~7, b"\0"))
        self._at += self.ring.step
        self._put(mmap.PAGESIZE, self._at)
        return at

    def _both(self, at: int, data: bytes) -> None:
        for offset, byte in enumerate(data):
            place = 2 * mmap.PAGESIZE + (at + offset) % SIZE
            self._memory[place] = self._memory[place + SIZE] = byte

    def close(self) -> None:
        self.ring.close()
        self._memory.close()
        os.close(self._file)


@pytest.fixture
def written() -> Iterator[Written]:
    with closing(Written(8)) as made:
        yield made


def numbers(ring: BpfRing, most: int = 1 << 16) -> list[int]:
    """What the records say that are read now."""
    return [number for (number,) in ring.records(RECORD, most) if isinstance(number, int)]


def number(each: int) -> bytes:
    return struct.pack("=Q", each)


def test_an_empty_ring_tells_nothing(written: Written) -> None:
    assert written.ring.waiting == 0
    assert written.ring.read() == b""
    assert written.read_to == 0


def test_records_are_read_once_in_their_order(written: Written) -> None:
    for each in (1, 2, 3):
        written.write(number(each))

    assert written.ring.waiting == 3
    assert numbers(written.ring, 2) == [1, 2]
    assert (written.ring.waiting, written.read_to) == (1, 2 * written.ring.step)
    written.write(number(4))
    assert numbers(written.ring) == [3, 4]
    assert numbers(written.ring) == []
    assert written.read_to == written.written_to


def test_what_is_being_written_is_left_with_all_behind_it(written: Written) -> None:
    written.write(number(1))
    busy = written.write(number(2), BUSY)
    written.write(number(3))

    assert numbers(written.ring) == [1]
    assert written.ring.waiting == 2
    assert numbers(written.ring) == []
    assert written.read_to == busy
    written.head(busy, 0)
    assert numbers(written.ring) == [2, 3]


def test_what_was_given_back_is_passed_over(written: Written) -> None:
    for each, bits in ((1, DISCARDED), (2, 0), (3, DISCARDED), (4, DISCARDED)):
        written.write(number(each), bits)

    assert numbers(written.ring) == [2]
    assert (written.ring.waiting, written.read_to) == (0, written.written_to)


def test_what_is_written_and_to_be_given_back_is_left(written: Written) -> None:
    written.write(number(1), BUSY | DISCARDED)

    assert numbers(written.ring) == []
    assert written.ring.waiting == 1


def test_no_record_is_cut_at_the_end_of_the_ring() -> None:
    layout = struct.Struct("=8x20s4x")
    with closing(Written(20, start=SIZE * 6 - 40)) as written:
        assert written.ring.step == layout.size == 32
        bodies = [bytes((at,)) * 20 for at in range(4)]
        for body in bodies:
            written.write(body)
        assert written.ring.records(layout) == [(body,) for body in bodies]


@given(
    st.integers(0, 1 << 40).map(lambda at: at * 16),
    st.lists(
        st.one_of(st.sampled_from(["read", "written"]), st.sampled_from([0, BUSY, DISCARDED])),
        max_size=300,
    ),
    st.integers(1, 9),
)
def test_whatever_order_they_come_in_each_is_told_once(
    start: int, steps: list[str | int], most: int
) -> None:
    told: list[int] = []
    wanted: list[int] = []
    with closing(Written(8, start)) as written:
        busy: list[int] = []
        for at, step in enumerate(steps):
            if step == "read":
                told += numbers(written.ring, most)
            elif step == "written":
                for each in busy:
                    written.head(each, 0)
                busy.clear()
            elif written.written_to - written.read_to + written.ring.step <= SIZE:
                assert isinstance(step, int)
                place = written.write(number(at), step)
                if step == BUSY:
                    busy.append(place)
                if step != DISCARDED:
                    wanted.append(at)
            assert told == wanted[: len(told)]
        for each in busy:
            written.head(each, 0)
        while written.ring.waiting:
            told += numbers(written.ring, most)
        assert told == wanted


# As the kernel fills it


@pytest.fixture
def ring(bpf: None) -> Iterator[BpfMap]:
    with closing(BpfMap.make("ring", SPEC)) as made:
        yield made


def run(ring: BpfMap, code: bytes, times: int = 1) -> int:
    """Runs it; its last answer."""
    with closing(BpfProgram.load("tells", code)) as program:
        return program.run(FRAME, repeat=times).verdict


@pytest.mark.net
@pytest.mark.parametrize("record", [8, 24, 56])
def test_what_programs_tell_is_read(ring: BpfMap, record: int) -> None:
    with closing(BpfRing(ring, record)) as reader:
        for each in (5, 6):
            run(ring, tells(ring.descriptor, each, record=record))

        assert reader.waiting == 2
        records = reader.read()
        assert len(records) == 2 * reader.step
        assert [records[at + 8] for at in (0, reader.step)] == [5, 6]
        assert reader.read() == b""


@pytest.mark.net
def test_what_programs_gave_back_is_passed_over(ring: BpfMap) -> None:
    with closing(BpfRing(ring, 8)) as reader:
        run(ring, tells(ring.descriptor, 1))
        assert run(ring, tells_nothing(ring.descriptor)) == 0
        run(ring, tells(ring.descriptor, 2))

        assert reader.waiting == 3
        assert numbers(reader) == [1, 2]


@pytest.mark.net
def test_a_full_ring_has_room_again_when_it_was_read(ring: BpfMap) -> None:
    with closing(BpfRing(ring, 8)) as reader:
        for _ in range(3):  # so it is gone round
            assert run(ring, tells(ring.descriptor, 3), SIZE) != 0
            assert SIZE // reader.step - 1 <= reader.waiting <= SIZE // reader.step
            assert set(numbers(reader)) == {3}
            assert run(ring, tells(ring.descriptor, 4)) == 0
            assert numbers(reader) == [4]


@pytest.mark.net
def test_another_reader_goes_on_where_the_first_has_ended(ring: BpfMap) -> None:
    with closing(BpfRing(ring, 8)) as first:
        run(ring, tells(ring.descriptor, 1), 3)
        assert len(numbers(first, 2)) == 2
    run(ring, tells(ring.descriptor, 2))
    with closing(BpfRing(ring, 8)) as second:
        assert numbers(second) == [1, 2]
