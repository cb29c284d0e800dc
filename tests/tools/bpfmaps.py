"""What stands in the kernel's map of rewrites, asked of the kernel itself, past krelay."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from knet.bpf import kernel
from knet.bpf.kernel import BpfError, BpfMap
from knet.endpoint import Proto
from krelay.host.attachment import Attachment
from krelay.offload import layout
from krelay.steps import Step

_PROGRAM_OF_NUMBER, _MAP_OF_NUMBER = 13, 14
"""BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID (linux/bpf.h); they need CAP_SYS_ADMIN."""


class Entry(NamedTuple):
    """A rewrite that the kernel does by itself."""

    proto: Proto
    step: Step
    src: str
    dst: str
    """As its packets come, `10.0.0.1:4000`."""
    key: bytes
    tos: int
    """DSCP and ECN of the packets that it is for, if it is for one DSCP alone."""
    packets: int


def entries(name: str) -> set[Entry]:
    """Those of the krelay with rules of this name, in the network namespace of this thread."""
    found = set()
    for number in _maps(name):
        descriptor = kernel.call(_MAP_OF_NUMBER, struct.pack("=III", number, 0, 0))[0]
        spec = kernel.spec_of(descriptor)
        held = BpfMap(descriptor, spec)
        with closing(held):
            if spec.key != layout.KEY:
                continue
            for keys, values in held.items():
                for at in range(len(keys) // spec.key):
                    key = keys[at * spec.key :][: spec.key]
                    found.add(_entry(key, values[at * spec.value :][: spec.value]))
    return found


def take_out(name: str, key: bytes) -> None:
    """Takes one out, as another program with all rights could."""
    for number in _maps(name):
        descriptor = kernel.call(_MAP_OF_NUMBER, struct.pack("=III", number, 0, 0))[0]
        with closing(BpfMap(descriptor, kernel.spec_of(descriptor))) as held:
            if held.spec.key == layout.KEY:
                held.delete(key)


def _maps(name: str) -> Iterator[int]:
    """The numbers of the maps that the attached programs use."""
    with closing(Attachment(name)) as attachment:
        programs = set(attachment.attached().values())
    seen: set[int] = set()
    for program in programs:
        try:
            descriptor = kernel.call(_PROGRAM_OF_NUMBER, struct.pack("=III", program, 0, 0))[0]
        except BpfError as error:
            if error.errno == errno.ENOENT:  # others have taken its place
                continue
            raise
        try:
            seen.update(kernel.maps_of(descriptor))
        finally:
            os.close(descriptor)
    yield from sorted(seen)


def _entry(key: bytes, value: bytes) -> Entry:
    src, dst = (socket.inet_ntoa(key[at + 12 : at + 16]) for at in (0, 16))
    sport, dport, proto = struct.unpack_from("!HHB", key, 32)
    packets = layout.counted(value).packets
    ends = f"{src}:{sport}", f"{dst}:{dport}"
    return Entry(Proto(proto), Step(value[36]), *ends, key, value[40], packets)
