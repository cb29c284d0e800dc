"""TCP that is forwarded: each packet of it through the worker, as traces; its flows, its end."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Source
from knet.wire import ipv4, tcp
from krelay.datapath.probes import abort_probes
from krelay.datapath.verdict import Verdict
from krelay.nat.flow import Timeouts
from krelay.nat.tcpstate import State
from krelay.steps import Hook, Side
from tests.krelay.nat.test_table import left_behind
from tests.tools.packets import at, policy, template
from tests.tools.script import Host, describe, play

THROUGH = policy(tcp=frozenset({80, 443}), forwarded=frozenset({443}))
HIDDEN = replace(THROUGH, source=Source.RELAY)
OPENED = """
    0     pre   C:40000 > K:443 [S]           => C:40000 > S:443
    0     post  S:443 > C:40000 [S.]          => K:443 > C:40000
    0     pre   C:40000 > K:443 [.]           => C:40000 > S:443
"""
OPENED_HIDDEN = """
    0     pre   C:40000 > K:443 [S]           => C:40000 > S:443
    0     post  C:40000 > S:443 [S]           => K:40000 > S:443
    0     pre   S:443 > K:40000 [S.]          => S:443 > C:40000
    0     post  S:443 > C:40000 [S.]          => K:443 > C:40000
    0     pre   C:40000 > K:443 [.]           => C:40000 > S:443
    0     post  C:40000 > S:443 [.]           => K:40000 > S:443
