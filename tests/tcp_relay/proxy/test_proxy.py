"""On the way to the destination: which address is tried, and what happens if none answers."""

import errno
import gc
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from knet.loop import Loop
from krelay_vm import Lab
from tcp_relay.engine import portqueue
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import accept, set_options
from tcp_relay.proxy.proxy import Attempt, Proxy
from tcp_relay.proxy.resolver import Address, Answer, Resolver
from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    Server,
    TcpProxy,
    echo,
    exactly,
    free_port,
    full_server,
    reset,
    run_until,
    turns,
    was_reset,
)

LIMITS = SessionLimits(connect=60.0)


class Names:
    """Answers at once, or, while `answer` is None, when told to."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.asking: list[Callable[[Answer], None]] = []

    def ask(self, done: Callable[[Answer], None]) -> None:
        if self.answer is None:
            self.asking.append(done)
        else:
            done(self.answer)

    def tell(self, answer: Answer) -> None:
        asking, self.asking = self.asking, []
        for done in asking:
            done(answer)


class Rig:
    """Clients of a proxy, and the lines that it logs as they end."""

    def __init__(self, loop: Loop, stack: ExitStack, limits: SessionLimits = LIMITS) -> None:
        self.loop = loop
        self.stack = stack
        self.names = Names()
        self.engine = Engine(loop, limits)
        self.proxy = Proxy(self.engine, cast(Resolver, self.names))
        self.ends: list[dict[str, Any]] = []
        logger, handler = logging.getLogger("krelay.connection"), logging.Handler()
        handler.emit = self._note  # type: ignore[method-assign]
        before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        stack.callback(logger.setLevel, before)
        stack.callback(self.engine.end_all, End.KILLED, "the test is over")

    def _note(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
        if "reason" in fields:
            self.ends.append(fields)

    def dial(self, host: str = LOCALHOST) -> socket.socket:
        """A client, accepted."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listening:
            set_options(listening)
            client = socket.create_connection(listening.getsockname()[:2], timeout=BOUND)
            self.stack.enter_context(client)
            ours, peer = accept(listening, family)
        self.proxy.accepted(ours, self.proxy.spare(), peer)
        return client

    def serve(self, host: str = LOCALHOST) -> socket.socket:
        """A server that listens."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = self.stack.enter_context(socket.create_server((host, 0), family=family))
        server.settimeout(BOUND)
        return server

    def run_until_ended(self, times: int = 1) -> dict[str, Any]:
        run_until(self.loop, lambda: len(self.ends) >= times)
        return self.ends[-1]

    def run_until_open(self, times: int = 1) -> None:
        run_until(self.loop, lambda: self.engine.counts.opened == times)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Loop() as loop, ExitStack() as stack:
        yield Rig(loop, stack)


def at(server: socket.socket) -> Address:
    return Address(server.family, server.getsockname())


def nobody() -> Address:
    return Address(socket.AF_INET, (LOCALHOST, free_port()))


def carries(client: socket.socket, server: socket.socket, loop: Loop) -> bool:
    """Both ways; `server` listens."""
    peer, _ = server.accept()
    with peer:
        peer.settimeout(BOUND)
        client.sendall(b"question")
        turns(loop, 3)
        there = exactly(peer, 8)
        peer.sendall(b"answer")
        turns(loop, 3)
        return (there, exactly(client, 6)) == (b"question", b"answer")


def test_addresses_are_tried_in_turn_until_one_accepts(rig: Rig) -> None:
    server, last = rig.serve(), rig.serve()
    rig.names.answer = [nobody(), nobody(), at(server), at(last)]
    client = rig.dial()
    rig.run_until_open()
    assert carries(client, server, rig.loop)
    last.setblocking(False)
    with pytest.raises(BlockingIOError):
        last.accept()


def test_an_address_that_doesnt_answer_is_not_the_last_that_is_tried() -> None:
    """A destination with a dead address and a live one (IPv6 that is lost on the way, say)."""
    with Loop() as loop, ExitStack() as stack, full_server() as silent:
        rig = Rig(loop, stack, SessionLimits(connect=0.3))
        server = rig.serve()
        rig.names.answer = [Address(socket.AF_INET, silent), at(server)]
        client = rig.dial()
        run_until(loop, lambda: bool(rig.engine.counts.opened or rig.ends))
        assert rig.ends == []
        assert carries(client, server, loop)


def test_if_no_address_accepts_the_client_is_reset_and_the_last_error_logged(rig: Rig) -> None:
    addresses = [nobody(), nobody()]
    rig.names.answer = list(addresses)
    client = rig.dial()
    end = rig.run_until_ended()
    assert was_reset(client)
    last = addresses[-1].sockaddr
    assert end["reason"] == End.CONNECT_FAILED
    assert end["detail"] == f"{LOCALHOST}:{last[1]}: connection refused"
    assert end["server"] == f"{LOCALHOST}:{last[1]}"
    assert rig.names.answer == addresses  # the answer is everybody's


def test_an_unknown_name_resets_the_client_and_is_logged(rig: Rig) -> None:
    rig.names.answer = OSError("server.test: Name or service not known")
    client = rig.dial()
    end = rig.run_until_ended()
    assert was_reset(client)
    assert (end["reason"], end["detail"]) == (
        End.CONNECT_FAILED,
        "server.test: Name or service not known",
    )


def test_a_name_that_is_found_later_serves_who_waited(rig: Rig) -> None:
    server = rig.serve()
    client = rig.dial()
    client.sendall(b"early")
    turns(rig.loop, 2)
    rig.names.tell([at(server)])
    rig.run_until_open()
    peer, _ = server.accept()
    with peer:
        turns(rig.loop, 2)
        assert exactly(peer, 5) == b"early"


def test_a_name_that_is_not_found_in_time_resets_the_client() -> None:
    with Loop() as loop, ExitStack() as stack:
        rig = Rig(loop, stack, SessionLimits(connect=0.1))
        client = rig.dial()
        assert rig.run_until_ended()["detail"] == "no answer to the name within 0.1 s"
        assert was_reset(client)
        rig.names.tell([nobody()])  # too late, no harm


def test_a_client_that_goes_while_the_name_is_looked_up_is_forgotten(rig: Rig) -> None:
    server = rig.serve()
    reset(rig.dial())
    assert rig.run_until_ended()["reason"] == End.RESET
    rig.names.tell([at(server)])
    turns(rig.loop, 2)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


@pytest.mark.parametrize("client_host", [LOCALHOST, "::1"])
@pytest.mark.parametrize("server_host", [LOCALHOST, "::1"])
def test_each_family_is_relayed_to_each(rig: Rig, client_host: str, server_host: str) -> None:
    server = rig.serve(server_host)
    rig.names.answer = [at(server)]
    for _ in range(2):  # the second has a spare of the right family
        client = rig.dial(client_host)
        assert carries(client, server, rig.loop)
    rig.engine.end_all(End.KILLED, "")
    for name, host in (("client", client_host), ("server", server_host)):
        shown = f"[{host}]:" if ":" in host else f"{host}:"
        assert all(str(end[name]).startswith(shown) for end in rig.ends)


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many local ports are taken: so many connects fail."""
    left = {"taken": 0}
    real = Legs.connect

    def connect(self: Legs, address: tuple[Any, ...]) -> None:
        if left["taken"]:
            left["taken"] -= 1
            self._owner.connect_failed(errno.EADDRNOTAVAIL)
        else:
            real(self, address)

    monkeypatch.setattr(Legs, "connect", connect)
    monkeypatch.setattr(portqueue, "RETRY", 0.01)
    return left


