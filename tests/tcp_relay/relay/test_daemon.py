"""The daemon as its users meet it: a process, a file tree, clients, servers, and a krelay."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from knet.endpoint import Endpoint, Source
from krelay.registration.messages import (
    PORT_TAKEN,
    Abort,
    Open,
    Opened,
    Refused,
    Request,
    Resume,
    Resumed,
)
from tcp_relay.relay.connection import PORT_TRIES
from tests.tcp_relay.fake_krelay import FakeKrelay, Reply, opened_to, refusing
from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    Server,
    TcpRelay,
    echo,
    everything,
    exactly,
    free_port,
    is_quiet,
    reset,
    until_closed,
    wait_for,
    was_reset,
)

MEGABYTE = bytes(range(256)) * 4096


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(echo) as server:
        yield server


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[TcpRelay]:
    with TcpRelay(tmp_path / "tree") as relay:
        yield relay.ready()


@pytest.fixture
def krelay(relay: TcpRelay, server: Server) -> Iterator[FakeKrelay]:
    with FakeKrelay(relay.root, server.endpoint) as krelay:
        relay.wait_for_log("info connected to krelay")
        yield krelay


def test_bytes_come_back_and_krelay_hears_of_it(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    with relay.dial() as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        [request] = krelay.opens()
        assert request.client == Endpoint.of(*client.getsockname())
        assert request.gport == relay.gport
        assert request.service is None
        assert server.peers == [(request.relay.host, request.relay.port)]
        assert not krelay.closes()
    wait_for(krelay.closes, "a close message")
    assert krelay.closes() == [request.relay]
    relay.wait_for_log("connection ended")
    assert "reason=closed" in relay.log
    assert "from_client=5 from_server=5" in relay.log
    service = f"{LOCALHOST}:{server.endpoint.port}"
    assert relay.log.count(f" service={service} gport={relay.gport} relay=") == 2


def test_the_client_may_finish_first_and_still_gets_all(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    def after_the_end(sock: socket.socket) -> None:
        sock.sendall(b"%d" % len(everything(sock)))

    with Server(after_the_end) as late:
        krelay.reply = lambda request: opened_to(late.endpoint, request)
        with relay.dial() as client:
            client.sendall(MEGABYTE)
            client.shutdown(socket.SHUT_WR)
            assert everything(client) == b"%d" % len(MEGABYTE)


def test_the_server_may_finish_first_and_still_gets_all(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    heard: list[bytes] = []

    def greeting(sock: socket.socket) -> None:
        sock.sendall(b"220 hello")
        sock.shutdown(socket.SHUT_WR)
        heard.append(everything(sock))

    with Server(greeting) as early:
        krelay.reply = lambda request: opened_to(early.endpoint, request)
        with relay.dial() as client:
            assert everything(client) == b"220 hello"
            client.sendall(MEGABYTE)
        wait_for(lambda: heard, "what the client said")
    assert heard == [MEGABYTE]


def test_a_client_that_has_finished_before_the_server_is_known_is_served(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    krelay.reply = lambda request: None
    with relay.dial() as client:
        client.sendall(b"all there is")
        client.shutdown(socket.SHUT_WR)
        wait_for(krelay.opens, "an open")
        krelay.say(Opened(krelay.opens()[0].id, server.endpoint, Source.CLIENT))
        assert everything(client) == b"all there is"


def test_much_goes_both_ways_at_once_past_a_slow_reader(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    data = MEGABYTE * 48

    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    with relay.dial() as client, ExitStack() as stack:
        sender = threading.Thread(target=send)
        sender.start()
        stack.callback(sender.join, BOUND)
        wait_for(lambda: is_quiet(client) is False, "the first byte back")
        # Nothing is read until all buffers on the way are full and the sender stands still.
        relay.wait_until_still()
        assert sender.is_alive()
        assert everything(client) == data


def test_urgent_data_doesnt_hold_up_what_follows(relay: TcpRelay, krelay: FakeKrelay) -> None:
    """The server here, as most, doesn't look for what is out of band, and never sees it."""
    with relay.dial() as client:
        for _ in range(20):
            client.send(b"before!", socket.MSG_OOB)
            client.sendall(b"after")
            assert exactly(client, 11) == b"beforeafter"


