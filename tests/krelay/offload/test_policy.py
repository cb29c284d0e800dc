"""Which flows the kernel is handed, and that nobody can tell from packets and flows that it was."""

from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from knet.endpoint import Endpoint, FiveTuple, Proto, Source, flow_key
from krelay.datapath.verdict import Verdict
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import BUSY, CLOSED_LINGER, EXCHANGE, Flow, Rewrite, Timeouts
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State
from krelay.offload.accounting import LINGER, POLLS_PER_SECOND
from krelay.offload.backend import Changes
from krelay.offload.layout import Counted, can_be_done
from krelay.offload.policy import (
    HALF_OPEN,
    HALF_OPEN_FOR,
    OFFLOAD_MAX_WAIT,
    OFFLOAD_MIN_AGE,
    SILENCE,
    OffloadPolicy,
)
from krelay.registration.messages import Close, Open, Opened
from krelay.steps import SIDES, Hook, Step
from tests.tools.kernel import Datapath
from tests.tools.observing import observe
from tests.tools.packets import ACK, FIN, PSH, RST, SYN, Template, addr, at, policy, template

PRE, POST = Hook.PREROUTING, Hook.POSTROUTING
FORWARDING = policy(forwarded=frozenset({443}))
ALL = frozenset({Step.T1, Step.T2, Step.T3, Step.T4})
BOTH = frozenset({Step.U12, Step.U34})


def datapath(room: int = 100, **changes: object) -> Datapath:
    return Datapath(replace(FORWARDING, **changes), room)  # type: ignore[arg-type]


def by(datapath: Datapath, hook: Hook, *texts: str) -> list[str]:
    """Who rewrites these packets: `kernel` or `worker`; or their verdict."""
    found = []
    for text in texts:
        before = datapath.kernel.counters.total()
        verdict = datapath.packet(template(text), hook)
        if isinstance(verdict, Verdict):
            found.append(verdict.name)
        else:
            found.append("worker" if datapath.kernel.counters.total() == before else "kernel")
    return found


def handed(datapath: Datapath, flow: Flow) -> frozenset[Step]:
    """The steps of this flow that the kernel does, as its map says."""
    has = datapath.kernel.has
    return frozenset(step for step, rewrite in flow.rewrites.items() if has(rewrite))


def opened(datapath: Datapath, client: str = "C:40000") -> Flow:
    """The flow of a connection whose client has completed its handshake."""
    assert by(datapath, PRE, f"{client} > K:80 [S]") == ["worker"]
    whose = ["kernel" if datapath.room else "worker"]
    assert by(datapath, POST, f"K:16000 > {client} [S.]") == whose
    assert by(datapath, PRE, f"{client} > K:80 [.]") == whose
    flow = datapath.nat.mappings.accepted(at(client), 16000)
    assert flow is not None
    return flow


def attach(datapath: Datapath, client: str = "C:40000", relay: str = "K:45678") -> None:
    """tcp-relay has accepted it, and will connect from there."""
    request = Open(1, at(client), 16000, at(relay))
    answer = datapath.relays.handle(request, datapath.tcp_relay, datapath.now)
    assert isinstance(answer, Opened), answer
    datapath.turn()


def connected(datapath: Datapath, client: str = "C:40000", relay: str = "K:45678") -> Flow:
    """The flow of a connection that the server has answered."""
    flow = opened(datapath, client)
    attach(datapath, client, relay)
    host, port = client.partition(":")[0], relay.partition(":")[2]
    by(datapath, POST, f"{relay} > S:80 [S]")
    by(datapath, PRE, f"S:80 > {host}:{port} [S.]")
    by(datapath, POST, f"{relay} > S:80 [.]")
    datapath.count([flow])
    assert flow.state is State.ESTABLISHED
    return flow


def close(datapath: Datapath, relay: str = "K:45678") -> None:
    datapath.relays.handle(Close(at(relay)), datapath.tcp_relay, datapath.now)
    datapath.turn()


def forwarded(datapath: Datapath, client: str = "C:40000") -> Flow:
    """The flow of a forwarded connection after its handshake."""
    by(datapath, PRE, f"{client} > K:443 [S]")
    flow = next(flow for flow in datapath.nat if flow.client == at(client))
    assert handed(datapath, flow) == frozenset()
    by(datapath, POST, f"S:443 > {client} [S.]")
    assert handed(datapath, flow) == frozenset()
    by(datapath, PRE, f"{client} > K:443 [.]")
    return flow


def asked(datapath: Datapath, client: str = "C:4000", times: int = BUSY) -> Flow:
    """The flow of a client that has asked so often and got as many answers."""
    for _ in range(times):
        by(datapath, PRE, f"{client} > K:53")
        by(datapath, POST, f"S:53 > {client}")
    return next(flow for flow in datapath.nat if flow.client == at(client))


def shown(flow: Flow) -> tuple[list[int], list[int]]:
    """Packets and bytes as `show nat` has them."""
    sides = [rewrite for step, rewrite in sorted(flow.rewrites.items()) if step in SIDES]
    return [side.packets for side in sides], [side.bytes for side in sides]


# When flows are offloaded


def test_a_connection_is_offloaded_as_far_as_it_has_come() -> None:
    d = datapath()
    flow = opened(d)
    assert handed(d, flow) == {Step.T1, Step.T2}
    attach(d)
    assert handed(d, flow) == ALL

    assert by(d, POST, "K:45678 > S:80 [S]", "K:45678 > S:80 [F.]") == ["kernel"] * 2
    assert by(d, PRE, "S:80 > C:45678 [S.]", "S:80 > C:45678 [P.]") == ["kernel"] * 2
    assert by(d, PRE, "C:40000 > K:80 [P.]") == ["kernel"]
    assert by(d, POST, "K:16000 > C:40000 [P.]", "K:16000 > C:40000 [F.]") == ["kernel"] * 2


def test_of_connections_that_are_only_begun_a_number_is_offloaded() -> None:
    """They may be forged, all of them."""
    d = datapath(room=2 * HALF_OPEN)
    d.nat.limits = FlowLimits(10_000, 10_000)
    for port in range(5001, 5001 + HALF_OPEN):
        by(d, PRE, f"C:{port} > K:80 [S]")
    assert len(d.kernel) == 2 * HALF_OPEN
    assert by(d, PRE, "D:5001 > K:80 [S]", "D:5001 > K:80 [.]") == ["worker"] * 2
    late = d.nat.mappings.accepted(at("D:5001"), 16000)
    assert late is not None
    assert handed(d, late) == frozenset()

    assert by(d, PRE, "C:5007 > K:80 [.]") == ["kernel"]
    attach(d, "C:5007")  # is accepted, and so makes room for one
    assert by(d, PRE, "D:5002 > K:80 [S]", "D:5002 > K:80 [.]") == ["worker", "kernel"]
    assert by(d, PRE, "D:5003 > K:80 [S]", "D:5003 > K:80 [.]") == ["worker"] * 2
    d.now = HALF_OPEN_FOR + 0.1
    assert by(d, PRE, "D:5004 > K:80 [S]", "D:5004 > K:80 [.]") == ["worker", "kernel"]
    attach(d, "D:5001", "K:46000")
    assert handed(d, late) == ALL


