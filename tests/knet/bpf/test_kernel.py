"""Maps and programs in this machine's kernel.

A pin needs a BPF file system: one is mounted in a mount namespace that a thread has for itself.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from knet.bpf import kernel
from knet.bpf.kernel import (
    ARRAY,
    HASH,
    NEW,
    PER_CPU_ARRAY,
    RING,
    SCHED_CLS,
    SOCKET_FILTER,
    THERE,
    BpfError,
    BpfMap,
    BpfProgram,
)
from knet.bpf.objectfile import MapSpec
from tests.tools.instructions import EXIT, answer, instruction, looks_into

pytestmark = [pytest.mark.net, pytest.mark.usefixtures("bpf")]

NO_PREALLOC = 1
SIZES = MapSpec(HASH, 4, 8, 64, 0)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
FRAME = bytes(12) + b"\x08\0" + bytes(50)
InThread = Callable[..., Any]


def u32(number: int) -> bytes:
    return struct.pack("=I", number)


def u64(number: int) -> bytes:
    return struct.pack("=Q", number)


@pytest.fixture
def held() -> Iterator[BpfMap]:
    """A hash of 64 elements: keys of four bytes, values of eight."""
    with closing(BpfMap.make("held", SIZES)) as made:
        yield made


def filled(held: BpfMap, count: int) -> dict[bytes, bytes]:
    """Puts so many in, and returns them."""
    elements = {u32(at): u64(at * 3) for at in range(count)}
    held.update_all(b"".join(elements), b"".join(elements.values()))
    return elements


def items(held: BpfMap, at_once: int = kernel.AT_ONCE) -> dict[bytes, bytes]:
    """All that is in it; nothing is there twice."""
    key, value = held.spec.key, held.spec.value
    found: list[tuple[bytes, bytes]] = []
    for keys, values in held.items(at_once):
        assert len(keys) // key == len(values) // value
        for at in range(len(keys) // key):
            found.append((keys[at * key :][:key], values[at * value :][:value]))
    assert len(dict(found)) == len(found)
    return dict(found)


# Maps


@pytest.mark.parametrize(
    "spec",
    [
        MapSpec(HASH, 40, 80, 100, 0),
        MapSpec(HASH, 4, 8, 100, NO_PREALLOC),
        MapSpec(ARRAY, 4, 8, 16, 0),
        MapSpec(ARRAY, 4, 8, 16, kernel.MMAPABLE),
        MapSpec(PER_CPU_ARRAY, 4, 8, 16, 0),
        MapSpec(RING, 0, 0, 4096, 0),
    ],
)
def test_the_kernel_says_with_what_a_map_was_made(spec: MapSpec) -> None:
    with closing(BpfMap.make("a_name_of_more_than_fifteen_bytes", spec)) as made:
        assert kernel.spec_of(made.descriptor) == spec == made.spec


@pytest.mark.parametrize(
    "spec",
    [MapSpec(9999, 4, 4, 1, 0), MapSpec(HASH, 0, 4, 1, 0), MapSpec(RING, 0, 0, 1000, 0)],
    ids=["kind", "key", "size of a ring"],
)
def test_a_map_that_cannot_be_is_refused(spec: MapSpec) -> None:
    with pytest.raises(BpfError) as refused:
        BpfMap.make("refused", spec)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("flags", [0, NO_PREALLOC])
def test_elements_of_a_hash_are_put_in_read_and_taken_out(flags: int) -> None:
    with closing(BpfMap.make("held", SIZES._replace(flags=flags))) as held:
        assert held.look_up(u32(1)) is None
        assert not held.delete(u32(1))
        assert held.update(u32(1), u64(5))
        assert held.update(u32(1), u64(6))
        assert held.look_up(u32(1)) == u64(6)
        assert held.look_up(u32(2)) is None
        assert held.delete(u32(1))
        assert not held.delete(u32(1))
        assert items(held) == {}


def test_what_is_new_and_what_is_there_are_told_apart(held: BpfMap) -> None:
    assert not held.update(u32(1), u64(5), THERE)
    assert held.look_up(u32(1)) is None
    assert held.update(u32(1), u64(5), NEW)
    assert not held.update(u32(1), u64(6), NEW)
    assert held.look_up(u32(1)) == u64(5)
    assert held.update(u32(1), u64(7), THERE)
    assert held.look_up(u32(1)) == u64(7)
    assert held.update(u32(1), u64(8))  # flags of an earlier call don't stay


@pytest.mark.parametrize("flags", [0, NO_PREALLOC])
def test_a_full_map_takes_no_more_but_other_values(flags: int) -> None:
    with closing(BpfMap.make("full", MapSpec(HASH, 4, 8, 4, flags))) as held:
        filled(held, 4)
        with pytest.raises(BpfError) as refused:
            held.update(u32(4), u64(1))
        assert refused.value.errno == errno.E2BIG
        assert held.update(u32(3), u64(1), THERE)
        assert len(items(held)) == 4
        held.delete(u32(0))
        assert held.update(u32(4), u64(1))


def test_of_too_many_at_once_some_are_set() -> None:
    with closing(BpfMap.make("full", MapSpec(HASH, 4, 8, 4, 0))) as held:
        with pytest.raises(BpfError) as refused:
            filled(held, 9)
        assert refused.value.errno == errno.E2BIG
        assert len(items(held)) == 4


def test_an_array_has_all_its_elements_and_loses_none() -> None:
    with closing(BpfMap.make("array", MapSpec(ARRAY, 4, 8, 4, 0))) as held:
        assert held.look_up(u32(3)) == bytes(8)
        assert held.update(u32(3), u64(9))
        assert held.look_up(u32(3)) == u64(9)
        assert held.look_up(u32(4)) is None
        assert not held.update(u32(3), u64(1), NEW)
        with pytest.raises(BpfError) as refused:
            held.delete(u32(3))
        assert refused.value.errno == errno.EINVAL


def test_a_map_by_processor_has_a_value_for_each() -> None:
    processors = kernel.possible_processors()
    assert processors >= len(os.sched_getaffinity(0))
    with closing(BpfMap.make("each", MapSpec(PER_CPU_ARRAY, 4, 8, 2, 0))) as held:
        assert held.look_up(u32(1)) == bytes(8 * processors)
        values = b"".join(map(u64, range(1, processors + 1)))
        assert held.update(u32(1), values)
        assert held.look_up(u32(1)) == values
        assert held.look_up(u32(0)) == bytes(8 * processors)


def test_many_are_put_in_and_read_at_once() -> None:
    with closing(BpfMap.make("many", SIZES._replace(capacity=20_000))) as held:
        assert items(held) == {}
        elements = filled(held, 10_000)
        assert items(held) == elements
        assert items(held, 64) == elements
        held.update_all(b"", b"")
        held.update_all(u32(7) + u32(10_000), u64(1) + u64(2))
        assert items(held) == elements | {u32(7): u64(1), u32(10_000): u64(2)}


def test_more_in_one_place_than_are_read_at_once_are_read_all_the_same() -> None:
    # As many buckets as elements, rounded up: some have several.
    with closing(BpfMap.make("many", SIZES._replace(capacity=512))) as held:
        elements = filled(held, 512)
        assert items(held, 1) == elements


@pytest.mark.parametrize(
    "missing",
    [[], [0], [49], [0, 1, 2], [5, 6, 48, 49], list(range(0, 50, 2)), list(range(50))],
    ids=str,
)
def test_all_of_these_are_taken_out_whichever_are_missing(held: BpfMap, missing: list[int]) -> None:
    elements = filled(held, 60)
    for at in missing:
        held.delete(u32(at))

    held.delete_all(u32(at) for at in range(50))

    assert items(held) == {key: elements[key] for key in map(u32, range(50, 60))}
    held.delete_all([])


def test_what_goes_wrong_in_a_batch_is_told(held: BpfMap) -> None:
    held.close()
    with pytest.raises(BpfError) as refused:
        held.delete_all([u32(1)])
    assert refused.value.errno == errno.EBADF
    with pytest.raises(BpfError):
        list(held.items())
    held.close()


def test_a_map_that_was_closed_is_not_taken_for_the_next_one(held: BpfMap) -> None:
    number = held.descriptor
    held.close()
    with closing(BpfMap.make("next", SIZES)) as other:
        assert other.descriptor == number
        for asked in (held.look_up, held.delete, lambda key: held.update(key, u64(1))):
            with pytest.raises(BpfError) as refused:
                asked(u32(1))
            assert refused.value.errno == errno.EBADF
        assert items(other) == {}


# Where they are kept


@pytest.fixture
def in_bpffs(tmp_path: Path) -> Iterator[InThread]:
    """Calls this in a thread for which a BPF file system is mounted in `tmp_path`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mounted() -> str | None:
        if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
            return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
        if libc.mount(b"bpf", str(tmp_path).encode(), b"bpf", 0, None):
            return f"no BPF file system: {os.strerror(ctypes.get_errno())}"
        return None

    with ThreadPoolExecutor(1) as thread:
        if why := thread.submit(mounted).result():
            pytest.skip(why)

        def call(what: Callable[..., Any], *arguments: Any) -> Any:
            return thread.submit(what, *arguments).result()

        yield call
    assert os.listdir(tmp_path) == []