"""


def states(host: Host) -> list[str]:
    return [flow.state for flow in host.nat]


def killed(script: str, on: object = THROUGH) -> Host:
    """After this script its one flow is killed."""
    host = play(script, on=on)  # type: ignore[arg-type]
    [flow] = host.nat
    host.nat.kill(flow, 1)
    return host


def run(host: Host, *lines: str) -> list[str]:
    """What comes of each `TIME VERB PACKET`."""
    return [
        host.run(float(now), verb, rest)
        for now, verb, rest in (line.split(None, 2) for line in lines)
    ]


def test_its_packets_take_the_steps_of_udp() -> None:
    host = play(
        OPENED
        + """
    1     pre   C:40000 > K:443 [P.]          => C:40000 > S:443
    1     post  S:443 > C:40000 [P.]          => K:443 > C:40000
    """,
        on=THROUGH,
    )

    [flow] = host.nat
    assert host.steps == {"U1,U2": 3, "U3,U4": 2}
    assert (flow.gport, flow.relay, flow.state) == (None, None, State.ESTABLISHED)


def test_with_source_relay_each_step_is_taken_by_itself_and_has_a_relay_port() -> None:
    host = play(OPENED_HIDDEN, on=HIDDEN)

    [flow] = host.nat
    assert host.steps == {"U1": 2, "U2": 2, "U3": 1, "U4": 1}
    assert (flow.relay, flow.state) == (at("K:40000"), State.ESTABLISHED)


def test_two_clients_with_the_same_port_have_each_a_relay_port() -> None:
    play(
        """
    0     pre   C:40000 > K:443 [S]           => C:40000 > S:443
    0     pre   D:40000 > K:443 [S]           => D:y > S:443
    0     post  D:y > S:443 [S]               => K:y > S:443
    0     pre   S:443 > K:y [S.]              => S:443 > D:y
    0     post  S:443 > D:y [S.]              => K:443 > D:40000
    """,
        on=HIDDEN,
    )


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ("1 pre C:40000 > K:443 [F.]  => C:40000 > S:443", State.ESTABLISHED),  # half-closed
        (
            "1 pre C:40000 > K:443 [F.]  => C:40000 > S:443\n"
            "1 post S:443 > C:40000 [F.] => K:443 > C:40000",
            State.CLOSING,
        ),
        ("1 post S:443 > C:40000 [R.] => K:443 > C:40000", State.CLOSING),
        ("1 pre C:40000 > K:443 [R]   => C:40000 > S:443", State.CLOSING),
        (
            "1 pre C:40000 > K:443 [R]   => C:40000 > S:443\n"
            "2 post S:443 > C:40000 [.]  => K:443 > C:40000",
            State.ESTABLISHED,  # the RST was a forgery
        ),
    ],
)
def test_the_state_follows_from_the_flags_of_both_ends(more: str, state: State) -> None:
    assert states(play(OPENED + more, on=THROUGH)) == [state]


@pytest.mark.parametrize(("port", "terms"), [(80, "tcp-relay's"), (443, "forwarded")])
def test_services_of_both_kinds_stand_side_by_side(port: int, terms: str) -> None:
    to = "K:16000" if terms == "tcp-relay's" else "S:443"
    play(f"0 pre C:40000 > K:{port} [S] => C:40000 > {to}", on=THROUGH)


def test_its_timeouts_are_those_of_tcp() -> None:
    times = Timeouts(tcp_transitory=10, tcp_established=60)
    [flow] = play("0 pre C:40000 > K:443 [S] => C:40000 > S:443", on=THROUGH).nat
    assert flow.expires_at(times) == 10
    [flow] = play(OPENED, on=THROUGH).nat
    assert flow.expires_at(times) == 60


# Ports


@pytest.mark.parametrize(
    ("flags", "before"),
    [("S", "0 pre C:40000 > K:443 [F.] => C:40000 > S:443\n"
      "0 post S:443 > C:40000 [F.] => K:443 > C:40000\n")],
)  # fmt: skip
def test_a_closed_connections_port_opens_a_new_one_to_the_server_of_then(
    flags: str, before: str
) -> None:
    host = play(
        OPENED
        + before
        + """
    1     set   server=Z
    1     pre   C:40000 > K:443 [.]           => C:40000 > S:443
    2     pre   C:40000 > K:443 [S]           => C:40000 > Z:443
    2     post  Z:443 > C:40000 [S.]          => K:443 > C:40000
    """,
        on=THROUGH,
    )

    assert [flow.id for flow in host.nat] == [2]


def test_a_service_that_is_forwarded_no_more_keeps_its_flows_and_opens_others_by_tcp_relay() -> (
    None
):
    play(
        OPENED
        + """
    1     set   forwarded=
    1     pre   C:40000 > K:443 [.]           => C:40000 > S:443
    1     pre   C:40001 > K:443 [S]           => C:40001 > K:16000
    1     open  C:40001 @16000 from K:45678   => S:443 client
    1     pre   C:40000 > K:443 [R]           => C:40000 > S:443
    2     pre   C:40000 > K:443 [S]           => C:40000 > K:16000
    """,
        on=THROUGH,
    )


def test_a_clients_own_connection_to_the_server_is_moved_out_of_the_way() -> None:
    play(
        OPENED
        + """
    1     pre   C:40000 > S:443 [S]           => C:p > S:443
    1     pre   S:443 > C:p [S.]              => pass no_flow
    1     post  S:443 > C:p [S.]              => S:443 > C:40000
    1     post  S:443 > C:40000 [.]           => K:443 > C:40000
    2     pre   C:p > S:443 [S]               => C:q > S:443
    2     post  S:443 > C:q [S.]              => S:443 > C:p
    """,
        on=THROUGH,
    )


def test_a_clients_own_connection_keeps_its_port_from_forwarded_ones() -> None:
    play(
        """
    0     pre   C:40000 > S:443 [S]           => pass direct
    0     post  S:443 > C:40000 [S.]          => pass no_flow
    1     pre   C:40000 > K:443 [S]           => C:y > S:443
    1     post  S:443 > C:y [S.]              => K:443 > C:40000
    """,
        on=THROUGH,
    )


def test_the_relay_hosts_own_connection_never_meets_a_relay_port() -> None:
    play(
        OPENED_HIDDEN
        + """
    1     post  K:40000 > S:443 [S]           => K:p > S:443
    1     pre   S:443 > K:p [S.]              => S:443 > K:40000
    1     post  K:50000 > S:443 [S]           => pass own
    """,
        on=HIDDEN,
    )


# Connections that nobody knows


def test_what_a_client_sends_in_the_midst_of_a_connection_is_picked_up() -> None:
    host = play(
        """
    0     pre   C:40000 > K:443 [P.]          => C:40000 > S:443
    """,
        on=THROUGH,
    )
    assert states(host) == [State.OPENING]  # until the server has owned to it
    assert run(host, "1 post S:443 > C:40000 [.]") == ["K:443 > C:40000"]
    assert states(host) == [State.ESTABLISHED]


@pytest.mark.parametrize("flags", ["R", "R.", "S.", "F", ""])
def test_what_can_be_of_no_connection_is_not_picked_up(flags: str) -> None:
    play(f"0 pre C:40000 > K:443 [{flags or 'P'}] => pass no_flow", on=THROUGH)


def test_with_source_relay_nothing_is_picked_up_as_the_port_is_unknown() -> None:
    play("0 pre C:40000 > K:443 [.] => pass no_flow", on=HIDDEN)
    play("0 pre 192.168.0.7:40000 > K:443 [.] => pass no_flow", on=THROUGH)  # beside the server


def test_while_recovering_a_servers_packet_has_its_client_asked() -> None:
    play(
        """
    0     set   recovering=5
    0     post  S:443 > C:40000 [P.] => drop recovering + G:443 > C:40000 [S] + K:443 > C:40000 [S]
    0     pre   C:40000 > G:443 [R.]          => drop recovering
    0     pre   C:40000 > K:443 [.]           => C:40000 > S:443
    0     post  S:443 > C:40000 [P.]          => K:443 > C:40000
    0     post  S:443 > C:40001 [R]           => drop recovering
    0     pre   C:40002 > S:443 [.]           => pass direct
    0     post  S:443 > C:40002 [.]           => drop recovering
    6     post  S:443 > C:40003 [P.]          => pass no_flow
    """,
        on=THROUGH,
    )


# The end


@pytest.mark.parametrize(
    ("script", "on", "asked"),
    [
        (OPENED, THROUGH, ["K:443 > C:40000 [S]", "C:40000 > S:443 [S]"]),
        (OPENED_HIDDEN, HIDDEN, ["K:443 > C:40000 [S]", "K:40000 > S:443 [S]"]),
    ],
)
def test_both_ends_of_what_is_killed_are_asked(script: str, on: object, asked: list[str]) -> None:
    [flow] = killed(script, on).nat

    assert [describe(packet) for packet in abort_probes(flow)] == asked
    assert flow.state is State.CLOSING


def test_each_packet_of_a_killed_flow_is_answered_by_a_rst_until_both_ends_know() -> None:
    host = killed(OPENED)
    assert (
        run(host, "1 pre C:40000 > K:443 [.]", "1 pre C:40000 > K:443 [P.]")
        == ["drop killed + K:443 > C:40000 [R]"] * 2
    )
    assert states(host) == [State.CLOSING]
    assert run(host, "2 post S:443 > C:40000 [.]") == ["drop killed + C:40000 > S:443 [R]"]
    assert states(host) == [State.CLOSED]
    assert run(host, "3 post S:443 > C:40000 [.]") == ["drop killed + C:40000 > S:443 [R]"]
    host.nat.expire(13)
    assert not list(host.nat)


def test_a_rst_of_its_own_tells_that_an_end_knows() -> None:
    host = killed(OPENED)
    assert (
        run(host, "1 pre C:40000 > K:443 [R]", "1 post S:443 > C:40000 [R.]") == ["drop killed"] * 2
    )
    assert states(host) == [State.CLOSED]


def test_an_end_that_says_nothing_more_is_remembered_for_the_time_of_closing() -> None:
    host = killed(OPENED)
    assert run(host, "200 pre C:40000 > K:443 [.]") == ["drop killed + K:443 > C:40000 [R]"]
    assert run(host, "240 pre C:40000 > K:443 [.]") == ["drop killed + K:443 > C:40000 [R]"]
    host.nat.expire(242)
    assert not list(host.nat)


def test_with_source_relay_the_rst_to_the_server_passes_the_queue_as_it_is() -> None:
    host = killed(OPENED_HIDDEN, HIDDEN)
    assert run(
        host,
        "1 post K:40000 > S:443 [S]",
        "1 pre S:443 > K:40000 [.]",
        "1 post K:40000 > S:443 [R]",
        "1 post C:40000 > S:443 [.]",  # on its way when the flow was killed
    ) == ["pass own", "drop killed + K:40000 > S:443 [R]", "pass own", "drop killed"]


def test_a_client_may_open_anew_from_the_port_of_a_killed_connection() -> None:
    host = killed(OPENED)
    assert run(host, "1 pre C:40000 > K:443 [S]") == ["C:40000 > S:443"]
    assert [(flow.id, flow.state) for flow in host.nat] == [(2, State.OPENING)]


@given(seq=st.integers(0, 2**32 - 1), ack=st.integers(0, 2**32 - 1), size=st.integers(0, 50))
def test_the_rst_has_the_number_that_was_acknowledged(seq: int, ack: int, size: int) -> None:
    host = killed(OPENED)
    for hook, text in ((Hook.PREROUTING, "C:40000 > K:443 [P.]"),
                       (Hook.POSTROUTING, "S:443 > C:40000 [P.]")):  # fmt: skip
        packet = replace(template(text), seq=seq, ack=ack, payload=b"x" * size).build()
        assert host.worker.handle(packet, hook, 1) is Verdict.DROP
        answer = host.worker.answers.pop()
        assert answer[ipv4.ADDRESSES] == packet[16:20] + packet[12:16]
        assert answer[20 + tcp.FLAGS] == tcp.RST
        assert int.from_bytes(answer[24:28]) == ack


# Limits


def test_half_open_ones_make_room_and_established_ones_do_not() -> None:
    host = play(OPENED + "0 set flows=1", on=THROUGH)
    [result] = run(host, "9 pre D:1 > K:443 [S]")
    assert result == "drop table_full + K:443 > D:1 [R.]"
    host = play("0 pre C:40000 > K:443 [S] => C:40000 > S:443\n0 set flows=1", on=THROUGH)
    assert run(host, "9 pre D:1 > K:443 [S]") == ["D:1 > S:443"]


def test_a_forged_client_whose_server_answers_makes_room() -> None:
    host = play(
        """
    0     pre   C:40000 > K:443 [S]           => C:40000 > S:443
    0     post  S:443 > C:40000 [S.]          => K:443 > C:40000
    0     set   flows=1
    """,
        on=THROUGH,
    )
    assert run(host, "9 pre D:1 > K:443 [S]") == ["D:1 > S:443"]


def test_flows_whose_server_never_answered_are_pointed_elsewhere() -> None:
    host = play(OPENED + "1 pre D:1 > K:443 [S] => D:1 > S:443", on=THROUGH)
    assert [flow.client for flow in host.nat.unanswered()] == [at("D:1")]
    [established, _] = host.nat
    host.nat.kill(established, 1)
    assert {each.told for each in host.nat} == {frozenset()}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pre C", "pre D", "post S>C", "post S>D", "kill", "end"]),
            st.sampled_from(["S", ".", "P.", "F.", "R", "R.", "S."]),
        ),
        max_size=30,
    ),
    st.sampled_from([THROUGH, HIDDEN]),
)
def test_whatever_happens_nothing_is_left_behind(script: list[tuple[str, str]], on: object) -> None:
    host = Host(on)  # type: ignore[arg-type]
    for second, (what, flags) in enumerate(script):
        match what.split():
            case ["pre", name]:
                run(host, f"{second} pre {name}:40000 > K:443 [{flags}]")
            case ["post", ends]:
                run(host, f"{second} post S:443 > {ends[2]}:40000 [{flags}]")
            case ["kill"]:
                for flow in host.nat:
                    if flow.is_forwarded:
                        host.nat.kill(flow, second)
            case ["end"]:
                for flow in host.nat:
                    host.nat.end(flow)
        sides = [flow.by(Side.CLIENT) for flow in host.nat]
        assert all(side is not None for side in sides)
    host.nat.expire(100_000)
    assert not list(host.nat)
    assert not left_behind(host.nat)


# Where there is no room

FINS = """
    1     pre   C:40000 > K:443 [F.]          => C:40000 > S:443
    1     post  S:443 > C:40000 [F.]          => K:443 > C:40000
    1     pre   C:40000 > K:443 [.]           => C:40000 > S:443
