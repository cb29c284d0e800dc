"""Verdict messages, read back by the layouts of the kernel (linux/netfilter/nfnetlink_queue.h)."""

import struct
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from krelay.datapath.verdicts import Verdicts

QUEUE = 1600
DROP, ACCEPT = 0, 1

numbers = st.integers(0, 2**32 - 1)
packets = st.binary(min_size=1, max_size=80) | st.sampled_from([bytes(1500), bytes(65531)])
verdicts = st.one_of(
    st.tuples(st.just("accept"), numbers),
    st.tuples(st.just("drop"), numbers),
    st.tuples(st.just("replace"), numbers, packets),
)


def read(message: bytes) -> Iterator[tuple[int, int, bytes | None]]:
    """Each verdict in a send: what, on which packet, with which new bytes."""
    while message:
        length, kind, flags, seq, port = struct.unpack_from("=IHHII", message)
        assert (kind, flags, seq, port) == (0x0301, 1, 0, 0)
        assert struct.unpack_from("!BBH", message, 16) == (0, 0, QUEUE)
        attributes = {}
        at = 20
        while at < length:
            size, name = struct.unpack_from("=HH", message, at)
            attributes[name] = message[at + 4 : at + size]
            at += size + -size % 4
        assert at == length
        verdict, number = struct.unpack("!II", attributes.pop(2))
        yield verdict, number, attributes.pop(10, None)
        assert not attributes
        message = message[length:]


def test_a_verdict_with_a_packet_is_laid_out_as_the_kernel_reads_it() -> None:
    given_ = Verdicts(QUEUE)
    given_.replace(7, b"hello")

    assert given_.take() == bytes.fromhex(
        "2c000000 0103 0100 00000000 00000000"  # length, type, request
        "00 00 0640"  # family, version, queue
        "0c00 0200 00000001 00000007"  # accept packet 7
        "0900 0a00 68656c6c6f 000000"  # its length without the padding
    )


@given(st.lists(verdicts))
def test_all_verdicts_are_read_back_in_order(given_: list[tuple[str, int, bytes]]) -> None:
    kept = Verdicts(QUEUE)
    for name, *words in given_:
        getattr(kept, name)(*words)
    size = kept.size
    message = kept.take()

    expected = [
        (DROP if name == "drop" else ACCEPT, words[0], words[1] if words[1:] else None)
        for name, *words in given_
    ]
    assert list(read(message)) == expected
    assert size <= len(message) <= size + 3 * len(given_)


def test_what_was_taken_is_not_given_again() -> None:
    kept = Verdicts(QUEUE)
    kept.drop(1)
    kept.take()

    assert kept.take() == b""
    assert kept.size == 0