def test_fins_are_the_kernels_which_tells_of_those_that_end_a_connection() -> None:
    d = datapath()
    flow = connected(d)
    d.now = 5
    assert by(d, PRE, "C:40000 > K:80 [F.]", "S:80 > C:45678 [F.]") == ["kernel"] * 2
    assert (flow.tracker.client_ended, flow.tracker.server_ended) == (False, False)
    assert by(d, POST, "K:45678 > S:80 [F.]") == ["kernel"]
    assert flow.tracker.client_ended
    assert by(d, POST, "K:16000 > C:40000 [F.]") == ["kernel"]
    assert flow.state is State.CLOSING
    assert handed(d, flow) == ALL
    d.count([flow])
    assert flow.expires_at(d.nat.timeouts) == 5 + d.nat.timeouts.tcp_transitory
    assert shown(flow)[0] == [3, 2]


def test_a_syn_with_an_ack_begins_no_connection_to_the_server() -> None:
    d = datapath()
    flow = opened(d)
    attach(d)
    assert by(d, POST, "K:45678 > S:80 [S.]") == ["kernel"]
    assert flow.leg is None
    assert by(d, POST, "K:45678 > S:80 [S]") == ["kernel"]
    assert flow.leg == 1000


def test_what_the_kernel_tells_of_no_flow_is_ignored() -> None:
    d = datapath()
    flow = connected(d)
    for text in ("K:80 > D:40000 [F.]", "C:9 > S:80 [F.]", "K:80 > C:40000 [F.]"):
        packet = template(text)
        d.nat.tracking.relayed(packet.build()[12:24], packet.flags, packet.seq, d.now)
    assert (flow.tracker.client_ended, flow.tracker.server_ended) == (False, False)


@pytest.mark.parametrize("text", ["K:16000 > C:40000 [F.]", "K:45678 > S:80 [F.]"])
def test_a_fin_that_the_programs_pass_over_visits_the_worker(text: str) -> None:
    d = datapath()
    flow = connected(d)
    before = d.kernel.counters.total()
    d.packet(replace(template(text), ip_options=bytes((1, 1, 1, 1))), POST)
    assert d.kernel.counters.total() == before
    assert flow.tracker.client_ended or flow.tracker.server_ended


def test_what_changes_how_a_connection_stands_visits_the_worker() -> None:
    d = datapath()
    flow = connected(d)
    assert by(d, PRE, "C:40000 > K:80 [S]", "S:80 > C:45678 [FR.]") == ["worker"] * 2
    assert by(d, PRE, "C:40000 > K:80 [R]", "S:80 > C:45678 [S]") == ["worker"] * 2
    assert flow.state is State.ESTABLISHED
    for text in ("K:45678 > S:80 [R]", "K:16000 > C:40000 [R.]"):
        d = datapath()
        flow = connected(d)
        assert by(d, POST, text) == ["worker"]
        assert flow.state is State.CLOSING


def test_a_forwarded_connection_is_offloaded_when_it_is_established() -> None:
    d = datapath()
    flow = forwarded(d)
    assert handed(d, flow) == BOTH
    assert by(d, PRE, "C:40000 > K:443 [P.]", "C:40000 > K:443 [F.]") == ["kernel", "worker"]
    assert by(d, POST, "S:443 > C:40000 [P.]", "S:443 > C:40000 [F.]") == ["kernel", "worker"]
    assert flow.state is State.CLOSING


def test_a_direction_of_udp_is_offloaded_when_it_is_busy() -> None:
    d = datapath()
    flow = asked(d, times=BUSY - 1)
    assert handed(d, flow) == frozenset()
    assert by(d, PRE, *["C:4000 > K:53"] * 3) == ["worker", "kernel", "kernel"]
    assert handed(d, flow) == {Step.U12}
    assert by(d, POST, *["S:53 > C:4000"] * 2) == ["worker", "kernel"]
    assert handed(d, flow) == BOTH


@pytest.mark.parametrize(("client", "source"), [("C", Source.RELAY), ("N", Source.CLIENT)])
def test_udp_with_the_relays_address_takes_four_steps(client: str, source: Source) -> None:
    """By the setting, or since the client is beside the server."""
    d = datapath(source=source)
    coming = f"{client}:4000 > K:53", "S:53 > K:4000"
    going = f"{client}:4000 > S:53", f"S:53 > {client}:4000"
    for _ in range(BUSY):
        for pre, post in zip(coming, going, strict=True):
            by(d, PRE, pre)
            by(d, POST, post)
    (flow,) = d.nat
    assert handed(d, flow) == {Step.U1, Step.U2, Step.U3, Step.U4}
    assert by(d, PRE, *coming) == ["kernel"] * 2
    assert by(d, POST, *going) == ["kernel"] * 2


def test_with_the_relays_address_a_connection_changes_nothing_towards_the_server() -> None:
    d = datapath(source=Source.RELAY)
    flow = opened(d)
    attach(d)
    assert handed(d, flow) == ALL
    assert by(d, POST, "K:45678 > S:80 [S]", "K:45678 > S:80 [.]") == ["kernel"] * 2
    assert by(d, PRE, "S:80 > K:45678 [S.]") == ["kernel"]


def test_clients_own_connections_stay_with_the_worker() -> None:
    d = datapath()
    connected(d)
    assert by(d, PRE, *["C:45678 > S:80 [.]"] * 5) == ["worker"] * 5
    moved = next(flow for flow in d.nat if flow.service == flow.server)
    d.offload.changed(moved)
    d.turn()
    assert handed(d, moved) == frozenset()


def test_what_the_worker_has_rewritten_is_not_rewritten_again() -> None:
    """To the client it reads as an answer of the other flow, which the kernel rewrites."""
    d = datapath()
    flow = forwarded(d)
    assert handed(d, flow) == BOTH
    moved = d.packet(template("C:40000 > S:443 [S]"), PRE)
    assert isinstance(moved, bytes)
    port = int.from_bytes(moved[20:22])
    assert port != 40000
    by(d, POST, f"S:443 > C:{port} [S.]")
    answer = d.packet(template(f"S:443 > C:{port} [P.]"), POST)
    assert answer == template("S:443 > C:40000 [P.]").build()
    of_the_other = d.packet(template("S:443 > C:40000 [P.]"), POST)
    assert of_the_other == template("K:443 > C:40000 [P.]").build()