"""
RESET = """
    1     post  S:443 > C:40000 [R.]          => K:443 > C:40000
"""


def client_begins(host: Host, port: int, when: float) -> str:
    """What becomes of its SYN, where a client may have one flow."""
    host.nat.limits = host.nat.limits._replace(flows_per_client=1)
    return host.run(when, "pre", f"C:{port} > K:443 [S]").partition(" + ")[0]


@pytest.mark.parametrize("end", [FINS, RESET], ids=["ended", "reset"])
def test_one_that_is_over_makes_room_at_a_limit_when_its_last_packets_are_through(
    end: str,
) -> None:
    host = play(OPENED + end, on=THROUGH)

    assert states(host) == ["closing"]
    assert client_begins(host, 40001, 2.9) == "drop client_full"
    assert client_begins(host, 40001, 3) == "C:40001 > S:443"
    assert [flow.client.port for flow in host.nat] == [40001]
    assert host.nat.admission.evicted == 1


def test_one_that_lives_is_half_closed_or_is_to_be_told_of_its_end_makes_no_room() -> None:
    for script in ("", "    1 pre C:40000 > K:443 [F.] => C:40000 > S:443\n"):
        assert client_begins(play(OPENED + script, on=THROUGH), 40001, 99) == "drop client_full"
    assert client_begins(killed(OPENED + FINS), 40001, 99) == "drop client_full"


def test_one_that_was_falsely_reset_makes_no_room() -> None:
    host = play(OPENED + RESET, on=THROUGH)
    run(host, "2 pre C:40000 > K:443 [P.]")

    assert states(host) == ["established"]
    assert client_begins(host, 40001, 99) == "drop client_full"
    run(host, "100 pre C:40000 > K:443 [F.]", "100 post S:443 > C:40000 [F.]")
    assert client_begins(host, 40001, 103) == "C:40001 > S:443"


def test_who_was_never_a_conversation_makes_room_before_one_that_is_over() -> None:
    host = play(OPENED + FINS + "    2 pre D:40000 > K:443 [S] => D:40000 > S:443\n", on=THROUGH)
    host.nat.limits = host.nat.limits._replace(flows=2)

    assert run(host, "9 pre D:40001 > K:443 [S]") == ["D:40001 > S:443"]
    assert states(host) == ["closing", "opening"]
    handshake = "9 post S:443 > D:40001 [S.]", "9 pre D:40001 > K:443 [.]"
    assert run(host, *handshake) == ["K:443 > D:40001", "D:40001 > S:443"]
    assert run(host, "9 pre D:40002 > K:443 [S]") == ["D:40002 > S:443"]
    assert states(host) == ["established", "opening"]


# Packets that nobody has sent


def begun(*lines: str) -> Host:
    """A host after these lines, whatever has come of them."""
    host = Host(THROUGH)
    run(host, *lines)
    return host


@pytest.mark.parametrize(
    "guessed",
    [
        ["0 pre C:40000 > K:443 [.!]"],
        ["0 post S:443 > C:40000 [S.!]", "0 pre C:40000 > K:443 [.!]"],
        ["0 post S:443 > C:40000 [.!]", "0 pre C:40000 > K:443 [P.!]"],
        ["0 post S:443 > C:40000 [S.]", "0 pre C:40000 > K:443 [.!]"],
        ["0 pre C:40000 > K:443 [.!]", "0 post S:443 > C:40000 [S.!]"],
    ],
)
def test_no_connection_is_established_by_guesses(guessed: list[str]) -> None:
    host = begun("0 pre C:40000 > K:443 [S]", *guessed)

    [flow] = host.nat
    assert (flow.state, flow.is_confirmed) == (State.OPENING, False)


def test_forged_packets_amid_a_handshake_do_not_hinder_it() -> None:
    host = begun(
        "0 pre C:40000 > K:443 [S]",
        "0 pre C:40000 > K:443 [S!]",
        "0 post S:443 > C:40000 [R!]",
        "0 pre C:40000 > K:443 [F.!]",
        "0 post S:443 > C:40000 [F.!]",
        "0 post S:443 > C:40000 [S.]",
        "0 pre C:40000 > K:443 [R]",
        "0 pre C:40000 > K:443 [.]",
    )
    [flow] = host.nat
    assert flow.state is State.ESTABLISHED


def test_a_forged_syn_first_leaves_the_clients_own_its_way() -> None:
    host = begun(
        "0 pre C:40000 > K:443 [S!]",
        "0 pre C:40000 > K:443 [S]",
        "0 post S:443 > C:40000 [S.]",
        "0 pre C:40000 > K:443 [.]",
    )
    [flow] = host.nat
    assert flow.state is State.ESTABLISHED


def test_a_refusal_is_one_if_it_has_the_number_of_what_it_refuses() -> None:
    for answer, state in (("[R.]", State.CLOSING), ("[R.!]", State.OPENING)):
        host = begun("0 pre C:40000 > K:443 [S]", f"0 post S:443 > C:40000 {answer}")
        assert states(host) == [state]