def test_a_pinned_map_is_found_again_with_what_is_in_it(
    held: BpfMap, in_bpffs: InThread, tmp_path: Path
) -> None:
    path = str(tmp_path / "held")
    assert in_bpffs(BpfMap.pinned, path, SIZES) is None
    in_bpffs(held.pin, path)
    held.update(u32(1), u64(5))
    held.close()

    with closing(in_bpffs(BpfMap.pinned, path, SIZES)) as again:
        assert again.look_up(u32(1)) == u64(5)
    for other in (SIZES._replace(capacity=65), SIZES._replace(value=16), SIZES._replace(flags=1)):
        before = len(os.listdir("/proc/self/fd"))
        assert in_bpffs(BpfMap.pinned, path, other) is None
        assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_pinned_in_anothers_place(
    held: BpfMap, in_bpffs: InThread, tmp_path: Path
) -> None:
    path = str(tmp_path / "held")
    in_bpffs(held.pin, path)
    with pytest.raises(BpfError) as refused:
        in_bpffs(held.pin, path)
    assert refused.value.errno == errno.EEXIST
    with closing(BpfProgram.load("passes", answer(0))) as program:
        with pytest.raises(BpfError):
            in_bpffs(program.pin, path)
        in_bpffs(program.pin, path + "-program")


