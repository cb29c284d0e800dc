"""The krelay daemon: the file tree, the two sockets, signals, and relaying between them.

Everything is an event of one loop.  A file was written: the tree's state judges it, what is refused
is shown again, what is accepted is put in force (relaying.py), and the status files are published.
"""

import os
import resource
import select
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from random import SystemRandom

from knet import listeners, privileges, process, unixsock
from knet.collector import Collector
from knet.endpoint import Proto
from knet.log import Failures, Log, Throttle, lines_lost, stood_still
from knet.loop import Loop, Timer
from knet.privileges import Cap
from knet.rawsocket import RawSender
from knet.roles import ADMIN, RELAY, VIEW
from krelay.control import metrics, views
from krelay.control.metrics import CounterFigures
from krelay.control.server import ControlSocket
from krelay.control.views import Values
from krelay.daemon.keeper import CannotKeep, TreeKeeper
from krelay.daemon.relaying import Relaying
from krelay.datapath.worker import Worker
from krelay.host import netfilter, tracking
from krelay.host.links import LinkWatcher, LocalAddresses, Looker
from krelay.host.witness import Witness
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.registration import inforce
from krelay.registration.server import RelaySocket
from krelay.rules import DEFAULT_QUEUE
from krelay.steps import Step
from krelay.trace.lines import Filter
from procfs_sim.state import Outcome, TreeState, applied_text, errors_text
from procfs_sim.tree import SETTINGS, Config, in_force

NEEDED = (Cap.NET_ADMIN, Cap.NET_RAW)
"""What it takes to make rules, serve the queue and send packets."""
OF_USE = (*NEEDED, Cap.BPF)
"""With the last, flows are offloaded (krelay/offload); all else is given up once krelay serves.
docs/security.md says what was tried."""
TICK = 1.0
NICENESS = -5
"""Of this process (sched(7)): where it competes for a core, it gets three quarters of it."""
COUNTED_TOGETHER = 64
"""Flows for which the kernel is asked at once before they are shown."""
BLOCKS_OF_A_ROW = 36
"""Blocks of memory that a flow may have, with its rewrites and its places in the tables."""
LOOK_EVERY = 0.01
"""Seconds between looks at links, addresses and routes while they change, at least."""
LOOK_SHARE = 0.05
"""Of the time for which they change, at most, is taken by looks."""

_log = Log("daemon")


class CannotServe(Exception):
    """The daemon can't start.  The text says why and what to do."""


