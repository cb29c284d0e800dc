"""Flags seen from the middle: a table of who sent what, and the state that follows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krelay.nat.tcpstate import State, TcpSegment, Through, Tracker
from krelay.steps import Side
from tests.tools.packets import FIN, SYN, flags_of, template

SIDES = {"C": Side.CLIENT, "S": Side.SERVER, "c": Side.TO_CLIENT, "s": Side.TO_SERVER}
OPEN = "C[S] C[.] S[S.] "

# Client C, server S, tcp-relay's own packets to them c and s, in the order in which they pass.
TABLE = [
    ("", State.OPENING),
    ("C[S]", State.OPENING),
    ("C[S] C[S] C[S]", State.OPENING),
    ("C[S] c[S.] C[.]", State.OPENING),
    ("C[S] c[S.] C[.] s[S]", State.OPENING),
    ("C[S] c[S.] C[.] s[S] S[S.]", State.ESTABLISHED),
    ("C[S] c[S.] s[S] S[S.]", State.OPENING),
    ("C[S] c[S.] s[S] S[S.] C[.]", State.ESTABLISHED),
    ("C[S] C[P.] S[S.]", State.ESTABLISHED),
    ("C[S] C[.] S[S]", State.ESTABLISHED),  # a simultaneous open
    (OPEN + "C[P.] S[P.] C[.] s[.]", State.ESTABLISHED),
    (OPEN + "C[F.] S[F.] C[F.]", State.ESTABLISHED),  # may be forged: tcp-relay's host judges them
    (OPEN + "C[R] S[R] C[R.]", State.ESTABLISHED),
    ("C[S] C[R] S[R]", State.OPENING),
    (OPEN + "C[F.] s[F.]", State.ESTABLISHED),  # half-closed, and may live for hours
    (OPEN + "C[F.] s[F.] S[P.] S[P.]", State.ESTABLISHED),
    (OPEN + "S[F.] c[F.] c[F.] C[.]", State.ESTABLISHED),
    (OPEN + "C[F.] s[F.] S[F.] c[F.]", State.CLOSING),
    (OPEN + "c[FP.] s[FP.]", State.CLOSING),
    (OPEN + "c[F.] s[F.] C[.] S[.]", State.CLOSING),
    (OPEN + "c[R]", State.CLOSING),
    (OPEN + "s[R.]", State.CLOSING),
    (OPEN + "c[R] s[P.] c[.] C[R]", State.CLOSING),  # none of these says that an end lives
    (OPEN + "c[R] C[P.] S[P.]", State.ESTABLISHED),  # it was an answer to something forged
    (OPEN + "c[F.] s[F.] c[R] S[.]", State.CLOSING),
    ("C[S] C[.] c[R]", State.CLOSING),
    ("C[S] C[F.] S[S.]", State.ESTABLISHED),
]

BOTH = "C[S] S[S.] C[.] "
# What goes through this host: the ends' own packets alone, by their numbers; those of forged ones
# are of another connection.
THROUGH = [
    ("C[S]", State.OPENING),
    ("C[S] C[.]", State.OPENING),
    ("C[S] S[S.!] C[.!]", State.OPENING),
    ("C[S] S[S.] C[.!]", State.OPENING),
    ("C[S] C[S!] C[S!] S[S.] C[.]", State.ESTABLISHED),
    ("C[S!] C[S] S[S.] C[P.]", State.ESTABLISHED),
    ("C[S] S[S] C[S.] S[.]", State.ESTABLISHED),  # a simultaneous open
    ("C[.] S[P.]", State.ESTABLISHED),  # picked up in its midst
    ("C[.] S[P.!]", State.OPENING),
    (BOTH, State.ESTABLISHED),
    (BOTH + "C[F.]", State.ESTABLISHED),  # half-closed, and may live for hours
    (BOTH + "C[F.] S[P.] S[P.]", State.ESTABLISHED),
    (BOTH + "S[F.] S[F.] C[.]", State.ESTABLISHED),
    (BOTH + "C[F.] S[F.]", State.CLOSING),
    (BOTH + "C[F.] S[F.] C[.]", State.CLOSING),
    (BOTH + "S[FP.] C[FP.] S[.]", State.CLOSING),
    (BOTH + "C[F.] S[F.] C[.] S[.]", State.CLOSING),
    (BOTH + "C[R]", State.CLOSING),
    (BOTH + "S[R.]", State.CLOSING),
    (BOTH + "C[R] C[P.] S[P.]", State.ESTABLISHED),  # so it was forged (RFC 6146, TRANS)
    (BOTH + "C[R] S[P.]", State.ESTABLISHED),
    (BOTH + "C[F.] S[F.] C[.] C[R] S[.]", State.CLOSING),
    (BOTH + "C[S!] S[.] C[.]", State.ESTABLISHED),
    ("C[S] S[S.] C[F.!] S[F.!] C[.]", State.ESTABLISHED),
    ("C[S] S[R.]", State.CLOSING),
    ("C[S] S[R.!]", State.OPENING),
    ("C[S] C[R]", State.CLOSING),
    ("C[S] C[R!]", State.OPENING),
    ("C[S] C[R] C[S]", State.OPENING),
]


def through(trace: str) -> Through:
    tracker = Through()
    for packet in trace.split():
        made = template(f"C:1 > S:1 {packet[1:]}")
        size = len(made.payload) + bool(made.flags & SYN) + bool(made.flags & FIN)
        tracker.segment(SIDES[packet[0]], TcpSegment(made.flags, made.seq, made.ack, size))
    return tracker


def after(trace: str) -> Tracker:
    tracker = Tracker()
    for packet in trace.split():
        tracker.saw(SIDES[packet[0]], flags_of(packet))
    return tracker


@pytest.mark.parametrize(("trace", "state"), TABLE)
def test_the_state_that_follows_from_the_flags(trace: str, state: State) -> None:
    assert after(trace).state is state


@pytest.mark.parametrize(("trace", "state"), THROUGH)
def test_the_state_of_what_goes_through_follows_from_both_ends(trace: str, state: State) -> None:
    assert through(trace).state is state


def test_closed_is_when_tcp_relay_says_so_whatever_was_seen() -> None:
    for trace, _ in TABLE:
        tracker = after(trace)
        tracker.closed = True

        assert tracker.state is State.CLOSED


def test_a_resumed_connection_is_established_from_its_first_packet() -> None:
    tracker = Tracker()
    tracker.resumed()

    assert tracker.state is State.ESTABLISHED


sides_and_flags = st.lists(st.tuples(st.sampled_from(Side), st.integers(0, 255)), max_size=12)
ORDER = [State.OPENING, State.ESTABLISHED, State.CLOSING]


@given(sides_and_flags)
def test_a_connection_never_goes_back_to_an_earlier_state_but_for_a_reset_that_was_none(
    packets: list[tuple[Side, int]],
) -> None:
    tracker = Tracker()
    before = 0
    for side, flags in packets:
        tracker.saw(side, flags)
        now = ORDER.index(replace(tracker, reset=False).state)
        assert now >= before
        assert tracker.state is (State.CLOSING if tracker.reset else ORDER[now])
        before = now


@given(sides_and_flags)
def test_what_is_seen_twice_changes_nothing_more(packets: list[tuple[Side, int]]) -> None:
    once, twice = Tracker(), Tracker()
    for side, flags in packets:
        once.saw(side, flags)
        twice.saw(side, flags)
        twice.saw(side, flags)

    assert once == twice