def test_a_client_whom_krelay_refuses_is_reset(relay: TcpRelay, krelay: FakeKrelay) -> None:
    krelay.reply = refusing("no row for this client", 1, lambda request: None)
    assert _is_reset(relay)
    relay.wait_for_log('reason=refused detail="krelay: no row for this client"')
    with relay.dial():  # the refused one had no row to close
        wait_for(lambda: len(krelay.opens()) == 2, "the next open")
        assert not krelay.closes()


def _is_reset(relay: TcpRelay) -> bool:
    try:
        with relay.dial() as client:
            return was_reset(client)
    except ConnectionResetError:  # before connect() had returned
        return True


def test_a_client_whose_server_refuses_is_reset(relay: TcpRelay, krelay: FakeKrelay) -> None:
    nobody = Endpoint.of(LOCALHOST, free_port())
    krelay.reply = lambda request: opened_to(nobody, request)
    assert _is_reset(relay)
    relay.wait_for_log('reason=connect_failed detail="server: connection refused"')
    wait_for(krelay.closes, "a close message")


def test_a_reset_is_passed_on_to_the_server(relay: TcpRelay, krelay: FakeKrelay) -> None:
    ends: list[bool] = []
    with Server(lambda sock: ends.append(was_reset(sock))) as server:
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        client = relay.dial()
        wait_for(lambda: server.peers, "the server leg")
        reset(client)
        wait_for(lambda: ends, "the end at the server")
    assert ends == [True]
    relay.wait_for_log('reason=reset detail="client: connection reset by peer"')