class Daemon:
    """krelay on the tree at `root`; relay.sock is for the group `relay_gid`.  Raises CannotServe.

    `witness` tells who listens where.  Implements what the control socket may ask (control.Relay).
    """

    def __init__(
        self,
        loop: Loop,
        root: Path,
        witness: Witness,
        queue_num: int = DEFAULT_QUEUE,
        relay_gid: int | None = None,
    ) -> None:
        self._loop = loop
        self._root = root
        self._witness = witness
        self._queue_num = queue_num
        self._began_at = loop.now
        self._exit_status = 0
        self._leaving = False
        self._sender = _raw_sender()
        self._looker, self._addresses = _looker()
        self._state = TreeState(host_check=self._host_check)
        try:
            self._keeper = TreeKeeper(loop, root, self._state, self._judged, self._status_texts)
        except CannotKeep as error:
            raise CannotServe(str(error)) from None
        self._looking: Timer | None = None
        self._look_at = 0.0
        """When to look at links again, at the earliest."""
        self.collector: Collector | None = None
        """Told of each second."""
        self._evicted = 0
        """Flows evicted when it was last said."""
        self._eviction_warning = Throttle()
        self.nat = NatTable(rng=SystemRandom())
        self._worker = Worker(self.nat)
        self._relaying = Relaying(
            loop,
            netfilter.instance(root),
            queue_num,
            self._worker,
            self._sender,
            self._looker,
            self._addresses,
            self._keeper.publish,
            self._keeper.left("status/resumable"),
            witness.holder,
        )
        self._relay_socket: RelaySocket | None = None
        try:
            outcome = self._keeper.begin()
            self._links = LinkWatcher()
            self._control = ControlSocket(loop, root, self, self._worker)
            self._relay_socket = RelaySocket(
                loop, root, self._relaying.relays, self._relaying.gateways, relay_gid
            )
        except OSError as error:
            raise CannotServe(f"cannot serve {root}: {error.strerror}") from None
        self._keeper.sockets = (*self._control.listeners, self._relay_socket)
        loop.add(self._links.fileno(), select.EPOLLIN, self._links_changed)
        loop.on_signal(signal.SIGTERM, self._leave)
        loop.on_signal(signal.SIGINT, self._interrupted)
        loop.on_signal(signal.SIGHUP, self._keeper.read_again)
        self._relaying.rules.clear_stale(self._state.config.start)
        self._take(outcome)
        self._relaying.settle(self._state.config, outcome.changed)
        self._keeper.publish()
        self._tick()

    def run(self) -> int:
        """Serves until a signal ends it; the exit status."""
        try:
            self._loop.run()
        finally:
            self._relaying.close()
            self._control.close()
            if self._relay_socket:
                self._relay_socket.close()
            self._keeper.close()
            self._links.close()
            self._sender.close()
            self._looker.close()
            self._addresses.close()
        _log.info("krelay ended")
        return self._exit_status

    # What the control socket asks

    def status(self) -> Values:
        """One value each of everything that is not a counter."""
        now = self._loop.now
        tcp = self.nat.count(Proto.TCP)
        return {
            "state": self._relaying.state,
            **self._retry(),
            "tree": self._keeper.state,
            "generation": self._state.generation,
            "uptime": round(now - self._began_at, 1),
            "flows": len(self.nat),
            "flows_tcp": tcp,
            "flows_udp": len(self.nat) - tcp,
            "flows_unconfirmed": self.nat.admission.unconfirmed,
            "own_flows": len(self.nat.own_flows),
            "traces": self._control.traces,
            "tcp_relays": len(self._relay_socket.pids) if self._relay_socket else 0,
            **views.tcp_status_values(self._relaying.relays.totals),
            "gateway_port": self._relaying.gateway,
            "rules": self._relaying.rules.made_by,
            "datapath": self._relaying.datapath,
            "own_packets": str(self._relaying.own_packets),
            "conntrack": tracking.in_words(self._state.config),
            "queue": self._queue_num,
            "queue_waiting": self._relaying.queues.waiting,
            **views.other_port_values(self._worker.other_ports),
            "recovering": round(max(0.0, self._worker.recovering_until - now), 1),
            "pid": os.getpid(),
        }

    def _retry(self) -> Values:
        """When relaying that has failed is tried again; nothing where it hasn't."""
        wait = self._relaying.attempts.retry_in(self._loop.now)
        return {} if wait is None else {"retry_in": round(wait, 1)}

    def counters(self) -> Values:
        """All counters since the daemon began; the kernel's, since relaying started.

        A tcp-relay's are since it began itself, which may be longer ago.
        """
        relaying = self._relaying
        self._catch_up()
        bound = relaying.queues.bound
        queue_overflow, socket_overflow = relaying.queues.dropped()
        return metrics.values(
            CounterFigures(
                self._worker.counts,
                self._steps(),
                evicted=self.nat.admission.evicted,
                own_flows_evicted=self.nat.own_flows.evicted,
                refused=self._worker.refused.top(),
                errors=sum(queue.errors for queue in bound),
                queue_overflow=queue_overflow,
                socket_overflow=socket_overflow,
                overflow_notices=sum(queue.overflows for queue in bound),
                copies_lost=relaying.kernel.lost,
                log_lines_lost=lines_lost(),
                own_packets_stopped=relaying.own_packets.stopped,
                tcp=relaying.relays.totals,
            )
        )

    def _catch_up(self) -> None:
        """Takes in what the kernel has told until now: figures that are shown are as of now."""
        self._relaying.kernel.queries.needs_queries()
        self._relaying.kernel.needs_ends()

    def _steps(self) -> list[int]:
        """Packets rewritten by each Step, by the worker and by the kernel."""
        by_kernel, by_worker = self._relaying.kernel.steps(), self._worker.counts.steps
        return [by_worker[step] + by_kernel[step] for step in Step]

    def config_in_force(self) -> Values:
        """The generation and each setting's text."""
        config = self._state.config
        return {"generation": self._state.generation} | {
            name: in_force(name, config) for name in SETTINGS
        }

    def counted(self, flows: Iterable[Flow]) -> Iterator[Flow]:
        """The same flows, with what the kernel has counted for them until now."""
        self._catch_up()
        every = iter(flows)
        while some := list(islice(every, COUNTED_TOGETHER)):
            self._relaying.kernel.count(some)
            yield from some

    def traced(self, filters: Sequence[Filter]) -> None:
        """Tracing moves the flows that one of these admits to the slow path while it runs."""
        self._relaying.trace(filters)

    def kill(self, flow: Flow) -> None:
        """Ends a flow: a TCP one by resetting both its legs."""
        self._relaying.flows.end(flow)

    def flush(self) -> int:
        """Ends the flows to any server but the one in force, like `kill`; how many those were."""
        flows = self.nat.elsewhere(self._state.config.real_ip.packed)
        for flow in flows:
            self._relaying.flows.end(flow)
        return len(flows)

    # The file tree

    def _judged(self, outcome: Outcome) -> None:
        self._take(outcome)
        # Written once more where relaying has failed: try again.
        again = "start" in outcome.judged and self._relaying.attempts.reason is not None
        if (outcome.changed or again) and not self._leaving:
            self._relaying.settle(self._state.config, outcome.changed)
        self._keeper.publish()

    def _take(self, outcome: Outcome) -> None:
        for name in sorted(outcome.changed):
            value = in_force(name, outcome.config)
            _log.info("value applied", file=name, value=value, generation=self._state.generation)
        for line in outcome.refused:
            _log.warning("value refused", reason=line)
        deadline = self._state.next_deadline()
        if deadline is not None:
            self._loop.call_at(deadline, self._keeper.late)

    def _host_check(self, _: Config, new: Config, changed: frozenset[str]) -> Mapping[str, str]:
        refused = {}
        if "real_ip" in changed:
            try:
                own = self._looker.look(new.real_ip).own
                address = new.real_ip.packed
                if address in own or self._addresses.has(address, self._loop.now):
                    refused["real_ip"] = f"{new.real_ip} is an address of this host"
            except OSError as error:
                refused["real_ip"] = f"this host's addresses can't be read ({error.strerror}), "
                refused["real_ip"] += f"so {new.real_ip} may be one; write it again"
        if "gport" in changed and (who := self._who_else_listens(new.gport)):
            refused["gport"] = f"port {new.gport} is in use by {who}"
        return refused

    def _who_else_listens(self, port: int) -> str | None:
        """The program that listens there, unless it is a tcp-relay: those follow gport faster.

        It only says what a person should know: whom clients are led to is another matter
        (gatewayports.py).
        """
        inodes = listeners.listening(port)
        if not inodes or self._relay_socket is None:
            return None
        holds = self._witness.holds_any
        if any(holds(pid, inodes) in (True, None) for pid in self._relay_socket.pids):
            return None
        return str(self._witness.holder(inodes) or "another program")

    def _status_texts(self) -> Mapping[str, str]:
        """What the status files are to show."""
        return {
            "status/state": self._relaying.state + "\n",
            "status/applied": applied_text(self._state.config, self._state.generation),
            "status/errors": errors_text(self._state.errors),
            "status/resumable": inforce.text(self._relaying.relays.in_force),
        }

    # Signals, links, the second

    def _leave(self) -> None:
        self._leaving = True
        self._relaying.stop(self._loop.stop)  # asked twice it ends at once

    def _interrupted(self) -> None:
        self._exit_status = 128 + signal.SIGINT
        self._leave()

    def _links_changed(self, _: int) -> None:
        self._links.drain()
        self._addresses.forget()
        if self._looking is None or not self._looking.pending:  # routes may change all the time
            self._looking = self._loop.call_at(max(self._loop.now, self._look_at), self._look)

    def _look(self) -> None:
        began = self._loop.clock()
        self._relaying.links_changed()
        ended = self._loop.clock()
        self._look_at = ended + max(LOOK_EVERY, (ended - began) / LOOK_SHARE)

    def _tick(self) -> None:
        now = self._loop.now
        self._loop.call_at(now + TICK, self._tick)  # first: the next comes, whatever fails here
        with ExitStack() as then:  # whatever fails
            then.callback(self._keeper.on_time)
            then.callback(self._control.on_time, now)
            then.callback(self._warn_of_evictions, now)
            if self.collector is not None:
                then.callback(self.collector.on_time, now)
            self._relaying.on_time(now)

    def _warn_of_evictions(self, now: float) -> None:
        """Warns while flows are evicted: it is a flood, or a limit is too low."""
        if self.nat.admission.evicted == self._evicted or self._eviction_warning.admit(now) is None:
            return
        _log.warning(
            "a limit is reached; unconfirmed flows are evicted",
            evicted=self.nat.admission.evicted - self._evicted,
            flows=len(self.nat),
            unconfirmed=self.nat.admission.unconfirmed,
        )
        self._evicted = self.nat.admission.evicted


