"""The relay's own ports: each at most one flow's, as much like the wanted one as there is."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from krelay.nat.ports import FIRST_HIGH, FreePorts, RelayPorts

A, B = b"\xc0\xa8\0\x02", b"\x0a\0\0\xfe"


def anything(_: int) -> bool:
    return True


@given(
    script=st.lists(
        st.integers(1, 40) | st.integers(1020, 1030) | st.integers(65530, 65535), max_size=80
    )
)
def test_what_is_free_agrees_with_a_plain_set(script: list[int]) -> None:
    """A port that is named again is given back."""
    free, taken = FreePorts(), set[int]()
    for port in script:
        if port in taken:
            free.give_back(port)
            taken.remove(port)
        else:
            assert free.take(port)
            assert not free.take(port)
            taken.add(port)
        assert len(free) == 65535 - len(taken)
        assert all((port in free) is (port not in taken) for port in script)


def test_all_high_ports_are_found_and_then_none() -> None:
    ports, rng = RelayPorts(Random(2)), Random(3)
    got: list[int] = []
    for _ in range(0x10000 - FIRST_HIGH):
        wanted = rng.randrange(FIRST_HIGH, 0x10000)
        port = ports.take(A, wanted, anything)
        assert port is not None
        got.append(port)

    assert sorted(got) == list(range(FIRST_HIGH, 0x10000))
    assert ports.take(A, 5000, anything) is None
    assert ports.take(A, 53, anything) == 53
    assert ports.take(B, 5000, anything) == 5000, "another address has its own"
    ports.give_back(A, 6000)
    assert ports.take(A, 5001, anything) == 6000


@given(wanted=st.integers(1, 65535), seed=st.integers(0, 9))
def test_another_port_has_the_range_and_the_parity_of_the_wanted_one(
    wanted: int, seed: int
) -> None:
    ports = RelayPorts(Random(seed))
    got = [ports.take(A, wanted, anything) for _ in range(30)]

    assert got[0] == wanted
    assert len(set(got)) == 30
    assert {(port >= FIRST_HIGH, port % 2) for port in got if port} == {
        (wanted >= FIRST_HIGH, wanted % 2)
    }


def test_below_1024_the_other_parity_is_next_and_then_the_higher_range() -> None:
    ports = RelayPorts(Random(1))
    got = [ports.take(A, 123, anything) or 0 for _ in range(1024)]

    assert [port % 2 for port in got[:512]] == [1] * 512
    assert sorted(got[:1023]) == list(range(1, FIRST_HIGH))
    assert got[1023] >= FIRST_HIGH
    assert got[1023] % 2 == 1


def test_a_port_that_does_not_fit_is_passed_over() -> None:
    ports = RelayPorts(Random(1))

    assert (ports.take(A, 4000, lambda port: port > 4000) or 0) > 4000
    assert ports.take(A, 4000, lambda port: False) is None
    assert len(ports) == 1


def test_a_port_of_zero_gets_a_real_one() -> None:
    port = RelayPorts(Random(1)).take(A, 0, anything)

    assert port
    assert (port < FIRST_HIGH, port % 2) == (True, 0)


def test_a_shared_port_is_free_when_all_have_given_it_back() -> None:
    ports = RelayPorts(Random(1))
    assert ports.take(A, 4000, anything) == 4000
    ports.share(A, 4000)
    ports.share(A, 4000)

    for _ in range(2):
        ports.give_back(A, 4000)
        assert ports.take(A, 4000, lambda port: port == 4000) is None
    ports.give_back(A, 4000)

    assert len(ports) == 0
    assert ports.take(A, 4000, anything) == 4000