def test_what_changes_a_port_beside_is_offloaded_too() -> None:
    """A port that was taken: two connections of a client would meet at the gateway port."""
    d = datapath(tcp=frozenset({80, 8080}))
    connected(d)
    assert by(d, PRE, "C:40000 > K:8080 [S]", "C:40000 > K:8080 [.]") == ["worker", "kernel"]
    flow = next(flow for flow in d.nat if flow.service.port == 8080)
    assert flow.inside is not None
    assert flow.inside != flow.client
    request = Open(1, flow.inside, 16000, at("K:46000"))
    d.relays.handle(request, d.tcp_relay, 0)
    d.turn()
    assert handed(d, flow) == ALL
    got = d.packet(template("C:40000 > K:8080 [P.]"), PRE)
    assert got == template(f"C:{flow.inside.port} > K:16000 [P.]").build()
    back = d.packet(template(f"K:16000 > C:{flow.inside.port} [P.]"), POST)
    assert back == template("K:8080 > C:40000 [P.]").build()

    asked(d)
    assert by(d, PRE, *["C:4000 > G:53"] * (BUSY + 1)) == ["worker"] * BUSY + ["kernel"]
    other = next(flow for flow in d.nat if flow.service == at("G:53"))
    assert handed(d, other) == {Step.U12}


# When they are withdrawn


def test_a_forwarded_connection_that_is_over_is_withdrawn_or_never_offloaded() -> None:
    d = datapath()
    flow = forwarded(d)
    assert handed(d, flow) == BOTH
    by(d, PRE, "C:40000 > K:443 [F.]")
    assert handed(d, flow) == BOTH
    by(d, POST, "S:443 > C:40000 [F.]")
    assert handed(d, flow) == frozenset()
    assert by(d, PRE, *["C:40000 > K:443 [.]"] * 5) == ["worker"] * 5
    d.offload.traced(lambda flow: False)  # all is thought about anew
    d.turn()
    assert handed(d, flow) == frozenset()


def test_a_reset_withdraws_all_until_an_end_says_that_it_lives() -> None:
    d = datapath()
    flow = connected(d)
    by(d, PRE, "S:80 > C:45678 [R]")  # its number is tcp-relay's host's to judge
    assert handed(d, flow) == ALL
    by(d, POST, "K:16000 > C:40000 [R]")
    assert handed(d, flow) == frozenset()
    assert by(d, PRE, "C:40000 > K:80 [.]") == ["worker"]
    assert flow.state is State.ESTABLISHED
    assert handed(d, flow) == ALL


def test_what_came_before_a_reset_is_not_forgotten_with_it() -> None:
    """The server's answer went past the worker, and the RST came before anybody looked."""
    d = datapath()
    flow = opened(d)
    attach(d)
    assert by(d, PRE, "S:80 > C:45678 [S.]") == ["kernel"]
    by(d, POST, "K:16000 > C:40000 [R]")
    by(d, PRE, "C:40000 > K:80 [.]")

    assert flow.state is State.ESTABLISHED


def test_each_reset_of_a_connection_that_ends_counts_anew() -> None:
    """RFC 7857, section 2.2.  An end that says something between them is seen to do so."""
    d = datapath()
    flow = connected(d)
    by(d, POST, "K:45678 > S:80 [F.]", "K:16000 > C:40000 [F.]")
    for d.now in (10, 20):
        by(d, POST, "K:45678 > S:80 [R]")
        assert by(d, PRE, "S:80 > C:45678 [.]") == ["worker"]
    by(d, POST, "K:45678 > S:80 [R]")

    assert flow.reset_at == 20


def test_a_closed_connection_retires_when_its_last_packets_are_through() -> None:
    d = datapath()
    flow = connected(d)
    d.now = 10
    close(d)
    assert (
        d.offload.due(10 + LINGER - 0.1, 0.1) == []
    )  # what it counts is told when it is withdrawn
    assert d.offload.accounting.flows == 1
    d.turn()
    assert handed(d, flow) == ALL
    assert by(d, PRE, "S:80 > C:45678 [.]") == ["kernel"]
    d.offload.due(10 + LINGER, 0.1)
    d.turn()
    assert handed(d, flow) == frozenset()
    assert by(d, PRE, *["S:80 > C:45678 [.]"] * 5) == ["worker"] * 5
    assert shown(flow)[0][1] == 7  # with the SYN-ACK and that in between
    assert d.offload.due(10 + LINGER, 0.1) == []
    assert d.offload.accounting.flows == 0


def test_a_connection_that_gives_up_its_port_is_withdrawn() -> None:
    """From that port tcp-relay couldn't connect."""
    d = datapath()
    flow = opened(d)
    attach(d)
    attach(d, relay="K:45679")
    assert handed(d, flow) == ALL
    assert by(d, POST, "K:45679 > S:80 [S]", "K:45679 > S:80 [.]") == ["kernel"] * 2
    assert by(d, POST, "K:45678 > S:80 [S]") == ["PASS"]
    d.nat.detach(flow)
    d.turn()
    assert handed(d, flow) == frozenset()
    assert len(d.kernel) == 0


def test_a_killed_flow_is_withdrawn_before_the_ends_are_told() -> None:
    d = datapath()
    flow = forwarded(d)
    d.nat.kill(flow, 0)
    assert d.offload.has_withdrawals
    d.turn()
    assert handed(d, flow) == frozenset()
    assert by(d, PRE, "C:40000 > K:443 [P.]") == ["DROP"]
    udp = asked(d)
    d.nat.end(udp)
    d.turn()
    assert len(d.kernel) == len(d.offload) == 0


def test_flows_that_are_traced_and_no_others_are_the_workers() -> None:
    d = datapath()
    flow, other = connected(d), connected(d, "D:40000", "K:45679")
    udp = asked(d)
    d.offload.traced(lambda flow: flow.client.addr == addr("C"))
    d.turn()
    assert [handed(d, each) for each in (flow, other, udp)] == [frozenset(), ALL, frozenset()]
    assert by(d, PRE, *["C:4000 > K:53"] * 9) == ["worker"] * 9
    late = asked(d, "C:5000", 2 * BUSY)
    assert handed(d, late) == frozenset()
    d.offload.traced(lambda flow: False)
    d.turn()
    assert [handed(d, each) for each in (flow, other, udp, late)] == [ALL, ALL, BOTH, BOTH]


def test_room_is_made_by_what_is_withdrawn_and_each_step_has_its_own() -> None:
    d = datapath(room=2)
    flows = [asked(d, f"C:{port}") for port in (4000, 4001, 4002)]
    assert [bool(handed(d, flow)) for flow in flows] == [True, True, False]
    connection = connected(d)
    assert handed(d, connection) == ALL
    d.nat.end(flows[0])
    d.turn()
    assert by(d, PRE, *["C:4002 > K:53"] * (BUSY + 1)) == ["worker"] * BUSY + ["kernel"]
    assert handed(d, flows[2]) == BOTH