def test_a_client_without_a_local_port_waits_and_is_served_later(
    rig: Rig, ports: dict[str, int]
) -> None:
    server = rig.serve()
    rig.names.answer = [at(server)]
    ports["taken"] = 5
    clients = [rig.dial() for _ in range(3)]
    assert len(rig.proxy.port_queue) == 3
    rig.run_until_open(3)
    for client in clients:  # in the order they came
        assert carries(client, server, rig.loop)


def test_who_waited_for_the_name_may_wait_for_a_port_too(ports: dict[str, int]) -> None:
    with Loop() as loop, ExitStack() as stack:
        rig = Rig(loop, stack, SessionLimits(connect=0.1))
        ports["taken"] = 10_000
        rig.dial()
        rig.names.tell([nobody()])
        assert rig.run_until_ended()["detail"] == "no local port was free for 0.1 s"


def test_a_client_that_goes_while_it_waits_for_a_port_is_passed_over(
    rig: Rig, ports: dict[str, int]
) -> None:
    server = rig.serve()
    rig.names.answer = [at(server)]
    ports["taken"] = 10_000
    gone, client = rig.dial(), rig.dial()
    reset(gone)
    rig.run_until_ended()
    ports["taken"] = 0
    rig.run_until_open()
    assert carries(client, server, rig.loop)
    assert [end["reason"] for end in rig.ends] == [End.RESET]


def test_an_address_that_cant_be_reached_from_here_is_not_waited_for(
    rig: Rig, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcp_relay.proxy.proxy._is_routed", lambda address: False)
    server = rig.serve()
    ports["taken"] = 1
    rig.names.answer = [nobody(), at(server)]
    client = rig.dial()
    assert not rig.proxy.port_queue
    rig.run_until_open()
    assert carries(client, server, rig.loop)


@pytest.mark.net
def test_a_host_without_free_ports_refuses_nobody(tmp_path: Path) -> None:
    """Two ports for three connections."""
    with Lab() as lab, lab.enter("relay"), Server(echo) as server:
        host, port = server.endpoint.host, server.endpoint.port
        with TcpProxy(tmp_path, host, port, "--listen", LOCALHOST) as proxy:
            proxy.ready()
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001\n")
            clients = []
            for number in range(3):
                client = socket.create_connection(
                    (LOCALHOST, proxy.port), BOUND, (LOCALHOST, 20000 + number)
                )
                client.sendall(b"%d" % number)
                clients.append(client)
            assert [exactly(client, 1) for client in clients[:2]] == [b"0", b"1"]
            proxy.wait_for_log("no local port is free")
            reset(clients[0])
            assert exactly(clients[2], 1) == b"2"
            for client in clients[1:]:
                client.close()


def test_nothing_of_an_ended_attempt_waits_for_the_collector(ports: dict[str, int]) -> None:
    def attempts() -> int:
        return sum(isinstance(thing, (Attempt, Legs)) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        with Loop() as loop, ExitStack() as stack:
            before = attempts()
            rig = Rig(loop, stack)
            server = rig.serve()
            rig.names.answer = [nobody(), at(server)]
            for number in range(3):
                ports["taken"] = number
                client = rig.dial()
                rig.run_until_open(number + 1)
                assert attempts() > before
                reset(client)
                rig.run_until_ended(number + 1)
            rig.names.answer = [nobody()]
            rig.dial()
            rig.run_until_ended(4)
            turns(loop, 2)
            assert attempts() <= before  # fewer: some of another test went meanwhile
    finally:
        gc.enable()
