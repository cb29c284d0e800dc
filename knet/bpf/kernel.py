"""Maps and programs in the kernel, by bpf(2).

Numbers and structures are those of linux/bpf.h.  What a kernel lacks is told by the error: EINVAL
for a command, a kind or a flag that it doesn't know, EPERM without CAP_BPF, or CAP_NET_ADMIN for
programs of the packet path.  Before Linux 5.11 maps count as locked memory (RLIMIT_MEMLOCK), which
`allow_memory` raises; there, too, EPERM is what it says when there is none left.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, Self

from knet.bpf.objectfile import MapSpec

HASH, ARRAY, PER_CPU_ARRAY, RING = 1, 2, 6, 27
"""BPF_MAP_TYPE_*."""
MMAPABLE = 1 << 10
"""BPF_F_MMAPABLE: an array that may be mapped into memory."""
ANY, NEW, THERE = 0, 1, 2
"""BPF_ANY, BPF_NOEXIST, BPF_EXIST: what an update asks for."""
SOCKET_FILTER, SCHED_CLS = 1, 3
"""BPF_PROG_TYPE_*: programs of sockets, and of rules (xt_bpf); programs of tc."""
LICENCE = b"Dual MIT/GPL\0"
"""Some helpers are only for programs that may be used under the GPL, too (gpl_only in the kernel).
"""
AT_ONCE = 4096
"""Elements of a batch."""

_NUMBERS = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "s390x": 351,
    "ppc64le": 361,
    "i686": 357,
    "armv7l": 386,
}
"""bpf(2), by machine."""
_CREATE, _LOOK_UP, _UPDATE, _DELETE, _LOAD, _PIN, _GET = 0, 1, 2, 3, 5, 6, 7
_RUN, _INFO = 10, 15
_LOOK_UP_BATCH, _UPDATE_BATCH, _DELETE_BATCH = 24, 26, 27
_ELEMENT, _FLAGS = struct.Struct("=ixxxxQQQ"), 24
_BATCH = struct.Struct("=QQQQIiQQ")
_COUNT = struct.Struct("=32xI")
"""Where a batch says how many elements it had."""
_MAPS = 52
"""Where `struct bpf_prog_info` has the number of maps, and where theirs go."""
_LOG = 1 << 20
"""Bytes of what the verifier says."""
_LOG_LINES = 12
_NAME = 15
"""Bytes of a name."""
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint


class BpfError(OSError):
    """The kernel refuses.  Of a program, the text ends with what its verifier said last."""


class TestRun(NamedTuple):
    """What a program made of a packet."""

    verdict: int
    packet: bytes
    context: bytes
    """`struct __sk_buff` as the program has left it."""


def is_known_machine() -> bool:
    """Whether bpf(2) can be called here."""
    return platform.machine() in _NUMBERS


def allow_memory() -> None:
    """Lets maps have as much memory as they ask for, where that is limited (before Linux 5.11)."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