def test_nothing_is_offloaded_where_there_is_no_map() -> None:
    d = datapath(room=0)
    flow, other = connected(d), asked(d)
    close(d)
    assert (len(d.offload), d.offload.accounting.flows, d.pending) == (0, 0, False)
    assert d.offload.changes(10) is None
    assert not d.offload.accounting._closed, "closed connections pile up"
    d.offload.begin(5)  # the kernel isn't told: its map isn't there
    changes = d.offload.changes(10)
    assert changes is not None
    assert changes.installed == list(other.rewrites.values())
    d.offload.end()
    assert (len(d.offload), d.offload.capacity, d.offload.changes(10)) == (0, 0, None)
    assert flow.closed_at is not None


def test_a_map_that_is_made_anew_gets_all_that_should_be_in_it() -> None:
    d = datapath()
    flow, udp = connected(d), asked(d)
    by(d, PRE, *["C:4000 > K:53"] * 3)
    d.restart()
    assert handed(d, flow) == ALL
    assert handed(d, udp) == BOTH
    assert by(d, PRE, "C:4000 > K:53") == ["kernel"]
    d.count([udp])
    assert shown(udp)[0] == [BUSY + 4, BUSY]


def test_what_the_kernel_has_learnt_by_itself_is_not_offloaded() -> None:
    """The table makes flows of it to be shown, which have no packets."""
    d = datapath()
    d.nat.dns_flows.learns(d.policy.own, d.policy.server)
    query = flow_key(at("C:4000"), at("K:53"))
    d.nat.learning.learn([(False, 60, query)] + [(True, 60, query)] * BUSY, 0)
    assert len(d.nat) == 1
    d.offload.traced(lambda flow: False)
    d.restart()
    assert (len(d.offload), d.offload.changes(10)) == (0, None)
    adopted = d.nat.learning.adopt(query, 0)
    d.restart()
    assert adopted is not None
    assert handed(d, adopted) == {Step.U34}


# Who else connects from tcp-relay's ports


def test_tcp_relay_begins_a_connection_past_the_worker_and_nobody_after_it() -> None:
    d = datapath()
    flow = opened(d)
    attach(d)
    assert by(d, POST, "K:45678 > S:80 [S]") == ["kernel"]
    assert flow.leg == 1000
    assert by(d, POST, "K:45678 > S:80 [S]") == ["kernel"]  # it is sent again
    assert by(d, POST, "K:45678 > S:80 [.]") == ["kernel"]
    assert by(d, POST, "K:45678 > S:80 [S!]") == ["PASS"]
    assert handed(d, flow) == frozenset()
    assert flow.closed_at is not None
    assert by(d, POST, "K:45678 > S:80 [.]") == ["PASS"]


@pytest.mark.parametrize("how", ["closed", "died", "died early", "closed early"])
def test_no_map_takes_a_strangers_syn_for_a_late_packet(how: str) -> None:
    d = datapath()
    flow = opened(d)
    attach(d)
    if not how.endswith("early"):
        by(d, POST, "K:45678 > S:80 [S]", "K:45678 > S:80 [.]")
    if how.startswith("closed"):
        close(d)
    else:
        for who in list(d.relays._owner.values()):
            d.relays.lost(who, 0)
    assert by(d, POST, "K:45678 > S:80 [S!]", "K:45678 > S:80 [.]") == ["PASS"] * 2
    assert by(d, PRE, "S:80 > C:45678 [S.]") == ["PASS"]
    assert handed(d, flow) == frozenset()


def test_nobody_begins_past_the_worker_with_the_port_of_a_connection_taken_up_again() -> None:
    d = datapath()
    flow = connected(d)
    (who,) = set(d.relays._owner.values())
    d.relays.lost(who, 0)
    flow.orphaned = False  # it is back
    assert by(d, POST, "K:45678 > S:80 [.]") == ["kernel"]
    assert by(d, POST, "K:45678 > S:80 [S!]") == ["PASS"]


# Ports that are used again


def test_a_port_that_is_used_again_is_the_new_connections_at_once() -> None:
    """The old element would rewrite its packets, and the new one be refused."""
    d = datapath()
    flow = connected(d)
    by(d, PRE, "C:40000 > K:80 [F.]", "S:80 > C:45678 [F.]")
    close(d)
    assert handed(d, flow) == ALL
    d.set(replace(d.policy, gport=17000))
    assert by(d, PRE, "C:40000 > K:80 [S]") == ["worker"]
    assert handed(d, flow) == frozenset()
    again = d.nat.mappings.accepted(at("C:40000"), 17000)
    assert again is not None
    assert handed(d, again) == {Step.T1, Step.T2}
    got = d.packet(template("C:40000 > K:80 [.]"), PRE)
    assert isinstance(got, bytes)
    assert int.from_bytes(got[22:24]) == 17000
    d.offload.changed(flow)
    by(d, POST, *["K:16000 > C:40000 [.]"] * BUSY)
    d.turn()
    assert handed(d, flow) == frozenset()
    assert handed(d, again) == {Step.T1, Step.T2}


@pytest.mark.parametrize("room", [0, 100])
def test_who_was_taken_for_a_former_connection_and_tries_again_keeps_its_port(room: int) -> None:
    """The relay's host remembers that one, and what it answers is reset by the client."""
    d = datapath(room)
    by(d, PRE, "C:40000 > K:80 [S]")
    by(d, POST, "K:16000 > C:40000 [.]")
    by(d, PRE, "C:40000 > K:80 [R]", "C:40000 > K:80 [S]")
    (flow,) = d.nat
    assert flow.inside == flow.client
    assert handed(d, flow) == ({Step.T1, Step.T2} if room else frozenset())
    by(d, PRE, "C:40000 > K:80 [.]")  # which that host may reset, if it is of nothing it knows
    by(d, POST, "K:16000 > C:40000 [R]")
    by(d, PRE, "C:40000 > K:80 [S]")
    (again,) = d.nat
    assert again is not flow
    assert again.inside == again.client  # so that whoever has forged one of these changes nothing


@pytest.mark.parametrize("room", [0, 100])
def test_a_port_that_is_used_again_before_tcp_relay_has_closed_is_for_its_host_to_judge(
    room: int,
) -> None:
    d = datapath(room)
    flow = connected(d)
    by(d, PRE, "C:40000 > K:80 [F.]", "S:80 > C:45678 [F.]")
    by(d, POST, "K:45678 > S:80 [F.]", "K:16000 > C:40000 [F.]")
    assert flow.state is State.CLOSING
    assert by(d, PRE, "C:40000 > K:80 [S]") == ["worker"]
    assert list(d.nat) == [flow]
    attach(d, relay="K:45679")  # it has accepted that, before krelay hears that the former is over
    former, again = d.nat
    assert (former, again.client, again.inside) == (flow, flow.client, flow.inside)
    by(d, POST, "K:45678 > S:80 [R]", "K:45679 > S:80 [S]")
    close(d)
    assert (flow.state, again.closed_at) == (State.CLOSED, None)


