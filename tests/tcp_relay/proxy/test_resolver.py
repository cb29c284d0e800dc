"""Looking names up: who is told what, and when; that nothing ever waits for it but who asked.

No look-up here leaves the process: a stand-in for getaddrinfo answers names, and only numeric hosts
reach the real one.
"""

import argparse
import gc
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from knet.loop import Loop
from tcp_relay.proxy import resolver as module
from tcp_relay.proxy.resolver import (
    FRESH,
    PATIENCE,
    Address,
    Answer,
    Resolver,
    host_name,
    service_port,
)
from tests.tcp_relay.helpers import BOUND, run_until, wait_for

REAL = socket.getaddrinfo
UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")

Infos = list[tuple[Any, ...]]


def v4(host: str, port: int = 80) -> Address:
    return Address(socket.AF_INET, (host, port))


def v6(host: str, port: int = 80, scope: int = 0) -> Address:
    return Address(socket.AF_INET6, (host, port, 0, scope))


class Names:
    """What the system knows.  `gate` shut: look-ups hang until it is opened."""

    def __init__(self) -> None:
        self.answer: list[Address] | Exception = [v4("192.0.2.1")]
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[tuple[str, int]] = []
        self.threads: list[threading.Thread] = []

    def getaddrinfo(
        self, host: str, port: int, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Infos:
        if flags & socket.AI_NUMERICHOST:
            return [*REAL(host, port, family, type, proto, flags)]
        assert type == socket.SOCK_STREAM
        answer = self.answer
        self.asked.append((host, port))
        self.threads.append(threading.current_thread())
        assert self.gate.wait(BOUND)
        if isinstance(answer, Exception):
            raise answer
        return [(family, type, 6, "", sockaddr) for family, sockaddr in answer]


class Rig:
    """A loop, a resolver for `host`, and what it has answered."""

    def __init__(self, names: Names) -> None:
        self.loop = Loop()
        self.names = names
        self.resolver = Resolver(self.loop, "server.test", 80)
        self.answers: list[Answer] = []

    def ask(self) -> None:
        self.resolver.ask(self.answers.append)

    def answer(self) -> Answer:
        """Asks and waits; the answer."""
        answers: list[Answer] = []

        def done(answer: Answer) -> None:
            answers.append(answer)
            self.loop.stop()

        self.resolver.ask(done)
        if not answers:
            guard = self.loop.call_at(self.loop.clock() + BOUND, self.loop.stop)
            self.loop.run()
            guard.cancel()
        [answer] = answers
        return answer

    def go_on(self, seconds: float) -> None:
        """Runs the loop for so long."""
        self.loop.call_at(self.loop.clock() + seconds, self.loop.stop)
        self.loop.run()

    def pass_time(self, seconds: float) -> None:
        """As if the loop had slept; it looks at the clock again when it next waits."""
        self.loop.now += seconds

    def close(self) -> None:
        self.names.gate.set()
        self.resolver.close()
        self.loop.close()
        for thread in self.names.threads:
            thread.join(BOUND)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    return names


@pytest.fixture
def rig(names: Names) -> Iterator[Rig]:
    rig = Rig(names)
    yield rig
    rig.close()


@pytest.fixture
def nothing_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks has the name looked up."""
    monkeypatch.setattr(module, "FRESH", 0.0)


@pytest.fixture
def warnings() -> Iterator[list[dict[str, object]]]:
    """The fields of the warnings."""
    lines: list[dict[str, object]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.levelno == logging.WARNING
            if record.getMessage() == "no look-up now":
                return
            assert record.getMessage() == "the addresses from before are used"
            lines.append(vars(record)["fields"])

    logger, handler = logging.getLogger("krelay.resolver"), Handler()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_an_answer_comes_in_a_later_turn_and_wakes_the_loop(rig: Rig) -> None:
    rig.ask()
    assert rig.answers == []
    assert rig.answer() == [v4("192.0.2.1")]  # there is no other timer than one that ends the wait
    assert rig.answers == [[v4("192.0.2.1")]]
    assert rig.names.asked == [("server.test", 80)]


def test_the_loop_goes_on_while_a_look_up_hangs(rig: Rig) -> None:
    rig.names.gate.clear()
    rig.ask()
    turns: list[int] = []

    def turn() -> None:
        turns.append(1)
        rig.loop.call_soon(turn)

    turn()
    run_until(rig.loop, lambda: len(turns) > 100)
    assert rig.answers == []
    rig.names.gate.set()
    run_until(rig.loop, lambda: bool(rig.answers))


def test_one_look_up_serves_all_who_ask_meanwhile(rig: Rig) -> None:
    rig.names.gate.clear()
    for _ in range(5):
        rig.ask()
    assert rig.answers == []
    rig.names.gate.set()
    run_until(rig.loop, lambda: len(rig.answers) == 5)
    assert rig.answers == [[v4("192.0.2.1")]] * 5
    assert len(rig.names.asked) == 1


def test_a_fresh_result_is_given_at_once(rig: Rig) -> None:
    rig.answer()
    rig.names.answer = [v4("192.0.2.2")]
    rig.pass_time(FRESH * 0.99)
    rig.ask()
    assert rig.answers == [[v4("192.0.2.1")]]
    assert len(rig.names.asked) == 1


def test_later_the_name_is_looked_up_again(rig: Rig) -> None:
    rig.answer()
    rig.names.answer = [v4("192.0.2.2")]
    rig.pass_time(FRESH)
    assert rig.answer() == [v4("192.0.2.2")]
    assert len(rig.names.asked) == 2


def test_without_a_question_there_is_no_look_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH", 0.01)
    assert rig.names.asked == []
    rig.answer()
    rig.go_on(0.05)
    assert len(rig.names.asked) == 1


def test_who_asks_from_within_the_answer_gets_it_too(rig: Rig) -> None:
    rig.resolver.ask(lambda _: rig.ask())
    run_until(rig.loop, lambda: bool(rig.answers))
    assert rig.answers == [[v4("192.0.2.1")]]
    assert len(rig.names.asked) == 1


def test_addresses_keep_the_systems_order_and_come_once_each(rig: Rig) -> None:
    rig.names.answer = [
        v6("2001:db8::2"),
        v4("192.0.2.9"),
        v6("2001:db8::2"),
        v4("192.0.2.1"),
        v4("192.0.2.9"),
        v6("fe80::1", scope=3),
        v6("fe80::1", scope=4),
    ]
    assert rig.answer() == [
        v6("2001:db8::2"),
        v4("192.0.2.9"),
        v4("192.0.2.1"),
        v6("fe80::1", scope=3),
        v6("fe80::1", scope=4),
    ]


def test_only_families_that_can_be_connected_are_given(rig: Rig) -> None:
    rig.names.answer = [Address(socket.AF_UNIX, ("x", 0)), v4("192.0.2.1")]
    assert rig.answer() == [v4("192.0.2.1")]
    rig.names.answer = [Address(socket.AF_UNIX, ("x", 0))]
    other = Rig(rig.names)
    assert str(other.answer()) == "server.test: no address"
    other.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UNKNOWN, "server.test: Name or service not known"),
        (UnicodeError("label too long"), "server.test: not a host name"),
        (OSError("odd"), "server.test: odd"),
        (MemoryError("a fault of the system library"), "server.test: the look-up failed"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_any_address_the_error_is_a_sentence(
    rig: Rig, error: Exception, words: str
) -> None:
    rig.names.answer = error
    answer = rig.answer()
    assert isinstance(answer, OSError)
    assert str(answer) == words


def test_an_error_is_fresh_for_a_while_as_well(rig: Rig) -> None:
    rig.names.answer = UNKNOWN
    rig.answer()
    rig.names.answer = [v4("192.0.2.1")]
    rig.ask()
    assert [str(answer) for answer in rig.answers] == ["server.test: Name or service not known"]
    rig.pass_time(FRESH)
    assert rig.answer() == [v4("192.0.2.1")]


@pytest.mark.usefixtures("nothing_is_fresh")
def test_if_a_look_up_fails_the_addresses_from_before_are_used(
    rig: Rig, warnings: list[dict[str, object]]
) -> None:
    rig.answer()
    rig.names.answer = UNKNOWN
    for _ in range(3):
        assert rig.answer() == [v4("192.0.2.1")]
    assert len(rig.names.asked) == 4
    assert warnings == [
        {"host": "server.test", "error": "Name or service not known", "suppressed": None}
    ]
    rig.names.answer = [v4("192.0.2.7")]
    assert rig.answer() == [v4("192.0.2.7")]


@pytest.mark.usefixtures("nothing_is_fresh")
def test_a_slow_look_up_is_waited_for_only_so_long_if_there_are_addresses(
    rig: Rig, warnings: list[dict[str, object]]
) -> None:
    rig.answer()
    rig.names.gate.clear()
    rig.names.answer = [v4("192.0.2.2")]
    began = rig.loop.now
    rig.ask()
    assert rig.answers == []
    assert rig.answer() == [v4("192.0.2.1")]
    assert rig.answers == [[v4("192.0.2.1")]]
    assert rig.loop.now >= began + PATIENCE
    rig.ask()  # now nobody has to wait, however long it takes
    assert rig.answers == [[v4("192.0.2.1")]] * 2
    assert len(rig.names.asked) == 2
    assert [fields["error"] for fields in warnings] == ["no answer within 1 s"]


@pytest.mark.usefixtures("nothing_is_fresh")
def test_what_a_slow_look_up_finds_in_the_end_counts(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.answer()
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    rig.names.gate.clear()
    rig.names.answer = [v4("192.0.2.2")]
    assert rig.answer() == [v4("192.0.2.1")]
    rig.names.answer = UNKNOWN  # for another look-up, which isn't to be
    monkeypatch.setattr(module, "FRESH", 60.0)
    rig.names.gate.set()

    def is_new() -> bool:
        rig.ask()
        return rig.answers[-1] == [v4("192.0.2.2")]

    run_until(rig.loop, is_new)
    assert len(rig.names.asked) == 2


@pytest.mark.usefixtures("nothing_is_fresh")
def test_the_patience_with_one_look_up_ends_with_it(
    rig: Rig, warnings: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.answer()
    rig.answer()  # within PATIENCE
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    rig.names.gate.clear()
    rig.ask()
    rig.go_on(PATIENCE + 0.1)
    assert rig.answers == []
    assert warnings == []


def test_without_any_address_a_slow_look_up_is_waited_for_to_its_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    rig.names.gate.clear()
    rig.ask()
    rig.go_on(0.05)
    rig.ask()
    assert rig.answers == []
    rig.names.gate.set()
    assert rig.answer() == [v4("192.0.2.1")]
    assert rig.answers == [[v4("192.0.2.1")]] * 2


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.1", v4("192.0.2.1")),
        ("127.1", v4("127.0.0.1")),
        ("::1", v6("::1")),
        ("[::1]", v6("::1")),
        ("2001:DB8:0::1", v6("2001:db8::1")),
        ("fe80::1%lo", v6("fe80::1", scope=socket.if_nametoindex("lo"))),
        ("[fe80::1%lo]", v6("fe80::1", scope=socket.if_nametoindex("lo"))),
    ],
)
def test_a_numeric_host_is_answered_at_once_without_a_thread(
    rig: Rig, host: str, address: Address
) -> None:
    resolver = Resolver(rig.loop, host, 80)
    for _ in range(2):
        resolver.ask(rig.answers.append)
        rig.pass_time(FRESH)
    assert rig.answers == [[address]] * 2
    assert rig.names.asked == []
    resolver.close()


def test_the_number_of_an_interface_is_looked_at_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes = iter([3, 3, 7])

    def getaddrinfo(host: str, port: int, **_: object) -> Infos:
        return [(socket.AF_INET6, 0, 0, "", ("fe80::1", port, 0, next(indexes)))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = Resolver(rig.loop, "fe80::1%eth0", 80)
    for _ in range(3):
        resolver.ask(rig.answers.append)
        rig.pass_time(FRESH)
    assert rig.answers == [[v6("fe80::1", scope=scope)] for scope in (3, 3, 7)]


@pytest.mark.usefixtures("nothing_is_fresh")
def test_after_close_nobody_is_called_and_nothing_stays(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    rig.answer()
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    rig.names.gate.clear()
    rig.ask()
    wait_for(lambda: len(rig.names.threads) == 2, "the look-up")
    assert len(os.listdir("/proc/self/fd")) == before + 2
    rig.resolver.close()
    rig.resolver.close()
    rig.names.gate.set()
    rig.names.threads[-1].join(BOUND)
    assert len(os.listdir("/proc/self/fd")) == before
    rig.go_on(0.05)
    assert rig.answers == []


def test_a_look_up_that_outlives_its_resolver_touches_nobody_elses_descriptor(rig: Rig) -> None:
    rig.names.gate.clear()
    rig.ask()
    wait_for(lambda: rig.names.threads, "the look-up")
    rig.resolver.close()
    pipes = [os.pipe() for _ in range(4)]  # under the numbers that have become free
    rig.names.gate.set()
    rig.names.threads[0].join(BOUND)
    for reader, writer in pipes:
        os.write(writer, b"x")
        assert os.read(reader, 10) == b"x"
        os.close(reader)
        os.close(writer)


def test_the_end_of_the_process_does_not_wait_for_a_look_up(rig: Rig) -> None:
    rig.names.gate.clear()
    rig.ask()
    wait_for(lambda: rig.names.threads, "the look-up")
    assert rig.names.threads[0].daemon


def no_descriptor(_: int) -> tuple[int, int]:
    raise OSError(24, "Too many open files")


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.usefixtures("nothing_is_fresh")
@pytest.mark.parametrize(
    ("place", "name", "failing"),
    [(os, "pipe2", no_descriptor), (threading.Thread, "start", no_thread)],
)
def test_a_look_up_that_cannot_be_made_now_is_made_later(
    rig: Rig,
    warnings: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    failing: Callable[..., object],
) -> None:
    """Who asks waits for it, unless there are addresses from before."""
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        rig.ask()
        rig.go_on(2.5 * module.AGAIN)
        assert rig.answers == []
    rig.go_on(3 * module.AGAIN)
    assert rig.answers == [[v4("192.0.2.1")]]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        rig.ask()
        assert rig.answers[1:] == [[v4("192.0.2.1")]]
    rig.go_on(2.5 * module.AGAIN)
    assert warnings == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("nothing_is_fresh")
def test_a_look_up_for_which_the_host_had_no_memory_is_made_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[OSError] = [
        socket.gaierror(socket.EAI_MEMORY, "Memory allocation failure"),
        OSError(23, "Too many open files in system"),
    ]
    find = socket.getaddrinfo

    def sometimes(*args: object, **kwargs: object) -> object:
        if errors and not kwargs.get("flags"):
            raise errors.pop()
        return find(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", sometimes)
    rig.ask()
    rig.go_on(3 * module.AGAIN)

    assert errors == []
    assert rig.answers == [[v4("192.0.2.1")]]


@pytest.mark.usefixtures("nothing_is_fresh")
def test_look_ups_leave_nothing_for_the_cyclic_collector(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", BOUND)  # on a busy machine a thread may take its time
    rig.answer()
    gc.collect()
    gc.disable()
    try:
        for number in range(20):
            rig.names.answer = [v4("192.0.2.1")] if number % 2 else UNKNOWN
            rig.resolver.ask(lambda _: rig.loop.stop())
            rig.loop.run()
        for thread in rig.names.threads:
            thread.join(BOUND)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "text", ["localhost", "server.test.", "bücher.test", "192.0.2.1", "::1", "[::1]", "fe80::1%lo"]
)
def test_a_host_is_taken_as_it_is_written(text: str) -> None:
    assert host_name(text) == text


@pytest.mark.parametrize("text", ["", " ", "a b", "a\0", "a\n", "[]", "[name]", "a..b", "a" * 64])
def test_what_cannot_be_a_host_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a host name or address"):
        host_name(text)


def test_a_port_is_a_number_or_the_name_of_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    services = {("http", "tcp"): 80}
    monkeypatch.setattr(socket, "getservbyname", lambda *service: services[service])
    assert [service_port(text) for text in ("1", "0080", "65535", "http")] == [1, 80, 65535, 80]


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "-1", "+80", " 80", "8_0", "٣", "80.0", "no-such", "\0", "1" * 5000]
)
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a port from 1 to 65535"):
        service_port(text)
