"""What programs tell: a ring buffer that they fill and that is read from shared memory.

No call is made to read it, and none of its events wakes anybody: the reader looks when it likes
(BPF_RB_NO_WAKEUP).  The layout is that of kernel/bpf/ringbuf.c: a page with the reader's position,
a page with the writers', then the data twice, so that no record is cut at the end.  Each record has
eight bytes before it: its length, with a bit while it is being written and one if it is to be
passed over.  Positions only grow.
"""

import mmap
import struct

from knet.bpf.kernel import BpfMap

BUSY, DISCARDED = 1 << 31, 1 << 30
"""BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT."""
_HEAD = 8


class BpfRing:
    """Reads a ring buffer whose records all have one size."""

    def __init__(self, ring: BpfMap, record: int) -> None:
        """`record`: bytes of each.  Raises OSError without leave to map it."""
        self._size = ring.spec.capacity
        self.step = _HEAD + (record + 7 & ~7)
        """Bytes from one record to the next, in what `read` gives."""
        page, descriptor = mmap.PAGESIZE, ring.descriptor
        self._ours = mmap.mmap(descriptor, page, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._theirs = mmap.mmap(
            descriptor, page + 2 * self._size, prot=mmap.PROT_READ, offset=page
        )
        self._consumer = memoryview(self._ours)[:8].cast("Q")
        self._producer = memoryview(self._theirs)[:8].cast("Q")
        self._data = memoryview(self._theirs)[page:]

    @property
    def waiting(self) -> int:
        """Records that wait to be read, those that are being written among them."""
        return (self._producer[0] - self._consumer[0]) // self.step

    def read(self, most: int = 1 << 16) -> bytes:
        """The records that are whole, `step` bytes each: eight that are no matter, then the record.

        At most so many.  What is being written is left for the next time, with all behind it.
        """
        at, end = self._consumer[0], self._producer[0]
        end = min(end, at + most * self.step)
        if at == end:
            return b""
        first = at & (self._size - 1)
        data = bytes(self._data[first : first + end - at])
        tops = data[3 :: self.step]  # of each length the byte with both bits
        if max(tops) >= DISCARDED >> 24:
            data, tops = self._checked(data, tops)
            end = at + len(tops) * self.step
        self._consumer[0] = end
        return data

    def _checked(self, data: bytes, tops: bytes) -> tuple[bytes, bytes]:
        """Up to the first that is being written, without those to be passed over."""
        whole = next((at for at, top in enumerate(tops) if top & BUSY >> 24), len(tops))
        kept = [
            data[at * self.step : (at + 1) * self.step]
            for at in range(whole)
            if not tops[at] & DISCARDED >> 24
        ]
        return b"".join(kept), tops[:whole]

    def records(self, layout: struct.Struct, most: int = 1 << 16) -> list[tuple[object, ...]]:
        """The same, taken apart; `layout` is of a record with the eight bytes before it."""
        return list(layout.iter_unpack(self.read(most)))

    def close(self) -> None:
        """Gives the memory back."""
        for view in (self._consumer, self._producer, self._data):
            view.release()
        self._ours.close()
        self._theirs.close()