def test_nothing_is_pinned_in_another_file_system(held: BpfMap, tmp_path: Path) -> None:
    with pytest.raises(BpfError) as refused:
        held.pin(str(tmp_path / "held"))
    assert refused.value.errno == errno.EPERM


# Programs


@pytest.mark.parametrize("kind", [SCHED_CLS, SOCKET_FILTER])
def test_a_program_is_loaded_and_answers(kind: int) -> None:
    with closing(BpfProgram.load("answers", answer(5), kind=kind)) as program:
        assert program.run(FRAME).verdict == 5
    program.close()
    with pytest.raises(BpfError):
        program.run(FRAME)


def test_a_program_may_answer_less_than_nothing() -> None:
    with closing(BpfProgram.load("unspec", answer(-1))) as program:
        assert program.run(FRAME).verdict == -1


def test_the_packet_and_its_context_come_back_as_the_program_left_them() -> None:
    mark = 8  # in struct __sk_buff
    code = instruction(0x61, 0, 1, offset=mark) + instruction(0x07, 0, value=1)
    code += instruction(0x63, 1, 0, offset=mark) + answer(0)
    before = bytearray(192)
    struct.pack_into("=I", before, mark, 41)

    with closing(BpfProgram.load("marks", code)) as program:
        done = program.run(FRAME, bytes(before))

    assert done.packet == FRAME
    assert struct.unpack_from("=I", done.context, mark) == (42,)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (EXIT, "R0 !read_ok"),
        (instruction(0x61, 0, 1, offset=4096) + EXIT, "invalid bpf_context access"),
        (instruction(0x61, 0, 0) + EXIT, "R0 "),
    ],
    ids=["no answer", "past the context", "no pointer"],
)
def test_the_verifiers_last_words_are_in_the_error(code: bytes, said: str) -> None:
    with pytest.raises(BpfError, match=said) as refused:
        BpfProgram.load("refused", code)
    assert refused.value.errno in (errno.EACCES, errno.EINVAL)
    first, *words = str(refused.value.strerror).splitlines()
    assert first == os.strerror(refused.value.errno or 0)
    assert 0 < len(words) <= 12


def test_a_refusal_before_the_verifier_is_told_without_words() -> None:
    with pytest.raises(BpfError) as refused:
        BpfProgram.load("refused", b"")
    assert str(refused.value.strerror).strip() == os.strerror(refused.value.errno or 0)


def test_programs_have_numbers_and_the_maps_that_they_use(held: BpfMap) -> None:
    with (
        closing(BpfProgram.load("looks", looks_into(held.descriptor))) as program,
        closing(BpfProgram.load("answers", answer(7))) as other,
    ):
        numbers = [kernel.program_number(each.descriptor) for each in (program, other)]
        assert len({*numbers, 0}) == 3
        assert len(kernel.maps_of(program.descriptor)) == 1
        assert kernel.maps_of(other.descriptor) == []
        assert program.run(FRAME).verdict == 7


def test_a_machine_whose_call_is_unknown_has_no_bpf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert not kernel.is_known_machine()
    with pytest.raises(BpfError, match="known for vax") as refused:
        BpfMap.make("none", SIZES)
    assert refused.value.errno == errno.ENOSYS
