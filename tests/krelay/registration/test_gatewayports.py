"""At which ports clients are led to tcp-relay, whoever else listens there, in whatever order."""

from collections.abc import Iterator
from random import Random

import pytest

from knet.netlink.sockdiag import LISTEN, Socket
from krelay.registration.gatewayports import MOST, GatewayPorts
from tests.tools.packets import addr, policy
from tests.tools.script import play

ANY, ANY6 = bytes(4), bytes(16)
PORT, ONE, TWO = 16000, "one", "two"
OWN = frozenset({addr("K"), addr("G")})
MAPPED = bytes(10) + b"\xff\xff"


class Host:
    """The sockets that listen, and what krelay holds of them; descriptors are cookies + 100."""

    def __init__(self) -> None:
        self.sockets: list[Socket] = []
        self.told: list[tuple[frozenset[int], tuple[int, ...]]] = []
        """`served` at each change, and what had been closed by then."""
        self.closed: list[int] = []
        self.knows = True
        self.ports = GatewayPorts(self._cookie_of, self._listeners, self.closed.extend)
        self.ports.is_own = OWN.__contains__
        self.ports.on_change = self._changed

    def listen(self, cookie: int, address: bytes = ANY, port: int = PORT, v6: bool = False) -> int:
        self.sockets.append(Socket(cookie, 990, LISTEN, address, port, v6))
        return 100 + cookie

    def end(self, cookie: int) -> None:
        self.sockets = [each for each in self.sockets if each.cookie != cookie]

    def _changed(self) -> None:
        self.told.append((self.ports.served, tuple(self.closed)))

    def _cookie_of(self, descriptor: int) -> int | None:
        cookies = {each.cookie for each in self.sockets}
        return descriptor - 100 if descriptor - 100 in cookies else None

    def _listeners(self, port: int) -> list[Socket] | None:
        return [each for each in self.sockets if each.port == port] if self.knows else None


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    held = {each.descriptor for of in host.ports._held.values() for each in of.values()}
    assert not held & set(host.closed)
    for owner in list(host.ports._held):
        host.ports.lost(owner)
    assert held <= set(host.closed)


def test_clients_are_led_where_a_socket_was_handed_over_until_its_tcp_relay_is_lost(
    host: Host,
) -> None:
    host.listen(1)
    assert host.ports.served == frozenset()
    assert host.ports.listening(ONE, PORT, [101]) is None
    assert host.ports.served == {PORT}
    host.ports.lost(ONE)

    assert host.ports.served == frozenset()
    assert host.told == [(frozenset({PORT}), ()), (frozenset(), ())], "T1 ends before it is closed"
    assert host.closed == [101]


def test_a_socket_that_is_given_up_is_closed_after_t1_has_ended(host: Host) -> None:
    host.ports.listening(ONE, PORT, [host.listen(1)])
    host.ports.given_up(ONE, PORT)

    assert host.told[-1] == (frozenset(), ())
    assert host.closed == [101]
    host.ports.given_up(ONE, PORT)
    host.ports.given_up(TWO, PORT)
    assert host.closed == [101]


@pytest.mark.parametrize(
    ("address", "v6only", "harms"),
    [
        (ANY, False, True),
        (addr("K"), False, True),
        (addr("G"), False, True),
        (ANY6, False, True),
        (MAPPED + addr("K"), False, True),
        (MAPPED + ANY, False, True),
        (ANY6, True, False),
        (bytes(15) + b"\1", False, False),
        (bytes((127, 0, 0, 1)), False, False),
        (bytes((192, 0, 2, 9)), False, False),
    ],
)
@pytest.mark.parametrize("comes_first", [True, False])
def test_another_socket_that_could_get_clients_has_them_refused(
    host: Host, address: bytes, v6only: bool, harms: bool, comes_first: bool
) -> None:
    """All listeners count, not the one that the kernel would choose."""
    if comes_first:
        host.listen(7, address, v6=v6only)
    host.ports.listening(ONE, PORT, [host.listen(1)])
    if not comes_first:
        assert host.ports.served == {PORT}
        host.listen(7, address, v6=v6only)
        host.ports.check()

    assert host.ports.served == (frozenset() if harms else {PORT})
    assert [each.cookie for each in host.ports.others(PORT) or ()] == [7] * harms
    host.end(7)
    host.ports.check()
    assert host.ports.served == {PORT}, "it heals by itself"


def test_workers_that_share_a_port_are_all_known_and_one_may_go(host: Host) -> None:
    host.ports.listening(ONE, PORT, [host.listen(1)])
    host.listen(2)
    host.ports.check()
    assert host.ports.served == frozenset(), "the second has not said so yet"
    host.ports.listening(TWO, PORT, [102])
    assert host.ports.served == {PORT}
    host.ports.lost(ONE)

    assert host.ports.served == {PORT}, "its socket is about to be closed by krelay itself"
    assert host.closed == [101]
    host.end(1)
    host.ports.check()
    host.ports.check()
    assert host.ports.served == {PORT}


def test_a_socket_that_stays_open_after_its_tcp_relay_is_lost_is_anothers(host: Host) -> None:
    host.ports.listening(ONE, PORT, [host.listen(1)])
    host.ports.listening(TWO, PORT, [host.listen(2)])
    host.ports.lost(ONE)
    for _ in range(2):
        host.ports.check()

    assert host.ports.served == frozenset()