def test_a_reset_is_passed_on_to_the_client_behind_what_was_sent(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    def rude(sock: socket.socket) -> None:
        sock.sendall(b"sorry")
        sock.recv(1)
        reset(sock)

    with Server(rude) as server:
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        with relay.dial() as client:
            assert client.recv(5) == b"sorry"
            client.sendall(b"x")
            assert was_reset(client)


def test_a_client_that_goes_while_krelay_is_asked_is_forgotten(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    krelay.reply = lambda request: None
    client = relay.dial()
    wait_for(krelay.opens, "an open")
    reset(client)
    wait_for(krelay.closes, "a close message")
    [request] = krelay.opens()
    assert krelay.closes() == [request.relay]
    krelay.say(Opened(request.id, server.endpoint, Source.CLIENT))  # too late, no harm
    krelay.reply = lambda request: opened_to(server.endpoint, request)
    assert _echoes(relay)


def _echoes(relay: TcpRelay, port: int | None = None) -> bool:
    with relay.dial(port) as client:
        client.sendall(b"still there?")
        return exactly(client, 12) == b"still there?"


def test_another_relay_port_is_tried_when_one_is_taken(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    krelay.reply = refusing(PORT_TAKEN, 3, lambda r: opened_to(server.endpoint, r))
    assert _echoes(relay)
    ports = [request.relay for request in krelay.opens()]
    assert len(set(ports)) == 4
    wait_for(krelay.closes, "a close message")
    assert krelay.closes() == ports[-1:]


def test_who_finds_no_relay_port_waits_for_one(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    krelay.reply = refusing(PORT_TAKEN, 20, lambda r: opened_to(server.endpoint, r))
    assert _echoes(relay)
    assert len(krelay.opens()) == 21
    assert relay.log.count("no local port is free") == 1


def test_the_search_for_a_relay_port_ends(tmp_path: Path, server: Server) -> None:
    with (
        TcpRelay(tmp_path / "tree", "--connect-timeout", "0.3") as relay,
        FakeKrelay(relay.ready().root, server.endpoint) as krelay,
    ):
        krelay.reply = refusing(PORT_TAKEN, 1000, lambda request: None)
        assert _is_reset(relay)
        assert len(krelay.opens()) % PORT_TRIES == 0
        assert not krelay.closes()
        relay.wait_for_log('reason=connect_failed detail="no local port was free for 0.3 s"')


def test_an_abort_resets_both_sides(relay: TcpRelay, krelay: FakeKrelay) -> None:
    ends: list[bool] = []
    with Server(lambda sock: ends.append(was_reset(sock))) as server, relay.dial() as bystander:
        bystander.sendall(b"me first")
        assert exactly(bystander, 8) == b"me first"
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        with relay.dial() as client:
            wait_for(lambda: server.peers, "the server leg")
            krelay.say(Abort(Endpoint.of(LOCALHOST, 1)))  # of nobody
            krelay.say(Abort(krelay.opens()[1].relay))
            assert was_reset(client)
        wait_for(lambda: ends, "the end at the server")
        bystander.sendall(b"unharmed")
        assert exactly(bystander, 8) == b"unharmed"
    assert ends == [True]
    wait_for(krelay.closes, "a close message")
    assert krelay.closes()[0] == krelay.opens()[1].relay


def test_when_tcp_relay_is_killed_both_ends_are_reset(relay: TcpRelay, krelay: FakeKrelay) -> None:
    """A FIN would make half a file look like the whole."""
    ends: list[bool] = []
    with Server(lambda sock: ends.append(was_reset(sock))) as server:
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        with relay.dial() as client:
            wait_for(lambda: server.peers, "the server leg")
            relay.process.kill()
            assert was_reset(client)
        wait_for(lambda: ends, "the end at the server")
    assert ends == [True]


def test_running_connections_outlive_krelay_and_are_resumed(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    with relay.dial() as client:
        client.sendall(b"one")
        assert exactly(client, 3) == b"one"
        krelay.stop()
        client.sendall(b"two")
        assert exactly(client, 3) == b"two"
        krelay.start()
        wait_for(krelay.resumes, "a resume message")
        [opened], [resumed] = krelay.opens(), krelay.resumes()
        assert resumed == Resume(
            resumed.id,
            opened.client,
            relay.gport,
            opened.relay,
            server.endpoint,
            service=Endpoint.of(LOCALHOST, server.endpoint.port),
            source=Source.CLIENT,
        )
        assert resumed.id != opened.id
        client.sendall(b"three")
        assert exactly(client, 5) == b"three"
    wait_for(krelay.closes, "a close message")


def test_a_resume_that_is_refused_ends_the_connection(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    with relay.dial() as client:
        client.sendall(b"one")
        assert exactly(client, 3) == b"one"
        krelay.stop()
        krelay.reply = lambda r: Refused(r.id, "no") if isinstance(r, Resume) else None
        krelay.start()
        assert was_reset(client)


def test_a_client_that_came_while_krelay_was_away_is_served_when_it_is_back(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    krelay.stop()
    relay.wait_for_log("not connected to krelay", times=2)
    with relay.dial() as client:
        client.sendall(b"patient")
        assert is_quiet(client)
        krelay.start()
        assert exactly(client, 7) == b"patient"


@pytest.mark.parametrize(
    "garbage",
    [b"{", b"[]", b'{"id":"x"}', b"\xff" * 5000, Resumed(1)],
    ids=["no JSON", "no object", "no number", "too long", "wrong kind"],
)
def test_after_garbage_the_relay_socket_is_connected_anew(
    relay: TcpRelay, krelay: FakeKrelay, server: Server, garbage: Reply
) -> None:
    talks: list[Request] = []

    def reply(request: Request) -> Reply:
        talks.append(request)
        if len(talks) <= 3 and isinstance(request, Open):
            return Resumed(request.id) if isinstance(garbage, Resumed) else garbage
        return opened_to(server.endpoint, request)

    krelay.reply = reply
    assert _echoes(relay)
    assert [request.relay for request in krelay.opens()[:4]] == [krelay.opens()[0].relay] * 4
    assert relay.log.count("malformed message from krelay") == 1


def test_a_new_gateway_port_is_served_and_running_connections_stay(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    with relay.dial() as client:
        client.sendall(b"one")
        assert exactly(client, 3) == b"one"
        new = free_port()
        (relay.root / "gport").write_text(f"{new}\n")
        relay.wait_for_log(f"listening gport={new} before={relay.gport}")
        assert _echoes(relay, new)
        assert krelay.opens()[-1].gport == new
        assert _echoes(relay)  # the old one lingers
        client.sendall(b"two")
        assert exactly(client, 3) == b"two"
        krelay.stop()
        krelay.start()
        wait_for(krelay.resumes, "a resume")
        assert krelay.resumes()[0].gport == relay.gport  # a flow keeps what it began with


def test_a_gateway_port_that_is_taken_is_tried_until_it_is_free(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    with socket.create_server((LOCALHOST, 0)) as other:
        taken = other.getsockname()[1]
        (relay.root / "gport").write_text(f"{taken}\n")
        relay.wait_for_log(f"can't listen gport={taken}")
        assert _echoes(relay)
    relay.wait_for_log(f"listening gport={taken}")
    assert _echoes(relay, taken)


def test_a_refused_gateway_port_changes_nothing(relay: TcpRelay, krelay: FakeKrelay) -> None:
    for text in ("abc\n", "70000\n", "80\n"):
        (relay.root / "gport").write_text(text)
    new = free_port()
    (relay.root / "gport").write_text(f"{new}\n")
    relay.wait_for_log(f"listening gport={new}")
    assert relay.log.count("listening") == 2
    assert (relay.root / "gport").read_text() == f"{new}\n"


def test_it_waits_for_the_file_tree(tmp_path: Path) -> None:
    with TcpRelay(tmp_path / "tree", make_tree=False) as relay:
        relay.wait_for_log("waiting for the file tree")
        relay.make_tree()
        relay.ready()
        assert relay.log.count("waiting for the file tree") == 1
        # Whether it found the default first depends on who is quicker.


@pytest.mark.serial
def test_running_out_of_descriptors_pauses_accepting_and_no_client_is_lost(
    relay: TcpRelay, krelay: FakeKrelay
) -> None:
    assert _echoes(relay)
    relay.wait_for_log("connection ended")
    relay.limit_descriptors(7)
    with ExitStack() as stack:
        clients = [stack.enter_context(relay.dial()) for _ in range(12)]
        for client in clients:
            client.sendall(b"x")
        relay.wait_for_log("accepting paused")
        before = relay.wake_ups()
        served = 0
        for client in clients:  # in the order they came; each that ends makes room for the next
            assert client.recv(1) == b"x"
            served += 1
            client.close()
        assert served == 12
        assert relay.wake_ups() - before < 1000
    assert relay.log.count("accepting paused") == 1
    assert _echoes(relay)


def test_five_hundred_connections_leave_nothing_behind(relay: TcpRelay, krelay: FakeKrelay) -> None:
    assert _echoes(relay)
    wait_for(krelay.closes, "the close message")
    before = relay.descriptors()
    for _ in range(5):
        with ExitStack() as stack:
            clients = [stack.enter_context(relay.dial()) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(b"%03d" % number)
            for number, client in enumerate(clients):
                assert exactly(client, 3) == b"%03d" % number
            assert relay.descriptors() >= before + 200
    wait_for(lambda: len(krelay.closes()) == 501, "all close messages")
    wait_for(lambda: relay.descriptors() == before, "the descriptors to be closed")
    assert sorted(krelay.closes()) == sorted(request.relay for request in krelay.opens())


@pytest.mark.serial
def test_idle_connections_cost_no_time(relay: TcpRelay, krelay: FakeKrelay) -> None:
    with Server(until_closed) as server, ExitStack() as stack:
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        clients = [stack.enter_context(relay.dial()) for _ in range(200)]
        for client in clients[:100]:  # half of them idle with an end of file passed on
            client.sendall(b"x")
        relay.wait_for_log("connection opened", times=200)
        relay.wait_until_still()
        woken, used = relay.wake_ups(), relay.cpu()
        threading.Event().wait(0.4)
        assert relay.wake_ups() - woken <= 2
        assert relay.cpu() - used <= 0.02


@pytest.mark.serial
def test_silence_after_one_side_finished_costs_no_time(relay: TcpRelay, krelay: FakeKrelay) -> None:
    with relay.dial() as client:
        krelay_server_done = threading.Event()

        def channel(sock: socket.socket) -> None:
            sock.shutdown(socket.SHUT_WR)
            krelay_server_done.wait(BOUND)

        with Server(channel) as server:
            client.close()
            krelay.reply = lambda request: opened_to(server.endpoint, request)
            with relay.dial() as other:
                assert everything(other) == b""
                other.sendall(b"unread")
                relay.wait_until_still()
                used = relay.cpu()
                threading.Event().wait(0.2)
                assert relay.cpu() - used <= 0.02
            krelay_server_done.set()


def test_the_stall_limit_follows_the_tree(relay: TcpRelay, krelay: FakeKrelay) -> None:
    over = threading.Event()

    def reads_nothing(_: socket.socket) -> None:
        over.wait(BOUND)

    with Server(reads_nothing) as server, relay.dial() as client:
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        relay.wait_for_log("connection opened")
        (relay.root / "timeouts/stall").write_text("1\n")
        client.settimeout(BOUND)
        with pytest.raises(ConnectionResetError):
            client.sendall(MEGABYTE * 64)  # more than all buffers on the way hold
        relay.wait_for_log("the server took none of")
        over.set()


def test_ctrl_c_ends_it_with_all_connections_and_rows(relay: TcpRelay, krelay: FakeKrelay) -> None:
    with relay.dial() as client:
        client.sendall(b"one")
        assert exactly(client, 3) == b"one"
        relay.process.send_signal(signal.SIGHUP)  # means nothing
        assert relay.end(signal.SIGINT) == 130
        assert was_reset(client)
    wait_for(krelay.closes, "a close message")
    assert krelay.closes() == [krelay.opens()[0].relay]


def test_after_sigterm_running_connections_go_on_and_their_rows_are_closed_as_they_end(
    relay: TcpRelay, krelay: FakeKrelay, server: Server
) -> None:
    krelay.reply = lambda request: None
    with relay.dial() as asking:  # krelay hasn't answered yet
        wait_for(krelay.opens, "an open")
        krelay.reply = lambda request: opened_to(server.endpoint, request)
        with relay.dial() as client:
            client.sendall(b"one")
            assert exactly(client, 3) == b"one"
            relay.process.send_signal(signal.SIGTERM)
            relay.wait_for_log("draining connections=2")
            with pytest.raises(ConnectionRefusedError):
                relay.dial()
            client.sendall(b"two")
            assert exactly(client, 3) == b"two"
            krelay.say(Opened(krelay.opens()[0].id, server.endpoint, Source.CLIENT))
            asking.sendall(b"three")
            assert exactly(asking, 5) == b"three"
        wait_for(krelay.closes, "a close message")
        asking.sendall(b"four")
        assert exactly(asking, 4) == b"four"
    assert relay.process.wait(BOUND) == 0
    wait_for(lambda: len(krelay.closes()) == 2, "the other close message")
    assert krelay.closes() == [request.relay for request in reversed(krelay.opens())]


def test_a_drain_ends_with_all_connections_and_rows(tmp_path: Path, server: Server) -> None:
    with (
        TcpRelay(tmp_path / "tree", "--drain", "0.2") as relay,
        FakeKrelay(relay.ready().root, server.endpoint) as krelay,
        relay.dial() as client,
    ):
        client.sendall(b"one")
        assert exactly(client, 3) == b"one"
        assert relay.end(signal.SIGTERM) == 0
        assert was_reset(client)
        wait_for(krelay.closes, "a close message")
        assert krelay.closes() == [krelay.opens()[0].relay]
        assert "reason=drained" in relay.log


def test_krelay_is_told_the_counters(relay: TcpRelay, krelay: FakeKrelay) -> None:
    def told(**counts: int) -> bool:
        return bool(krelay.reports) and counts.items() <= krelay.reports[-1].counts.items()

    with relay.dial() as client:
        client.sendall(b"hello")
        assert exactly(client, 5) == b"hello"
        wait_for(lambda: told(open=1, held=0, accepted=1, opened=1), "a report")
    wait_for(lambda: told(open=0, closed=1, from_client=5, from_server=5), "the last report")
    last = krelay.reports[-1]
    krelay.stop()
    krelay.reports.clear()
    krelay.start()
    wait_for(lambda: krelay.reports, "a report after the reconnect")
    assert krelay.reports[0] == last


def test_the_service_manager_is_told_when_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(BOUND)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with TcpRelay(tmp_path / "tree") as relay:
            assert manager.recv(100) == b"READY=1"
            relay.dial().close()


def test_it_may_be_ended_while_it_waits_for_the_tree(tmp_path: Path) -> None:
    with TcpRelay(tmp_path / "tree", make_tree=False) as relay:
        relay.wait_for_log("waiting for the file tree")
        assert relay.end() == 0
        assert not relay.root.exists()
