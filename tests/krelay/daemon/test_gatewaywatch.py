"""Why clients of TCP can't be led to a tcp-relay, in words, and when that is told."""

from collections.abc import Iterable

import pytest

from knet.listeners import Holder
from knet.netlink.sockdiag import LISTEN, Socket
from krelay.daemon.gatewaywatch import SERVED, UNUSED, GatewayWatch
from krelay.registration.gatewayports import GatewayPorts
from tests.tools.logs import fields

PORT = 16000
REFUSED = "clients of TCP are refused"
NONE_LISTENS = f"no tcp-relay listens on port {PORT}"


class Host:
    """The sockets that listen on each port; a descriptor is the cookie of its socket."""

    def __init__(self) -> None:
        self.sockets: list[Socket] | None = []
        self.seen: Holder | None = Holder(77, "nginx")
        self.looks: list[list[int]] = []
        self.ports = GatewayPorts(lambda fd: fd, self._listeners, lambda descriptors: None)
        self.watch = GatewayWatch(self.ports, self._holder)

    def listens(self, cookie: int) -> None:
        assert self.sockets is not None
        self.sockets.append(Socket(cookie, 990, LISTEN, bytes(4), PORT, inode=1000 + cookie))

    def _listeners(self, port: int) -> list[Socket] | None:
        if self.sockets is None:
            return None
        return [each for each in self.sockets if each.port == port]

    def _holder(self, inodes: Iterable[int]) -> Holder | None:
        self.looks.append(list(inodes))
        return self.seen


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_port_with_a_tcp_relay_is_served(host: Host) -> None:
    host.listens(1)
    assert host.ports.listening("one", PORT, [1]) is None

    assert host.watch.state(PORT) == SERVED
    assert host.watch.taken_by(PORT) is None


def test_without_a_tcp_relay_the_port_is_named(host: Host) -> None:
    assert host.watch.state(PORT) == NONE_LISTENS
    assert host.watch.taken_by(PORT) is None


def test_a_kernel_that_does_not_tell_is_named_with_its_module(host: Host) -> None:
    host.sockets = None

    assert "modprobe tcp_diag" in host.watch.state(PORT)
    assert host.watch.taken_by(PORT) is None


def test_another_program_is_looked_for_once(host: Host) -> None:
    host.listens(1)

    state = host.watch.state(PORT)
    assert state == f"port {PORT} is in use by nginx (pid 77); end that, or set gport"
    assert host.watch.taken_by(PORT) == "nginx (pid 77)"
    assert host.looks == [[1001]]

    host.listens(2)
    host.watch.state(PORT)
    assert host.looks == [[1001], [1001, 1002]]


def test_a_program_that_can_not_be_seen_is_named_by_its_user(host: Host) -> None:
    host.seen = None
    host.listens(1)

    assert host.watch.taken_by(PORT) == "another program of user 990"


def test_only_what_lasts_is_warned_of(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    states = [NONE_LISTENS, SERVED, SERVED, NONE_LISTENS, UNUSED, UNUSED, NONE_LISTENS]
    for now, state in enumerate(states):
        host.watch.warn(state, now, silent=False)
    assert fields(caplog, REFUSED) == []

    host.watch.warn(NONE_LISTENS, 7, silent=False)
    assert fields(caplog, REFUSED) == [{"reason": NONE_LISTENS, "again": None}]


def test_another_cause_has_to_last_itself(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.watch.warn(NONE_LISTENS, 0, silent=False)
    host.watch.warn("port in use", 1, silent=False)
    assert fields(caplog, REFUSED) == []


def test_a_warning_is_repeated_seldom_and_counts(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    for now in range(12):
        host.watch.warn(NONE_LISTENS, now, silent=False)

    assert [each["again"] for each in fields(caplog, REFUSED)] == [None, 9]


def test_nothing_is_warned_of_while_silent(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    for now in range(3):
        host.watch.warn(NONE_LISTENS, now, silent=True)
    assert fields(caplog, REFUSED) == []

    host.watch.warn(NONE_LISTENS, 3, silent=False)  # it has lasted meanwhile
    assert len(fields(caplog, REFUSED)) == 1