@pytest.mark.parametrize(
    ("descriptors", "wrong"),
    [
        ([], "one descriptor"),
        ([101, 102], "one descriptor"),
        ([109], "no TCP socket"),
        ([103], "doesn't listen on port 16000"),
        ([104], "doesn't listen on port 16000"),
        ([105], "doesn't listen on port 16000"),
    ],
)
def test_what_is_no_such_socket_is_closed_and_refused(
    host: Host, descriptors: list[int], wrong: str
) -> None:
    """Another port, one address alone, IPv6."""
    for cookie in (1, 2):
        host.listen(cookie)
    host.listen(3, port=17000)
    host.listen(4, addr("K"))
    host.listen(5, ANY6)

    assert wrong in (host.ports.listening(ONE, PORT, descriptors) or "")
    assert host.closed == descriptors
    assert (len(host.ports), host.ports.served) == (0, frozenset())


def test_where_the_kernel_does_not_tell_nobody_is_led_anywhere(host: Host) -> None:
    host.ports.listening(ONE, PORT, [host.listen(1)])
    host.knows = False
    host.ports.check()
    assert (host.ports.served, host.ports.others(PORT)) == (frozenset(), None)
    assert "tcp_diag" in (host.ports.listening(TWO, PORT, [host.listen(2)]) or "")
    host.end(2)
    host.knows = True
    host.ports.check()

    assert host.ports.served == {PORT}


def test_a_tcp_relay_that_hands_over_without_end_has_the_latest_held(host: Host) -> None:
    for number in range(1000):
        host.listen(number, port=20000 + number)
        assert host.ports.listening(ONE, 20000 + number, [100 + number]) is None

    assert len(host.ports) == MOST
    assert host.ports.served == set(range(21000 - MOST, 21000))
    assert len(host.closed) == 1000 - MOST


def test_a_second_socket_for_a_port_takes_the_place_of_the_first(host: Host) -> None:
    host.ports.listening(ONE, PORT, [host.listen(1)])
    host.end(1)
    host.ports.listening(ONE, PORT, [host.listen(2)])

    assert (host.closed, host.ports.served) == ([101], frozenset({PORT}))


@pytest.mark.parametrize("seed", range(20))
def test_after_any_history_clients_are_led_to_sockets_that_are_held_and_no_others(
    seed: int,
) -> None:
    rng, host, cookies = Random(seed), Host(), iter(range(1, 10_000))
    owners, ports = (ONE, TWO, "three"), (16000, 17000)
    for _ in range(300):
        owner, port = rng.choice(owners), rng.choice(ports)
        match rng.randrange(6):
            case 0 | 1:
                host.ports.listening(owner, port, [host.listen(next(cookies), port=port)])
            case 2:
                host.ports.given_up(owner, port)
            case 3:
                host.ports.lost(owner)
            case 4:
                host.listen(next(cookies), rng.choice((ANY, ANY6, addr("K"))), port)
            case 5 if host.sockets:
                host.end(rng.choice(host.sockets).cookie)
        for descriptor in host.closed:
            host.end(descriptor - 100)
        host.ports.check()
        host.ports.check()
        held = {h.cookie for of in host.ports._held.values() for h in of.values()}
        for each in ports:
            there = {s.cookie for s in host.sockets if s.port == each}
            assert (each in host.ports.served) <= (there <= held), (there, held)


# T1 follows


UNSERVED = policy(served=frozenset())


def test_without_a_known_listener_a_new_client_is_refused() -> None:
    play(
        """
    0     pre   C:40000 > K:80 [S]            => drop no_tcp_relay + K:80 > C:40000 [R.]
    0     pre   C:40000 > K:53                => C:40000 > S:53
    """,
        on=UNSERVED,
    )


def test_a_syn_sent_again_after_the_loss_is_not_led_to_who_listens_now() -> None:
    play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    1     set   served=
    1     pre   C:40000 > K:80 [S]            => drop no_tcp_relay + K:80 > C:40000 [R.]
    2     set   served=16000
    2     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    """
    )


def test_a_syn_on_the_flow_of_a_lost_tcp_relay_is_not_led_to_who_listens_now() -> None:
    play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    1     pre   C:40000 > K:80 [.]            => C:40000 > K:16000
    2     lost
    2     set   served=
    2     pre   C:40000 > K:80 [S]            => drop no_tcp_relay + K:80 > C:40000 [R.]
    """
    )


def test_a_connection_keeps_its_gateway_port_after_its_listener_has_gone() -> None:
    """Its own socket answers the SYN, as RFC 5961 has it."""
    play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    0     open  C:40000 @16000 from K:45678   => S:80 client
    1     set   gport=17000 served=17000
    2     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    2     pre   C:40001 > K:80 [S]            => C:40001 > K:17000
    """
    )


def test_a_client_whom_nobody_accepted_begins_anew_at_the_new_gateway_port() -> None:
    play(
        """
    0     pre   C:40000 > K:80 [S]            => C:40000 > K:16000
    1     set   gport=17000 served=17000
    1     pre   C:40000 > K:80 [S]            => C:40000 > K:17000
    """
    )


def test_for_a_moment_after_the_loss_clients_are_refused_in_silence() -> None:
    play(
        """
    0     set   served= waiting=1
    0.5   pre   C:40000 > K:80 [S]            => drop no_tcp_relay
    1     pre   C:40000 > K:80 [S]            => drop no_tcp_relay + K:80 > C:40000 [R.]
    2     set   recovering=3
    2     pre   C:40000 > K:80 [S]            => drop no_tcp_relay
    """
    )