def test_a_relay_port_that_is_used_again_never_carries_the_former_clients_address() -> None:
    """tcp-relay connects as soon as it has its answer, when the old element must be gone."""
    d = datapath()
    flow = connected(d)
    close(d)
    other = opened(d, "D:50000")
    d.told = 0
    request = Open(1, at("D:50000"), 16000, at("K:45678"))
    answer = d.relays.handle(request, d.tcp_relay, 0)
    assert isinstance(answer, Opened)
    assert handed(d, flow) == frozenset()  # no turn has ended since
    assert d.told == 1
    got = d.packet(template("K:45678 > S:80 [S]"), POST)
    assert isinstance(got, bytes)
    assert got[12:16] == addr("D")
    d.turn()
    assert handed(d, other) == ALL


def test_a_flow_is_withdrawn_before_another_with_its_addresses_is_offloaded() -> None:
    d = datapath()
    flow = asked(d)
    for most in (1, 2, 10):
        d.nat.end(flow)
        d.pending = False  # many are waiting, and none is told for a while
        flow = asked_apart(d)
        assert [len(each) for each in both(d.offload.changes(1))] == [1, 0]
        d.pending = True
        d.turn(most)
        assert handed(d, flow) == BOTH


def asked_apart(d: Datapath, client: str = "C:4000") -> Flow:
    """As `asked`, while the kernel is told of nothing."""
    for _ in range(BUSY):
        for hook, text in ((PRE, f"{client} > K:53"), (POST, f"S:53 > {client}")):
            d.worker.handle(template(text).build(), hook, d.now)
    return next(flow for flow in d.nat if flow.client == at(client))


def both(changes: Changes | None) -> tuple[list[Rewrite], list[Rewrite]]:
    assert changes is not None
    return changes.withdrawn, changes.installed


# What the kernel is told


def test_changes_come_in_pieces() -> None:
    d = datapath()
    flows = [asked_apart(d, f"C:{port}") for port in range(4000, 4010)]
    sizes = []
    while (changes := d.offload.changes(6)) is not None:
        sizes.append(len(changes.installed))
        d.offload.told(changes, [], 0)
    assert sizes == [6, 6, 6, 2]
    assert len(d.offload) == 20
    for flow in flows:
        d.nat.end(flow)
    newer = [asked_apart(d, f"D:{port}") for port in range(4000, 4002)]
    found = []
    while (changes := d.offload.changes(6)) is not None:
        d.pending = False
        found.append((len(changes.withdrawn), len(changes.installed)))
        d.offload.told(changes, [], 0)
        assert d.pending is (d.offload.has_withdrawals or found[-1][0] == 6)
    assert found == [(6, 0), (6, 0), (6, 0), (2, 4)]
    assert d.offload.accounting.installed_of(newer) == [
        r for flow in newer for r in flow.rewrites.values()
    ]


def test_what_ended_before_the_kernel_was_told_of_it_never_reaches_it() -> None:
    d = datapath()
    flow = asked_apart(d)
    assert len(d.offload) == 2
    d.nat.end(flow)
    assert len(d.offload) == 0
    d.kernel.change = pytest.fail  # type: ignore[method-assign, assignment]
    d.turn()


def test_what_is_wanted_again_before_the_kernel_was_told_stays_there_and_is_looked_at() -> None:
    d = datapath()
    flow = asked(d)
    by(d, PRE, *["C:4000 > K:53"] * 3)
    d.offload.traced(lambda flow: True)
    assert d.offload.due(0, 1) == []  # the ring has let it go
    d.offload.traced(lambda flow: False)
    assert d.offload.changes(10) is None
    assert d.offload.due(0, 1) == [flow]
    d.count([flow])
    assert shown(flow)[0] == [BUSY + 3, BUSY]


def test_counts_are_right_when_a_rewrite_is_withdrawn_and_offloaded_again() -> None:
    d = datapath()
    flow = asked(d)
    size = len(template("C:4000 > K:53").build())
    for number in range(1, 6):
        by(d, PRE, *["C:4000 > K:53"] * 3)
        if number % 2:
            d.count([flow])
        d.offload.traced(lambda flow: True)
        d.turn()
        assert shown(flow)[0][0] == BUSY + 4 * number - 1
        by(d, PRE, "C:4000 > K:53")
        d.offload.traced(lambda flow: False)
        d.turn()
        assert handed(d, flow) == BOTH
    assert shown(flow) == ([BUSY + 20, BUSY], [(BUSY + 20) * size, BUSY * size])


def test_what_ended_meanwhile_may_be_told_of() -> None:
    d = datapath()
    flow, other = asked(d), asked(d, "D:4000")
    rewrites = d.offload.accounting.installed_of([flow, other])
    counts = [(rewrite, Counted(5, 500, 6.5)) for rewrite in rewrites]
    before = shown(other)[0]
    d.nat.end(flow)
    d.offload.accounting.read(counts, 7)
    assert shown(other)[0] == [n + 5 for n in before]
    assert other.seen_at == 6.5
    d.offload.accounting.read([(other.rewrites[Step.U12], Counted(6, 600, 8.0))], 7)
    assert other.seen_at == 7  # not in the future
    changes = d.offload.changes(10)
    assert changes is not None
    d.offload.told(changes, counts[:2], 8)
    assert len(d.nat) == 1
    assert d.offload.accounting.installed_of([flow]) == []


# Looking in turns


def test_each_flow_has_its_turn_within_its_bound_while_others_come_and_go() -> None:
    rng = Random(3)
    d = datapath(room=10_000)
    d.nat.limits = FlowLimits(100_000, 100_000)
    flows: list[Flow] = []
    seen: dict[Flow, float] = {}
    now, every, number = 0.0, 0.1, 0
    for _ in range(200):
        now += every
        for _ in range(rng.randrange(40)):
            number += 1
            client = Endpoint(bytes((10, 0, *number.to_bytes(2))), 4000)
            flow = d.nat.open_forwarded(
                Proto.UDP, client, at("K:53"), at("S:53"), Source.CLIENT, now
            )
            flow.rewrites[Step.U12].packets = BUSY
            d.offload.changed(flow)
            flows.append(flow)
            seen[flow] = now
        rng.shuffle(flows)
        for flow in flows[: rng.choice((0, 5, 60))]:
            d.nat.end(flow)
            flows.remove(flow)
        d.turn()
        looked = d.offload.due(now, every)
        assert len(looked) <= POLLS_PER_SECOND * every
        for flow in looked:
            seen[flow] = now
        bound = max(1.0, len(d.offload.accounting._ring) / POLLS_PER_SECOND) + 2 * every
        assert all(now - seen[flow] <= bound for flow in flows)
    for flow in flows:
        d.nat.end(flow)
    d.turn()
    while d.offload.accounting.flows:
        assert d.offload.due(now, every) == []
    waiting, accounting = d.offload, d.offload.accounting
    assert not any((accounting._ring, accounting._closed, accounting.installed))
    assert not any((waiting._withdrawn, waiting._waiting, waiting._first, waiting._whole))
    assert not +d.offload._filled


