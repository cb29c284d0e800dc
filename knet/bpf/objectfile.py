"""A compiled file of BPF programs: an ELF file as clang makes it.  Pure.

Programs stand in sections of their own, by whose names they are known: `x` in a section "tc/x",
since no section may have the name of what is in it.  A map is a variable in the section "maps",
with the five numbers of `MapSpec`; a program names it where it uses it, and the file says where
that is.  The text in the section "compiler" says what has made the byte code.

Sources: elf(5); RFC 9669 (the instructions); linux/bpf.h.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

MAPS, COMPILER = "maps", "compiler"
INSTRUCTION = 8
"""Bytes of an instruction (RFC 9669, section 3)."""
_MACHINE = 247
"""EM_BPF."""
_SYMBOLS, _RELOCATIONS, _CODE = 2, 9, 1
"""SHT_SYMTAB, SHT_REL, SHT_PROGBITS."""
_EXECUTABLE, _OBJECT = 4, 1
"""SHF_EXECINSTR; STT_OBJECT."""
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQ")
_SPEC = struct.Struct("<5I")
_WIDE = 0x18
"""The operation that loads 64 bits, a map among others (BPF_LD | BPF_IMM | BPF_DW)."""
_MAP_FD = 1
"""BPF_PSEUDO_MAP_FD: the 64 bits are the descriptor of a map."""


class BadObjectFile(ValueError):
    """It isn't a file of BPF programs as clang makes them.  The text says what it lacks."""


class MapSpec(NamedTuple):
    """What a map is made with (BPF_MAP_CREATE, linux/bpf.h): sizes in bytes."""

    kind: int
    key: int
    value: int
    capacity: int
    flags: int


@dataclass(frozen=True, slots=True)
class ProgramCode:
    """A program, before it knows its maps."""

    code: bytes
    uses: tuple[tuple[int, str], ...]
    """Where it uses which map: bytes from the beginning."""

    def linked(self, descriptors: dict[str, int]) -> bytes:
        """The same with the maps of these descriptors.  Raises KeyError if one lacks."""
        code = bytearray(self.code)
        for at, name in self.uses:
            code[at + 1] = code[at + 1] & 0x0F | _MAP_FD << 4
            struct.pack_into("<i", code, at + 4, descriptors[name])
        return bytes(code)


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """Maps and programs by name."""

    maps: dict[str, MapSpec]
    programs: dict[str, ProgramCode]
    compiler: str


def parse(data: bytes) -> ObjectFile:
    """What this file holds.  Raises BadObjectFile."""
    try:
        return _parse(data)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        if isinstance(error, BadObjectFile):
            raise
        raise BadObjectFile("it is cut off, or no file of BPF programs") from None


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    body: bytes
    link: int
    about: int


def _parse(data: bytes) -> ObjectFile:
    header = _HEADER.unpack_from(data)
    if not header[0].startswith(b"\x7fELF\x02\x01") or header[2] != _MACHINE:
        raise BadObjectFile("it is no 64-bit little-endian ELF file for BPF")
    sections = _sections(data, header)
    found = [each for each in sections if each.kind == _SYMBOLS]
    if len(found) != 1:
        raise BadObjectFile("it has no table of symbols")
    names = sections[found[0].link].body
    symbols = [
        (_text(names, name), kind & 0x0F, section, value)
        for name, kind, _, section, value, _ in _SYMBOL.iter_unpack(found[0].body)
    ]
    maps: dict[str, MapSpec] = {}
    for name, kind, at, value in symbols:
        if kind == _OBJECT and at < len(sections) and sections[at].name == MAPS:
            maps[name] = MapSpec._make(_SPEC.unpack_from(sections[at].body, value))
    programs: dict[str, ProgramCode] = {}
    for number, section in enumerate(sections):
        if section.kind != _CODE or not section.flags & _EXECUTABLE or not section.body:
            continue
        uses = []
        for each in sections:
            if each.kind == _RELOCATIONS and each.about == number:
                for at, info in _RELOCATION.iter_unpack(each.body):
                    name = symbols[info >> 32][0]
                    if name not in maps or not _is_wide(section.body, at):
                        raise BadObjectFile(f"{section.name} uses {name or 'a section'}: no map")
                    uses.append((at, name))
        if len(section.body) % INSTRUCTION:
            raise BadObjectFile(f"{section.name} ends within an instruction")
        name = section.name.rpartition("/")[2]
        programs[name] = ProgramCode(section.body, tuple(sorted(uses)))
    compilers = [each.body for each in sections if each.name == COMPILER]
    return ObjectFile(maps, programs, b"".join(compilers).rstrip(b"\0").decode("ascii"))


def _is_wide(code: bytes, at: int) -> bool:
    """Whether an instruction of 16 bytes that may load a map begins there."""
    is_whole = at % INSTRUCTION == 0 and at + 2 * INSTRUCTION <= len(code)
    return is_whole and code[at] == _WIDE


def _sections(data: bytes, header: tuple[int, ...]) -> list[_Section]:
    start, size, count, names = header[6], header[11], header[12], header[13]
    if size != _SECTION.size:
        raise BadObjectFile("its sections are of another size")
    heads = [_SECTION.unpack_from(data, start + size * at) for at in range(count)]
    bodies = [data[head[4] : head[4] + head[5]] if head[1] != 8 else b"" for head in heads]
    return [
        _Section(_text(bodies[names], head[0]), head[1], head[2], body, head[6], head[7])
        for head, body in zip(heads, bodies, strict=True)
    ]


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode("ascii")