def serve(root: Path, queue_num: int, witness: Witness, relay_gid: int | None = None) -> int:
    """Runs the daemon in the foreground; its exit status.  Raises CannotServe."""
    _hurry()
    _open_many()
    with Loop() as loop:
        failures = Failures(_log)
        loop.on_failure = lambda error: failures.tell(loop.now, "a call failed; going on", error)
        loop.on_absence = partial(stood_still, _log)
        daemon = Daemon(loop, root, witness, queue_num, relay_gid)
        _give_up(relay_gid)
        if (problem := process.tell_ready()) is not None:
            _log.warning("the service manager can't be told", error=problem)
        daemon.collector = Collector(lambda: len(daemon.nat) * BLOCKS_OF_A_ROW)
        return daemon.run()


def _hurry() -> None:
    """All clients' packets wait for this process, so it waits less for others than they for it.

    Unless it was started with a niceness of its own, or the kernel permits it none.
    """
    with suppress(PermissionError):
        if os.getpriority(os.PRIO_PROCESS, 0) == 0:
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _open_many() -> None:
    """As many descriptors as this process may have, so that connections are what limits them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _looker() -> tuple[Looker, LocalAddresses]:
    try:
        return Looker(), LocalAddresses()
    except OSError as error:
        raise CannotServe(f"this host's links can't be looked at: {error.strerror}") from None


def _give_up(relay_gid: int | None) -> None:
    """What krelay doesn't need to go on.

    It gives new sockets to these groups: who is in a group needs no capability for that.
    """
    if os.geteuid() == 0:
        ours = {unixsock.group_id(role.group) for role in (RELAY, ADMIN, VIEW)} | {relay_gid}
        try:
            os.setgroups(sorted(group for group in ours if group is not None))
        except OSError as error:  # in a user namespace, or without CAP_SETGID
            _log.info("supplementary groups stay as they are", error=error)
    privileges.give_up(OF_USE, for_programs=True)


def _raw_sender() -> RawSender:
    held = privileges.capabilities()
    if wanting := [f"CAP_{cap.name}" for cap in NEEDED if not held >> cap & 1]:
        raise CannotServe(
            "needs root, or CAP_NET_ADMIN and CAP_NET_RAW, for the rules and the queue; "
            f"{' and '.join(wanting)} {'are' if len(wanting) > 1 else 'is'} wanting; try sudo"
        )
    return RawSender()