def test_flows_that_have_ended_take_nobodys_turn() -> None:
    d = datapath(room=10_000)
    d.nat.limits = FlowLimits(100_000, 100_000)
    many = int(POLLS_PER_SECOND * 0.1)
    gone = [asked_once(d, number) for number in range(3 * many)]
    alive = [asked_once(d, number) for number in range(3 * many, 4 * many)]
    for flow in gone:
        d.nat.end(flow)
    d.turn()
    assert d.offload.due(0, 0.1) == alive


def asked_once(d: Datapath, number: int) -> Flow:
    """A flow that is offloaded though it hasn't said so much."""
    client = Endpoint(bytes((10, 0, *number.to_bytes(2))), 4000)
    flow = d.nat.open_forwarded(Proto.UDP, client, at("K:53"), at("S:53"), Source.CLIENT, 0)
    flow.rewrites[Step.U12].packets = BUSY
    d.offload.changed(flow)
    d.turn()
    return flow


def test_a_flow_goes_when_it_would_have_gone_by_the_time_of_its_last_packet() -> None:
    d = datapath()
    flow = asked(d)
    timeout = d.nat.timeouts.udp_dns
    d.now = 15
    assert by(d, PRE, "C:4000 > K:53") == ["kernel"]
    d.now = 16
    assert by(d, PRE, "C:4000 > K:53") == ["kernel"]
    d.now = timeout + 1.5
    assert d.nat.expire(d.now) == []  # it is looked at first
    assert flow.seen_at == 16
    assert d.nat.expire(16 + timeout - 0.1) == []
    assert d.nat.expire(16 + timeout + 1) == [flow]
    d.turn()
    assert len(d.kernel) == 0


@pytest.mark.parametrize("spoke", ["before", "after"])
def test_who_speaks_past_the_worker_after_an_answer_is_confirmed_when_it_matters(
    spoke: str,
) -> None:
    """The kernel can't tell when it saw a packet, and hasn't been asked for a while."""
    d = datapath(udp=frozenset({7}))
    d.nat.limits = FlowLimits(flows=2)
    by(d, PRE, *["C:4000 > K:7"] * BUSY)
    (flow,) = d.nat
    by(d, PRE, "D:4000 > K:7")
    if spoke == "before":
        assert by(d, PRE, *["C:4000 > K:7"] * 2) == ["kernel"] * 2
    assert by(d, POST, "S:7 > C:4000") == ["worker"]
    if spoke == "after":
        assert by(d, PRE, "C:4000 > K:7") == ["kernel"]
    assert not flow.spoke_again
    assert by(d, PRE, "D:5000 > K:7") == ["worker"]
    if spoke == "before":
        assert {each.client for each in d.nat} == {at("D:4000"), at("D:5000")}
    else:
        assert {each.client for each in d.nat} == {at("C:4000"), at("D:5000")}
        assert flow.spoke_again


@pytest.mark.parametrize("when", [EXCHANGE - 0.1, EXCHANGE])
def test_an_exchange_that_goes_on_past_the_worker_is_confirmed_by_its_duration(
    when: float,
) -> None:
    d = datapath(udp=frozenset({7}))
    d.nat.limits = FlowLimits(flows=1)
    by(d, PRE, "C:4000 > K:7")
    by(d, POST, *["S:7 > C:4000"] * BUSY)
    d.now += when
    assert by(d, POST, "S:7 > C:4000") == ["kernel"]
    by(d, PRE, "D:5000 > K:7")
    confirmed = when >= EXCHANGE
    assert {each.client for each in d.nat} == {at("C:4000" if confirmed else "D:5000")}


# Whether anybody can tell


