"""Compiled files of BPF programs: the one that krelay ships, and whatever has become of it."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.bpf import objectfile
from knet.bpf.objectfile import INSTRUCTION, BadObjectFile, MapSpec, ObjectFile, ProgramCode

WHOLE = (Path(__file__).parents[3] / "krelay" / "offload" / "relay.o").read_bytes()
PARSED = objectfile.parse(WHOLE)
WIDE = 0x18
HEADER_SIZE, SECTION_SIZE = 64, 64
SECTION = struct.Struct("<IIQQQQIIQQ")
SECTIONS_AT = struct.unpack_from("<Q", WHOLE, 40)[0]
SECTION_COUNT = struct.unpack_from("<H", WHOLE, 60)[0]


def without_symbols() -> bytes:
    """The same with its table of symbols said to be something else."""
    for at in range(SECTIONS_AT, SECTIONS_AT + SECTION_SIZE * SECTION_COUNT, SECTION_SIZE):
        if WHOLE[at + 4 : at + 8] == b"\2\0\0\0":
            return WHOLE[: at + 4] + b"\1" + WHOLE[at + 5 :]
    raise AssertionError


def parsed_or_refused(data: bytes) -> ObjectFile | None:
    """What this holds, every part of it as it has to be; None if it is refused."""
    try:
        found = objectfile.parse(data)
    except BadObjectFile:
        return None
    assert found.compiler.isascii()
    for spec in found.maps.values():
        assert all(0 <= number < 1 << 32 for number in spec)
    descriptors = dict.fromkeys(found.maps, 7)
    for program in found.programs.values():
        assert len(program.code) % INSTRUCTION == 0
        assert len(program.linked(descriptors)) == len(program.code) > 0
    return found


def test_the_shipped_file_has_programs_maps_and_a_compiler() -> None:
    assert {"in_ethernet", "out_ethernet", "in_ip", "out_ip"} <= PARSED.programs.keys()
    assert {"rewrites", "ports", "events", "totals"} <= PARSED.maps.keys()
    assert PARSED.maps["ports"] == MapSpec(2, 4, 8, 2048, 0)
    assert PARSED.compiler.startswith("clang ")
    assert {name for each in PARSED.programs.values() for _, name in each.uses} <= set(PARSED.maps)


def test_a_program_is_linked_to_the_maps_where_it_uses_them() -> None:
    descriptors = {name: 100 + at for at, name in enumerate(PARSED.maps)}
    for program in PARSED.programs.values():
        linked = program.linked(descriptors)
        changed = {
            at - at % INSTRUCTION for at in range(len(linked)) if linked[at] != program.code[at]
        }
        assert changed == {at for at, _ in program.uses}
        for at, name in program.uses:
            operation, registers, offset, value = struct.unpack_from("<BBhi", linked, at)
            assert (operation, registers >> 4, offset, value) == (WIDE, 1, 0, descriptors[name])
            assert registers & 0x0F == program.code[at + 1] & 0x0F


def test_a_program_is_not_linked_without_its_maps() -> None:
    with pytest.raises(KeyError, match="wanted"):
        ProgramCode(bytes(16), ((0, "wanted"),)).linked({"other": 3})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut off"),
        (WHOLE[:4], "cut off"),
        (b"\x7fELF\x02\x02" + WHOLE[6:], "little-endian ELF file for BPF"),
        (b"\x7fELF\x01\x01" + WHOLE[6:], "64-bit"),
        (WHOLE[:18] + b"\x3e\0" + WHOLE[20:], "for BPF"),
        (WHOLE[:58] + b"\x28\0" + WHOLE[60:], "sections are of another size"),
        (without_symbols(), "no table of symbols"),
    ],
    ids=["empty", "magic", "big-endian", "32 bits", "x86", "sections", "no symbols"],
)
def test_what_is_no_such_file_is_refused_with_the_reason(data: bytes, said: str) -> None:
    with pytest.raises(BadObjectFile, match=said):
        objectfile.parse(data)


def test_a_map_is_used_only_by_an_instruction_that_is_whole() -> None:
    """An entry of the table of uses is led astray, to every place of its program."""
    heads = [SECTION.unpack_from(WHOLE, at) for at in range(SECTIONS_AT, len(WHOLE), SECTION.size)]
    uses = next(head for head in heads if head[1] == 9)
    entry, body = uses[4], heads[uses[7]]
    code = WHOLE[body[4] : body[4] + body[5]]
    (name,) = (name for name, each in PARSED.programs.items() if each.code == code)
    cut = bytearray(WHOLE)
    cut[body[4] + len(code) - INSTRUCTION] = WIDE

    for data, place in [(WHOLE, place) for place in range(len(code) + 9)] + [
        (bytes(cut), len(code) - INSTRUCTION)
    ]:
        found = parsed_or_refused(data[:entry] + struct.pack("<Q", place) + data[entry + 8 :])
        if found is not None:
            assert place in dict(found.programs[name].uses)
            assert place % INSTRUCTION == 0
            assert place + 2 * INSTRUCTION <= len(code)
            assert code[place] == WIDE


def test_every_truncation_is_refused_or_whole() -> None:
    # The last of it is the table of sections, or the names: nothing can lack.
    found = [parsed_or_refused(WHOLE[:size]) for size in range(len(WHOLE))]

    assert not any(each is not None and each != PARSED for each in found)
    assert found.count(None) == len(WHOLE)


@pytest.mark.parametrize("at", range(HEADER_SIZE))
def test_any_byte_of_the_header_may_be_another(at: int) -> None:
    for byte in range(256):
        parsed_or_refused(WHOLE[:at] + bytes((byte,)) + WHOLE[at + 1 :])


@given(
    st.integers(0, SECTION_COUNT - 1),
    st.integers(0, SECTION_SIZE - 1),
    st.binary(min_size=1, max_size=8),
)
def test_any_section_may_be_described_wrongly(section: int, at: int, instead: bytes) -> None:
    at = min(at, SECTION_SIZE - len(instead)) + SECTIONS_AT + SECTION_SIZE * section
    parsed_or_refused(WHOLE[:at] + instead + WHOLE[at + len(instead) :])


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=20))
def test_any_bytes_of_it_may_be_damaged(damage: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, byte in damage:
        data[at] = byte
    parsed_or_refused(bytes(data))


@given(st.integers(0, len(WHOLE)), st.integers(0, 200), st.binary(max_size=200))
def test_bytes_may_be_missing_or_too_many(at: int, missing: int, more: bytes) -> None:
    parsed_or_refused(WHOLE[:at] + more + WHOLE[at + missing :])


@given(st.binary(max_size=300))
def test_any_bytes_will_do(data: bytes) -> None:
    assert parsed_or_refused(data) is None
    parsed_or_refused(WHOLE[:HEADER_SIZE] + data)