def call(command: int, attributes: bytes) -> tuple[int, bytes]:
    """bpf(2): what it returns, and what it has made of the attributes.  Raises BpfError."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, f"no bpf(2) known for {platform.machine()}")
    buffer = bytearray(attributes)
    found = _syscall(number, command, _address(buffer), len(buffer))
    if found < 0:
        code = ctypes.get_errno()
        raise BpfError(code, os.strerror(code))
    return found, bytes(buffer)


class BpfMap:
    """One map; its descriptor is closed with it, and the map goes with the last of its users."""

    def __init__(self, descriptor: int, spec: MapSpec) -> None:
        self.descriptor = descriptor
        self.spec = spec
        self._key = bytearray(max(1, spec.key))
        self._value = bytearray(max(1, spec.value) * _per_element(spec))
        # The attributes once for all: a call is then two copies and one system call.
        self._element = bytearray(
            _ELEMENT.pack(descriptor, _address(self._key), _address(self._value), ANY)
        )
        self._gone = bytearray(_ELEMENT.pack(descriptor, _address(self._key), 0, 0))
        self._at = _address(self._element), _address(self._gone)
        self._number = _NUMBERS.get(platform.machine(), -1)

    @classmethod
    def make(cls, name: str, spec: MapSpec) -> Self:
        """A new and empty one.  Raises BpfError."""
        attributes = struct.pack("=IIIIIII16s", *spec, 0, 0, name.encode()[:_NAME])
        return cls(call(_CREATE, attributes)[0], spec)

    @classmethod
    def pinned(cls, path: str, spec: MapSpec) -> Self | None:
        """The one that is pinned there; None if there is none, or it is of another kind.

        Raises BpfError.
        """
        try:
            descriptor = _get(path)
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        found = spec_of(descriptor)
        if found != spec:
            os.close(descriptor)
            return None
        return cls(descriptor, spec)

    def close(self) -> None:
        """Lets go of it; what is asked of it then is refused (EBADF)."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            for attributes in (self._element, self._gone):  # the number may be another's next
                struct.pack_into("=i", attributes, 0, self.descriptor)

    def pin(self, path: str) -> None:
        """Keeps it there, in a BPF file system, when no process has it.  Raises BpfError."""
        pin(self.descriptor, path)

    def look_up(self, key: bytes) -> bytes | None:
        """The value of this key; of a per-CPU map, one after the other.  Raises BpfError."""
        self._key[:] = self._checked(key)
        struct.pack_into("=Q", self._element, _FLAGS, ANY)
        return bytes(self._value) if self._call(_LOOK_UP, self._at[0]) else None

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> bool:
        """Sets it; False if the flags forbid (NEW: there is one; THERE: there is none).

        Raises BpfError: E2BIG if the map is full.
        """
        self._key[:] = self._checked(key)
        assert len(value) <= len(self._value)
        self._value[: len(value)] = value
        struct.pack_into("=Q", self._element, _FLAGS, flags)
        return self._call(_UPDATE, self._at[0])

    def delete(self, key: bytes) -> bool:
        """Takes it out; whether it was there.  Raises BpfError."""
        self._key[:] = self._checked(key)
        return self._call(_DELETE, self._at[1])

    def _checked(self, key: bytes) -> bytes:
        """Buffers stay where they are only while their size stays."""
        assert len(key) == len(self._key)
        return key

    def _call(self, command: int, attributes: int) -> bool:
        if _syscall(self._number, command, attributes, _ELEMENT.size) >= 0:
            return True
        code = ctypes.get_errno()
        if code not in (errno.ENOENT, errno.EEXIST):
            raise BpfError(code, os.strerror(code))
        return False

    def update_all(self, keys: bytes, values: bytes) -> None:
        """Sets many, which stand one behind the other.  Raises BpfError: some of them are set."""
        self._batch(_UPDATE_BATCH, keys, values)

    def delete_all(self, keys: Iterable[bytes]) -> None:
        """Takes these out; none need be there.  Raises BpfError."""
        left = list(keys)
        while left:
            try:
                self._batch(_DELETE_BATCH, b"".join(left), b"")
                return
            except BpfError as error:
                if error.errno != errno.ENOENT:
                    raise
                # It ends at the first that isn't there, and says how far it came.
                del left[: self._done + 1]

    _done = 0

    def _batch(self, command: int, keys: bytes, values: bytes) -> None:
        if not keys:
            return
        held_keys, held_values = _held(keys), _held(values or b"\0")
        count = len(keys) // self.spec.key
        attributes = bytearray(
            _BATCH.pack(
                *(0, 0, _address(held_keys), _address(held_values) if values else 0),
                *(count, self.descriptor, 0, 0),
            )
        )
        if _syscall(self._number, command, _address(attributes), _BATCH.size) < 0:
            code = ctypes.get_errno()
            (self._done,) = _COUNT.unpack_from(attributes)
            raise BpfError(code, os.strerror(code))

    def items(self, at_once: int = AT_ONCE) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a hash, a batch of each at a time, one behind the other.

        What changes meanwhile is in it or not.  Raises BpfError.
        """
        token = bytearray(max(64, self.spec.key))
        first = True
        while True:
            keys = bytearray(self.spec.key * at_once)
            values = bytearray(self.spec.value * at_once)
            attributes = bytearray(
                _BATCH.pack(
                    *(0 if first else _address(token), _address(token)),
                    *(_address(keys), _address(values), at_once, self.descriptor, 0, 0),
                )
            )
            found = _syscall(self._number, _LOOK_UP_BATCH, _address(attributes), _BATCH.size)
            code = ctypes.get_errno() if found < 0 else 0
            if code == errno.ENOSPC:  # a bucket is larger than the batch
                at_once *= 2
                continue
            if code not in (0, errno.ENOENT):
                raise BpfError(code, os.strerror(code))
            (count,) = _COUNT.unpack_from(attributes)
            if count:
                yield bytes(keys[: count * self.spec.key]), bytes(values[: count * self.spec.value])
            if code:
                return
            first = False


class BpfProgram:
    """A program that the verifier has passed; it goes with its last user."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def load(cls, name: str, code: bytes, *, kind: int = SCHED_CLS) -> Self:
        """Raises BpfError, with the verifier's last words."""
        instructions, licence = _held(code), _held(LICENCE)

        def load(log: bytearray | None) -> int:
            return call(
                _LOAD,
                struct.pack(
                    "=IIQQIIQII16s",
                    *(kind, len(code) // 8, _address(instructions), _address(licence)),
                    *((1, len(log), _address(log)) if log is not None else (0, 0, 0)),
                    *(0, 0, name.encode()[:_NAME]),
                ),
            )[0]

        try:
            return cls(load(None))
        except BpfError as error:
            log = bytearray(_LOG)
            with suppress(BpfError):
                return cls(load(log))
            text = bytes(log).partition(b"\0")[0].decode(errors="replace")
            said = text.splitlines()[-_LOG_LINES:]
            raise BpfError(error.errno, "\n".join([error.strerror or "", *said])) from None

    def close(self) -> None:
        """Lets go of it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def pin(self, path: str) -> None:
        """As BpfMap.pin."""
        pin(self.descriptor, path)

    def run(self, packet: bytes, context: bytes = b"", repeat: int = 1) -> TestRun:
        """What it makes of this packet, link-layer header included.  Raises BpfError."""
        room = len(packet) + 256
        data, out = _held(packet), bytearray(room)
        before, after = _held(context), bytearray(max(256, len(context)))
        _, attributes = call(
            _RUN,
            struct.pack(
                "=iIIIQQIIIIQQII",
                *(self.descriptor, 0, len(packet), room, _address(data), _address(out), repeat, 0),
                *(len(context), len(after), _address(before) if context else 0, _address(after)),
                *(0, 0),
            ),
        )
        verdict, _, size = struct.unpack_from("=4xiII", attributes)
        (changed,) = struct.unpack_from("=44xI", attributes)
        return TestRun(verdict, bytes(out[:size]), bytes(after[:changed]))


def spec_of(descriptor: int) -> MapSpec:
    """What the map of this descriptor was made with.  Raises BpfError."""
    info = bytearray(80)
    call(_INFO, struct.pack("=iIQ", descriptor, len(info), _address(info)))
    kind, _, key, value, capacity, flags = struct.unpack_from("=6I", info)
    return MapSpec(kind, key, value, capacity, flags)


def program_number(descriptor: int) -> int:
    """The number by which the kernel knows a program: filters name it.  Raises BpfError."""
    info = bytearray(64)
    call(_INFO, struct.pack("=iIQ", descriptor, len(info), _address(info)))
    return int(struct.unpack_from("=4xI", info)[0])


def pin(descriptor: int, path: str) -> None:
    """Keeps a map or a program at this path of a BPF file system.  Raises BpfError."""
    name = _held(path.encode() + b"\0")
    call(_PIN, struct.pack("=QiI", _address(name), descriptor, 0))


def _get(path: str) -> int:
    name = _held(path.encode() + b"\0")
    return call(_GET, struct.pack("=QII", _address(name), 0, 0))[0]


def _held(data: bytes) -> bytearray:
    return bytearray(data or b"\0")


def _address(buffer: bytearray) -> int:
    """Where it is, while its size stays.  An array of ctypes' would be of a type of its own for
    each size, which only the collector takes away."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _per_element(spec: MapSpec) -> int:
    """How many values a look-up gives."""
    return possible_processors() if spec.kind == PER_CPU_ARRAY else 1


def possible_processors() -> int:
    """Processors that this machine may come to have: a per-CPU map has a value for each."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        return int(file.read().strip().rpartition("-")[2].rpartition(",")[2]) + 1


def maps_of(descriptor: int) -> list[int]:
    """The kernel's numbers of the maps that the program of this descriptor uses.

    Raises BpfError.
    """
    room = 64
    numbers, info = bytearray(4 * room), bytearray(80)
    struct.pack_into("=IQ", info, _MAPS, room, _address(numbers))
    call(_INFO, struct.pack("=iIQ", descriptor, len(info), _address(info)))
    (count,) = struct.unpack_from("=I", info, _MAPS)
    return list(struct.unpack_from(f"={count}I", numbers))