class Twins:
    """The same traffic, with the kernel before the worker and without.  Nothing may differ.

    `lazy`: what the kernel has counted is read only when it is asked for, or its turn has come.
    Otherwise it is read before time passes.
    """

    asked = "KKG"
    """Which of the relay's addresses clients ask."""

    def __init__(self, seed: int, *, lazy: bool) -> None:
        self.rng = rng = Random(seed)
        self.lazy = lazy
        start = policy(
            tcp=frozenset({80, 8080, 443}), forwarded=frozenset({443}), udp=frozenset({53, 123})
        )
        limits = (
            FlowLimits() if lazy else FlowLimits(rng.choice((12, 65536)), rng.choice((6, 4096)))
        )
        self.slow = Datapath(start, 0, limits, seed)
        self.fast = Datapath(start, rng.choice((2, 1000)), limits, seed)
        self.both = (self.slow, self.fast)
        self.by_kernel = 0
        self.timeouts = Timeouts(*rng.choice(((9, 4, 6, 12), (300, 20, 240, 7440))))
        for each in self.both:
            each.nat.timeouts = self.timeouts

    def run(self, events: int) -> None:
        """So many things happen."""
        kinds = (
            (self.packet, 50), (self.stranger, 12), (self.accept, 8), (self.close, 3),
            (self.kill, 1), (self.abort, 1), (self.trace, 1), (self.setting, 1), (self.time, 12),
            (self.look, 5), (self.anew, 0.3),
        )  # fmt: skip
        for _ in range(events):
            (happens,) = self.rng.choices([k for k, _ in kinds], [w for _, w in kinds])
            happens()
        self.agree()

    def agree(self) -> None:
        """Flows, states, counts and totals are the same, once what was counted is read."""
        self.fast.count(self.fast.nat)
        self.fast.turn()
        slow, fast = ({flow.id: flow for flow in each.nat} for each in self.both)
        assert set(slow) == set(fast)
        for number, flow in slow.items():
            twin = fast[number]
            for field in ("state", "client", "service", "server", "relay", "inside", "closed_at"):
                assert getattr(flow, field) == getattr(twin, field), (flow, twin)
            assert shown(flow) == shown(twin), (flow, twin)
            assert flow.tracker == twin.tracker, (flow, twin)
            ends = [each.expires_at(self.timeouts) for each in (flow, twin)]
            assert (flow.seen_at, ends[0]) == (twin.seen_at, ends[1]), (flow, twin)
        assert self.slow.steps() == self.fast.steps()
        for name in ("passed", "dropped"):
            assert getattr(self.slow.worker.counts, name) == getattr(self.fast.worker.counts, name)
        assert self.slow.nat.admission.evicted == self.fast.nat.admission.evicted
        assert len(self.fast.kernel) == len(self.fast.offload)

    # What happens

    def send(self, packet: Template, hook: Hook) -> None:
        got = self.meets(packet, hook)
        if hook is PRE and isinstance(got, bytes) and got[16:20] not in self.slow.policy.own:
            self.meets(got, POST)

    def meets(self, packet: Template | bytes, hook: Hook) -> bytes | Verdict:
        got, twin = (each.packet(packet, hook) for each in self.both)
        assert got == twin, (packet, hook)
        answers = [each.worker.answers[:] for each in self.both]
        assert answers[0] == answers[1]
        for each in self.both:
            each.worker.answers.clear()
        return got

    def packet(self) -> None:
        """A packet of a flow that has a flow, or had one a moment ago."""
        flows = list(self.slow.nat)
        if not flows:
            return
        flow = self.rng.choice(flows[-8:])
        rewrites = list(flow.rewrites.values())
        flags = self.rng.choices(
            (ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN, SYN | ACK), (12, 9, 3, 1, 1, 2, 2)
        )[0]
        for rewrite in self.rng.choices(rewrites, k=self.rng.choice((1, 2, 6))):
            old = rewrite.old
            ends = [Endpoint(old[a : a + 4], int.from_bytes(old[p : p + 2])) for a, p in ENDS]
            hook = next(h for (h, _), t in self.slow.nat.tables.items() if t is rewrite.table)
            payload = self.rng.randbytes(self.rng.choice((0, 1, 9, 30)))
            odd = rewrite.step is not Step.T3 or flags & SYN == 0  # no host begins so by itself
            options = b"\1\1\1\0" if odd and self.rng.random() < 0.1 else b""
            proto = self.rng.choice(list(Proto)) if self.rng.random() < 0.1 else flow.proto
            five_tuple = FiveTuple(proto, ends[0], ends[1])
            size = 1 if flags & SYN else len(payload) + (flags & FIN)
            packet = Template(five_tuple, payload, flags, 1001 - size, 1001)  # as packets.template
            if rewrite.step is Step.T3 and flags == SYN and flow.closed_at is not None:
                packet = replace(packet, seq=0x50000000)  # another program's
            self.send(replace(packet, ip_options=options), hook)

    def stranger(self) -> None:
        """A client begins something, or talks to the server itself."""
        rng = self.rng
        client = Endpoint(bytes((10, 0, 0, rng.choice((1, 1, 2)))), 40000 + rng.randrange(4))
        service = Endpoint(addr(rng.choice(self.asked)), rng.choice((80, 8080, 443, 53, 123)))
        if rng.random() < 0.1:
            service = replace_addr(service, addr("S"))
        if rng.random() < 0.05:
            client = replace_addr(client, addr("N"))
        proto = Proto.UDP if service.port in (53, 123) else Proto.TCP
        self.send(Template(FiveTuple(proto, client, service), b"data", SYN), PRE)

    def accept(self) -> None:
        """tcp-relay asks for a connection that it has accepted."""
        flows = [flow for flow in self.slow.nat if flow.inside and flow.closed_at is None]
        if not flows:
            return
        flow = self.rng.choice(flows)
        port = self.rng.choice((40000, 40001, *range(50000, 50006)))
        assert flow.inside
        assert flow.gport
        held = self.slow.nat.mappings.of_relay_port(Endpoint(addr("K"), port))
        if held is not None and held.closed_at is None:
            return  # its host wouldn't have given it
        self.ask(Open(1, flow.inside, flow.gport, Endpoint(addr("K"), port)))

    def close(self) -> None:
        """tcp-relay has closed both legs."""
        flows = [flow for flow in self.slow.nat if flow.relay and flow.gport]
        if flows:
            flow = self.rng.choice(flows)
            assert flow.relay
            self.ask(Close(flow.relay))

    def ask(self, request: Open | Close) -> None:
        answers = [each.relays.handle(request, each.tcp_relay, each.now) for each in self.both]
        assert answers[0] == answers[1]
        for each in self.both:
            each.refresh()

    def kill(self) -> None:
        """Somebody ends a flow that has no tcp-relay."""
        for each, flow in self.one(lambda flow: flow.gport is None):
            if flow.is_forwarded:
                each.nat.kill(flow, each.now)
            else:
                each.nat.end(flow)

    def abort(self) -> None:
        """Somebody ends a connection of tcp-relay's."""
        for each, flow in self.one(lambda flow: flow.gport is not None):
            each.relays.abort(flow, each.now)

    def one(self, wanted: object) -> Iterable[tuple[Datapath, Flow]]:
        """A flow of either, and its twin; the kernel is told after that."""
        flows = [flow for flow in self.slow.nat if wanted(flow)]  # type: ignore[operator]
        if not flows:
            return
        number = self.rng.choice(flows).id
        for each in self.both:
            flow = each.nat.get(number)
            assert flow is not None
            yield each, flow
            each.refresh()

    def trace(self) -> None:
        """Somebody begins to trace, or has ended."""
        client = self.rng.choice((addr("C"), None))
        self.fast.offload.traced(lambda flow: flow.client.addr == client)
        self.fast.turn()

    def setting(self) -> None:
        rng, now = self.rng, self.slow.policy
        new = rng.choice(
            (
                replace(now, server=addr(rng.choice("SZ"))),
                replace(now, source=rng.choice(list(Source))),
                replace(now, gport=rng.choice((16000, 17000))),
            )
        )
        for each in self.both:
            if new.server != now.server:
                for flow in each.nat.unanswered():
                    each.nat.end(flow)
            each.set(new)

    def time(self) -> None:
        """Time passes, up to a few seconds of it, and flows go."""
        self.pass_time(self.rng.choice((1, 3, 7, 18, 40)))
        self.agree()

    def pass_time(self, steps: int) -> None:
        if not self.lazy:
            self.fast.count(self.fast.nat)
        for _ in range(steps):
            for each in self.both:
                each.now += STEP
            for each in self.both:
                each.count(each.offload.due(each.now, STEP))
                each.turn()
                each.nat.expire(each.now)
                each.relays.on_time(each.now)
                each.refresh()

    def look(self) -> None:
        """Somebody has some flows shown."""
        if not self.lazy:
            return
        flows = list(self.fast.nat)
        self.fast.count(self.rng.sample(flows, len(flows) // 2))

    def anew(self) -> None:
        """Somebody took the rules out."""
        self.fast.restart()


ENDS = ((0, 8), (4, 10))
STEP = 0.125
"""Seconds by which the clock goes on: a number that nanoseconds tell without a rest."""


def replace_addr(end: Endpoint, to: bytes) -> Endpoint:
    return end._replace(addr=to)


@given(st.integers(0, 2**32), st.booleans())
@example(7067, False)  # a SYN with ACK towards the server, and then the server's own
@example(260, True)  # the server is heard on a leg that tcp-relay gives up then
def test_nobody_can_tell_whether_the_kernel_has_rewritten_a_packet(seed: int, lazy: bool) -> None:
    Twins(seed, lazy=lazy).run(120)


def test_much_goes_past_the_worker_while_nobody_can_tell() -> None:
    """The traffic above is of use only if a good part of it is offloaded."""
    roomy = (twins for seed in range(99) if (twins := Twins(seed, lazy=True)).fast.room > 2)
    twins = next(roomy)
    twins.run(3000)
    total = sum(twins.slow.steps().values())
    assert total > 3000
    assert twins.fast.kernel.counters.total() > total / 8
    assert len(+twins.fast.kernel.counters) >= 12


def test_a_closed_flow_goes_when_it_would_have_gone() -> None:
    d = datapath()
    flow = connected(d)
    d.now = 100
    by(d, PRE, "C:40000 > K:80 [.]")
    close(d)
    assert flow.expires_at(d.nat.timeouts) == 100 + CLOSED_LINGER


# Ripening


def ripening(seen_at: float) -> tuple[OffloadPolicy, Flow]:
    """A flow of datagrams that is fit to be offloaded, and was heard of then."""
    nat = NatTable(rng=Random(1))
    fast = OffloadPolicy(nat)
    fast.begin(10)
    flow = nat.open_forwarded(Proto.UDP, at("C:4000"), at("K:7"), at("S:7"), Source.CLIENT, seen_at)
    flow.rewrites[Step.U12].packets = BUSY
    fast.changed(flow)
    return fast, flow


def test_a_silent_flow_is_offloaded_when_it_has_lasted() -> None:
    fast, flow = ripening(seen_at=10.0)

    assert fast.changes(10, 10.01) is None
    assert fast.changes(10, 10.01 + OFFLOAD_MIN_AGE - 0.001) is None
    assert fast.waits
    told = fast.changes(10, 10.01 + OFFLOAD_MIN_AGE)
    assert told == Changes([], [flow.rewrites[Step.U12]])
    assert not fast.waits


def test_a_busy_flow_is_offloaded_in_its_next_pause() -> None:
    fast, flow = ripening(seen_at=10.0)
    assert fast.changes(10, 10.0) is None
    now = 10.0 + OFFLOAD_MIN_AGE
    flow.rewrites[Step.U12].seen_at = now
    assert fast.changes(10, now + SILENCE / 2) is None

    assert fast.changes(10, now + SILENCE) is not None


def test_a_flow_without_pauses_is_offloaded_all_the_same() -> None:
    fast, flow = ripening(seen_at=10.0)
    assert fast.changes(10, 10.0) is None
    for now in (10.0 + OFFLOAD_MIN_AGE, 10.0 + OFFLOAD_MAX_WAIT - 0.001):
        flow.rewrites[Step.U12].seen_at = now
        assert fast.changes(10, now) is None
    flow.rewrites[Step.U12].seen_at = 10.0 + OFFLOAD_MAX_WAIT

    assert fast.changes(10, 10.0 + OFFLOAD_MAX_WAIT) is not None


def test_what_ends_before_it_is_ripe_never_was_the_kernels() -> None:
    fast, flow = ripening(seen_at=10.0)
    assert fast.changes(10, 10.0) is None
    fast.withdraw(flow)

    assert fast.changes(10, 20.0) is None
    assert len(fast) == 0


def beginning() -> tuple[OffloadPolicy, Flow]:
    """A connection for which tcp-relay has just got its port towards the server."""
    nat = NatTable(rng=Random(1))
    fast = OffloadPolicy(nat)
    fast.begin(10)
    flow = nat.open_tcp(at("C:4000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 10.0)
    nat.attach(flow, at("K:50000"), 10.0)
    return fast, flow


def test_a_connection_that_begins_is_offloaded_at_once() -> None:
    fast, flow = beginning()
    assert fast.is_urgent
    begun = [flow.rewrites[step] for step in (Step.T1, Step.T2, Step.T3, Step.T4)]

    assert fast.changes(2, None) == Changes([], begun[:2])
    assert fast.changes(10, None) == Changes([], begun[2:])
    assert not fast.is_urgent
    assert fast.changes(10, None) is None
    assert not fast.waits


def test_what_the_client_has_begun_to_send_must_ripen() -> None:
    nat = NatTable(rng=Random(1))
    fast = OffloadPolicy(nat)
    flow = nat.open_tcp(at("C:4000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 10.0)
    flow.rewrites[Step.T1].packets = 1
    fast.begin(10)
    assert not fast.is_urgent
    nat.attach(flow, at("K:50000"), 10.0)
    begun = [flow.rewrites[step] for step in (Step.T2, Step.T3, Step.T4)]

    assert fast.changes(10, None) == Changes([], begun)
    assert fast.changes(10, 10.0) is None
    assert fast.changes(10, 10.0 + OFFLOAD_MIN_AGE) == Changes([], [flow.rewrites[Step.T1]])
    assert not fast.waits


def test_a_connection_that_goes_on_is_offloaded_as_a_whole_when_it_has_lasted() -> None:
    fast, flow = beginning()
    flow.rewrites[Step.T3].packets = 1
    fast.withdraw(flow)
    fast.changed(flow)

    assert not fast.is_urgent
    assert fast.changes(10, 10.0) is None
    told = fast.changes(10, 10.0 + OFFLOAD_MIN_AGE)
    assert told is not None
    assert set(told.installed) == set(flow.rewrites.values())


def test_what_waits_when_its_connection_is_closed_is_never_offloaded() -> None:
    for before in (0, 2):
        fast, flow = beginning()
        if before:
            fast.changes(before, None)
        fast._nat.close(flow, 10.01)

        changes = fast.changes(10, 20.0)
        assert ([] if changes is None else changes.installed, len(fast)) == ([], 0)


def test_what_is_no_step_of_the_programs_stays_with_the_worker() -> None:
    d = datapath()
    connected(d)
    for _ in range(2 * BUSY):
        by(d, PRE, "C:45678 > S:80 [.]", "S:80 > C:45679 [.]")
    moved = next(flow for flow in d.nat if flow.service == flow.server)
    assert moved.rewrites.keys() == {Step.D1, Step.D2}
    assert not any(map(can_be_done, moved.rewrites.values()))
    assert not any(map(d.offload._install, moved.rewrites.values()))


# DSCP


def test_what_changes_its_dscp_is_withdrawn_before_and_offloaded_after() -> None:
    d = datapath()
    flow = connected(d)
    assert handed(d, flow) == ALL
    at_the_time: list[tuple[int, frozenset[Step]]] = []
    rewrite = flow.rewrites[Step.T4]
    observe(d.nat, marked=lambda _: at_the_time.append((rewrite.tos, handed(d, flow))))

    d.nat.tracking.mark(rewrite, 46 << 2, d.now)

    assert at_the_time == [(46 << 2, frozenset())]
    assert flow.dscps == (0, 46)
    d.now += 1
    d.turn()
    by(d, PRE, "C:40000 > K:80 [.]", "C:40000 > K:80 [.]")
    d.now += 1
    d.turn()
    assert handed(d, flow) == ALL


def test_what_any_port_may_answer_stays_with_the_worker() -> None:
    d = datapath()
    d.worker.policy = replace(d.worker.policy or policy(), any_port=frozenset({53}))
    flow = asked(d, times=3 * BUSY)

    assert flow.is_any_port
    assert handed(d, flow) == frozenset()
