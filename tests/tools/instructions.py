"""BPF programs, written by hand (RFC 9669)."""

import struct

_R0, _R1, _R2, _R3, _R4, _FRAME = 0, 1, 2, 3, 4, 10
RINGBUF_OUTPUT, RINGBUF_RESERVE, RINGBUF_DISCARD = 130, 131, 133
"""Helpers (linux/bpf.h)."""


def instruction(
    operation: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0
) -> bytes:
    """One of eight bytes."""
    return struct.pack("<BBhi", operation, source << 4 | to, offset, value)


EXIT = instruction(0x95)
PASS_ON = instruction(0xB7, _R0, value=-1)
"""r0 = -1: TC_ACT_UNSPEC."""


def answer(verdict: int) -> bytes:
    """A program that answers this, whatever comes."""
    return instruction(0xB7, _R0, value=verdict) + EXIT


def map_of(register: int, descriptor: int) -> bytes:
    """Loads a map: BPF_LD | BPF_IMM | BPF_DW with BPF_PSEUDO_MAP_FD."""
    return instruction(0x18, register, 1, value=descriptor) + instruction(0)


def looks_into(descriptor: int) -> bytes:
    """A program that uses this map, and answers 7."""
    return map_of(_R1, descriptor) + answer(7)


def tells(ring: int, number: int, *, record: int = 8) -> bytes:
    """A program that puts a record into this ring, which begins with the number."""
    stored = b"".join(
        instruction(0x7A, _FRAME, offset=at - record, value=number if at == 0 else 0)
        for at in range(0, record, 8)
    )
    return (
        stored
        + map_of(_R1, ring)
        + instruction(0xBF, _R2, _FRAME)
        + instruction(0x07, _R2, value=-record)
        + instruction(0xB7, _R3, value=record)
        + instruction(0xB7, _R4, value=1)  # BPF_RB_NO_WAKEUP
        + instruction(0x85, value=RINGBUF_OUTPUT)
        + EXIT
    )


def tells_nothing(ring: int, *, record: int = 8) -> bytes:
    """A program that takes room in this ring, and gives it back; it answers 1 without room."""
    return (
        map_of(_R1, ring)
        + instruction(0xB7, _R2, value=record)
        + instruction(0xB7, _R3, value=0)
        + instruction(0x85, value=RINGBUF_RESERVE)
        + instruction(0x15, _R0, offset=5)  # without room: past the next five
        + instruction(0xBF, _R1, _R0)
        + instruction(0xB7, _R2, value=1)
        + instruction(0x85, value=RINGBUF_DISCARD)
        + answer(0)
        + answer(1)
    )
