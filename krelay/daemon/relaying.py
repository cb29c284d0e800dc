"""Relaying itself: the queue and the rules, in force or not, and what new flows get.

There are three phases:

    stopped    no rules, no queue
    running    both; the queue is bound before the rules are in, so that no packet waits for nobody
    stopping   nothing new is relayed, tcp-relay resets its connections, the rules stay until the
               last of these resets is through, STOP_WITHIN at most

A killed krelay leaves its rules; while nobody serves the queue the kernel drops what they catch.
The next krelay binds the queue, puts its rules in their place in one step, and for RECOVERY seconds
drops what it can't assign yet, until tcp-relay has resumed its connections.

Clients of TCP are led to tcp-relay from when it has handed over its listening socket
(gatewayport.py) until its connection to the relay socket is lost.  Where another program has the
gateway port when relaying begins, it fails, and begins by itself when the port is free.

What is in force follows from the config, the flows that live and the links of this host; whichever
of them has changed, the same few functions derive the rules and the policy again, and nothing is
done where the result is the same as before.
"""

import select
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address

from knet import descriptors, listeners
from knet.endpoint import Endpoint, Proto, Source
from knet.listeners import Holder
from knet.log import Failures, Log, Throttle
from knet.loop import PAUSE, Loop, Timer
from knet.netlink import sockdiag
from knet.rawsocket import RawSender
from knet.rules.watch import RuleWatcher
from krelay.datapath.nfqueue import Queue, QueueUnavailable, figures, figures_shown
from krelay.datapath.worker import AWAY_GRACE, Policy, Worker, asks, probes
from krelay.doctor import checks
from krelay.doctor.facts import Facts, Path
from krelay.host import netfilter
from krelay.host.links import LOOPBACK, HostView, LocalAddresses, Looker
from krelay.host.netfilter import Backend, RulesDelayed, RulesUnavailable
from krelay.nat.admission import FlowLimits
from krelay.nat.events import IdleObserver
from krelay.nat.flow import Flow, Timeouts
from krelay.nat.table import NatTable
from krelay.offload.kernelpath import KernelPath
from krelay.registration.gatewayports import GatewayPorts
from krelay.registration.inforce import InForce
from krelay.registration.registry import Relays
from krelay.registration.sockdiag import SocketDiag
from krelay.rules import ruleset
from krelay.rules.ruleset import RuleSpec
from krelay.steps import Step
from krelay.trace.lines import Filter
from procfs_sim.tree import Config, Service, in_force

STOP_WITHIN = 0.06
"""Seconds: a change is in force within 100 ms."""
REGISTERED_WITHIN = 2.0
"""Seconds after the start in which a tcp-relay that listens says so; who doesn't is another."""
RECOVERY = 5.0
"""Seconds after a start over stale rules in which unknown packets are dropped, not passed."""
LOOK_AFTER = 0.02
"""Seconds between the news that rules were taken out and the look at ours."""
LOOK_EVERY = 5.0
"""Seconds between looks where nobody tells of changes."""
ASK_AFTER = (0.0, 1.0)
"""Seconds after rules were put back at which the ends of connections are asked; twice, since a RST
may still be under way, and what is sent may be lost."""
ASKED_AT_ONCE = 64
"""Connections whose ends are asked before packets have their turn."""
MAX_OPENINGS = 1024
"""SYNs that wait before the kernel drops more; a client repeats its own after a second."""
OPENINGS_AT_ONCE = 32
"""SYNs handled before the packets of connections that live have their turn: about a millisecond."""
MOST_TOLD = 1000
"""Forwarded connections, the newest, whose ends are told when relaying ends.  There is no time for
more; the others' hear of it from this host, who knows nothing of them, when they next say
something."""
_SOON = 0.005
RETRY = 1.0
"""Seconds until what the host had no room for is tried again."""
START_AGAIN, START_AGAIN_MOST = 2.0, 60.0
"""The same for a start that failed, or relaying that had to end; each time twice as long."""
STEADY = 60.0
"""Seconds of relaying after which a failure is no sequel of the one before."""
TELL_AGAIN = 60.0
"""Seconds after which a start that goes on failing for the same reason is told once more."""
MOST_FAILURES = 20
"""Times in a row that a queue can't be read before it is given up."""
REMOVE_AFTER = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Seconds before each try to take rules out: packets that they catch have nobody any more."""

_log = Log("relaying")


class Relaying(IdleObserver):
    """Switches relaying on and off as the config says; `on_change` is called when state changes.

    `resumable` is the text that a krelay before, if it was killed, left of what was in force;
    `holder` tells which process has one of these sockets open.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        queue_num: int,
        worker: Worker,
        sender: RawSender,
        looker: Looker,
        addresses: LocalAddresses,
        on_change: Callable[[], object],
        resumable: str = "",
        holder: Callable[[Iterable[int]], Holder | None] = listeners.holder,
    ) -> None:
        self.nat: NatTable = worker.nat
        self.nat.observers.add(self)
        self._diag = SocketDiag()
        worker.has_connection = self._has_connection
        worker.asks_host = addresses.has
        self._addresses = addresses
        self.gateways = GatewayPorts(
            descriptors.cookie_of_listener, self._diag.listeners, descriptors.close_all
        )
        self.gateways.on_change = self._gateways_changed
        self.gateways.is_own = self._may_be_asked
        self.relays = Relays(self.nat, lambda: worker.policy, self._diag)
        self.relays.asks_host = addresses.has
        self.kernel = KernelPath(
            loop, self.nat, name, queue_num, self._make_maps_anew, worker.saw_elsewhere
        )
        self.relays.before_answers = self.kernel.hurry
        self.queue: Queue | None = None
        self.openings: Queue | None = None
        """That of the SYNs to services."""
        self._config = Config()
        self._loop = loop
        self._name = name
        self._queue_num = queue_num
        self._worker = worker
        self._sender = sender
        self._looker = looker
        self._on_change = on_change
        self._rules_made_for: tuple[object, ...] = ()
        self._was_served = False
        """Whether a tcp-relay has listened on the gateway port since relaying began."""
        self._registering: Timer | None = None
        self._holder = holder
        self._resumable = InForce.parse(resumable)
        self._backend: Backend | None = None
        self._knows_dscp = False
        self._spec: RuleSpec | None = None
        self._failure: str | None = None
        self._again_at: float | None = None
        """When a start that failed is tried again; None: nothing has failed."""
        self._again_after = START_AGAIN
        """Seconds until the next try, if another one fails."""
        self._running_since = 0.0
        self._failures = Failures(_log)
        self._failed_in_a_row = 0
        self._stopping: Timer | None = None
        self._on_stopped: Callable[[], object] | None = None
        self._gport: int | None = None
        """The gateway port of new flows: the config's, unless only a former one is served."""
        self._waits_for_port = False
        """Relaying failed because another program has the gateway port."""
        self._refusing: str | None = None
        """Why clients of TCP are refused, when last looked."""
        self._refusal_warning = Throttle()
        self._named: tuple[list[sockdiag.Socket], str] = ([], "")
        """Who listens on the gateway port without being known, and what that program is called."""
        self._view = HostView(frozenset(), (), None, False)
        self._no_maps = ""
        """Why nothing is handed to the kernel though it is wished."""
        self._rule_watcher: RuleWatcher | None = None
        self._looking: Timer | None = None
        self._look_at: float | None = None
        """When to look for our rules unasked; None: we are told of changes."""
        self._removal_warning = Throttle()
        self._delay_warning = Throttle()
        self._failure_error = Throttle(TELL_AGAIN)
        self._told_failure = ""
        self._overflow_warning = Throttle()
        self._overflows_told = 0
        self._dropped_before = (0, 0)
        self._stopped_warning = Throttle()
        self._stopped_told = 0

    @property
    def state(self) -> str:
        """`stopped`, `running`, or `failed: REASON`."""
        if self._failure is not None:
            return f"failed: {self._failure}"
        return "running" if self.queue else "stopped"

    @property
    def failed(self) -> bool:
        """Whether relaying was to begin, or to go on, and can't."""
        return self._failure is not None

    @property
    def retry_in(self) -> float | None:
        """Seconds until relaying, which has failed, is tried again; None if it hasn't.

        Where it waits for the gateway port, that is looked at every second.
        """
        if self._failure is None or self._again_at is None:
            return None
        return max(0.0, self._again_at - self._loop.now)

    @property
    def rules(self) -> str:
        """By what the rules are made: `nft`, `iptables`, or `none`."""
        return self._backend.name if self._backend else "none"

    @property
    def datapath(self) -> str:
        """`kernel`: flows are handed to it; `queue`, with the reason where it isn't by wish."""
        if self.kernel.fast.room:
            return "kernel"
        if self.queue is None or self._config.datapath == "queue":
            return "queue"
        return f"queue ({self._no_maps})"

    @property
    def resumable(self) -> str:
        """What connections can have begun with that live: a line for each change, to be kept."""
        return "".join(f"{each.text()}\n" for each in self.relays.in_force)

    @property
    def gateway(self) -> str:
        """`served`; `unused`, where nothing needs tcp-relay; or why clients of TCP are refused."""
        return (self._why_refused() or "served") if self._config.terminated else "unused"

    @property
    def own_packets(self) -> str:
        """`ok`; or that rules of this host stop what krelay itself sends: RSTs, ICMP errors."""
        if not self.own_packets_stopped:
            return "ok"
        return f"{self.own_packets_stopped} stopped by rules of this host; krelay doctor names them"

    @property
    def own_packets_stopped(self) -> int:
        """How many, since krelay began."""
        return self._sender.stopped

    def prepare(self, start: bool) -> None:
        """Finds out how rules can be made, and removes those that a killed krelay left.

        Those that are to be replaced in one step (`start`, and made the same way) stay.
        """
        self._probe()
        for backend in netfilter.CANDIDATES:
            with suppress(RulesUnavailable):
                if not backend.present(self._name):
                    continue
                if start and self._backend and netfilter.same_rules(backend, self._backend):
                    continue
                backend.remove(self._name)
                _log.info("stale rules removed", rules=backend.name)

    def settle(self, config: Config, changed: frozenset[str]) -> None:
        """Puts this config in force; `changed` names the settings that differ from before."""
        self._config = config
        self.nat.limits = FlowLimits(
            config.limits_flows, config.limits_flows_per_client, config.limits_new_flows_per_client
        )
        timeouts = Timeouts(
            config.timeouts_udp,
            config.timeouts_udp_dns,
            config.timeouts_tcp_transitory,
            config.timeouts_tcp_established,
        )
        if timeouts != self.nat.timeouts:
            self.nat.set_timeouts(timeouts)
        if config.start:
            if self._stopping:
                self._end()  # and begin afresh: nobody is told of a state in between
            if self.queue is None:
                self._again_after = START_AGAIN
                self._start()
            else:
                self._adopt(changed)
        elif self.queue and not self._stopping:
            self.stop()
        elif self.queue is None:
            self._failure = self._again_at = None
            self._waits_for_port = False

    def stop(self, then: Callable[[], object] | None = None) -> None:
        """Ends relaying in order, then calls `then`.  Called again it ends at once."""
        self._on_stopped = then or self._on_stopped
        if self.queue is None or self._stopping:
            self._finish_stopping()
            return
        nothing: frozenset[int] = frozenset()
        self._worker.policy = replace(self._policy(), tcp=nothing, udp=nothing, forwarded=nothing)
        now = self._loop.now
        forwarded = []
        for flow in self.nat.workers:
            if flow.closed_at is not None:
                continue
            if flow.gport is not None:
                self.relays.abort(flow, now)
            elif flow.is_forwarded:
                forwarded.append(flow)
        for flow in forwarded[-MOST_TOLD:]:
            self.end(flow)
        self._wait_for_resets(now + STOP_WITHIN)

    def end(self, flow: Flow) -> None:
        """Ends a flow: TCP by resetting both its legs, or both ends of what is forwarded."""
        if flow.is_forwarded:
            self.nat.kill(flow, self._loop.now)
            self.kernel.take_back_now()  # before an end answers, past the worker
            for packet in probes(flow):
                self._sender.send(packet)
        elif flow.gport is None:
            self.nat.end(flow)
        else:
            self.relays.abort(flow, self._loop.now)

    def needs_rules(self) -> None:
        """A flow needs rules that aren't there: they are made in the next turn of the loop."""
        self._loop.call_soon(self._refresh_rules)

    def step_counts(self) -> list[int]:
        """Packets rewritten by each Step, by the worker and by the kernel."""
        by_kernel = self.kernel.steps()
        seen = self._worker.counts.steps
        return [seen[step] + by_kernel[step] for step in Step]

    def trace(self, filters: Sequence[Filter]) -> None:
        """The flows that one of these admits are traced: the worker sees all their packets."""
        self.kernel.trace(filters)
        self._refresh_rules()

    def close(self) -> None:
        """Ends relaying at once, if it hasn't ended."""
        self._on_stopped = None
        self._finish_stopping()

    def links_changed(self) -> None:
        """Addresses, links or routes of this host may have changed."""
        if self.queue is None or self._stopping:
            return
        if (view := self._look()) != self._view:
            former, policy = self._view, self._policy()
            self._take_view(view)
            self._apply()
            self._end_stale(former, policy)
            self._refresh_rules()

    def _end_stale(self, former: HostView, policy: Policy) -> None:
        """Flows go that began with what isn't so any more, and can't be answered: the client's next
        packet makes them anew."""
        now = self._policy()
        for flow in self.nat.unanswered():
            client = flow.client.addr
            if policy.source_for(client) != now.source_for(client):
                self.nat.end(flow)
        if gone := former.own - self._view.own:
            for flow in self.nat.workers:
                if flow.relay is None or flow.gport is not None or flow.relay.addr not in gone:
                    continue
                if flow.proto is Proto.UDP or flow.is_unconfirmed:
                    self.nat.end(flow)

    def _may_be_asked(self, address: bytes) -> bool:
        """Whether clients may come to this address: it is this host's, for all that is known."""
        if address[0] == LOOPBACK:
            return False
        return (
            address in self._view.own or self._addresses.has(address, self._loop.now) is not False
        )

    def _look(self) -> HostView:
        """The host as it is now; as it was before if it can't be looked at: then once more soon."""
        try:
            return self._looker.look(self._config.real_ip)
        except OSError as error:
            self._failures.tell(
                self._loop.now, "the host's links can't be looked at; trying again", error
            )
            self._loop.call_at(self._loop.now + RETRY, self.links_changed)
            return self._view

    def on_time(self, now: float) -> None:
        """Expiry and everything else that is done once a second."""
        self.nat.expire(now)
        self.relays.on_time(now)
        with suppress(OSError):
            self.nat.reserved = self._looker.reserved()
        if self._again_at is not None and now >= self._again_at:
            self._start()
            self._on_change()
        self._begin_where_free()
        if self.queue is not None:
            self.gateways.check()
            self._warn_of_refusal(now)
        if self._spec is None or self._rules_made_for != self._rules_depend_on():
            self._refresh_rules()
        if self._look_at is not None and now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            self._restore_rules()
        self._warn_of_overflow(now)
        self._warn_of_stopped(now)

    def dropped(self) -> tuple[int, int]:
        """Packets the kernel dropped since relaying started: queue full, socket buffer full."""
        served = [figures(queue.number) for queue in self.queues]
        known = [each for each in served if each is not None]
        if known:
            self._dropped_before = (
                sum(each.queue_dropped for each in known),
                sum(each.socket_dropped for each in known),
            )
        return self._dropped_before

    @property
    def queues(self) -> list[Queue]:
        """Those that are bound."""
        return [queue for queue in (self.queue, self.openings) if queue is not None]

    def _start(self) -> None:
        config = self._config
        self._failure = self._again_at = None
        backend = self._backend or self._probe()
        self._waits_for_port = False
        if backend is None:
            return
        try:
            stale = backend.present(self._name)
            self.queue = Queue(
                self._queue_num, self._worker, self._sender.send, clock=self._loop.clock
            )
            self._dropped_before, self._overflows_told = (0, 0), 0
            self._loop.add(self.queue.fileno(), select.EPOLLIN, self._serve_queue)
            self.openings = Queue(
                ruleset.openings(self._queue_num),
                self._worker,
                self._sender.send,
                most=MAX_OPENINGS,
                batch=OPENINGS_AT_ONCE,
                before_verdicts=self.kernel.hurry,
                clock=self._loop.clock,
            )
            self._loop.add(self.openings.fileno(), select.EPOLLIN, self._serve_openings)
            self._worker.recovering_until = self._loop.now + RECOVERY if stale else 0.0
            self._gport = config.gport
            self._take_view(self._looker.look(config.real_ip))
            was_killed = stale or bool(self._resumable)
            self.relays.resumable_until = self._loop.now + RECOVERY if was_killed else 0.0
            self.relays.in_force, self._resumable = self._resumable, []
            self._apply()
            self.kernel.listen()
            self._watch_rules(backend)
            self._install(self._wanted(), afresh=True)
        except (QueueUnavailable, RulesUnavailable, OSError) as error:
            reason = f"this host: {error.strerror}" if isinstance(error, OSError) else str(error)
            self._fail(reason, by_rules=isinstance(error, RulesUnavailable))
            return
        self._running_since = self._loop.now
        self._told_failure = ""
        _log.info(
            "relaying started",
            real_ip=config.real_ip,
            gport=config.gport,
            services=in_force("services", config),
            source=config.source,
            rules=backend.name,
            datapath=self.datapath,
            queue=self._queue_num,
            after="a killed krelay" if stale else None,
        )
        if not figures_shown():
            _log.warning(
                "how many packets the kernel drops from the queue isn't shown to this user",
                mend="give it the group root (SupplementaryGroups=root)",
            )
        self._warn_of_surroundings()
        if not stale:
            self._was_served = bool(self.gateways.served)
            when = self._loop.now + REGISTERED_WITHIN
            self._registering = self._loop.call_at(when, self._look_who_listens)

    def _warn_of_surroundings(self) -> None:
        """What would make relaying fail quietly, told before the first packet is lost."""
        config, view = self._config, self._view
        towards = IPv4Address(view.towards) if view.towards is not None else None
        path = Path(config.real_ip, "" if towards else None, towards)
        for finding in checks.surroundings(
            Facts(config=config, forwards=view.forwards, server=path)
        ):
            _log.warning(finding.text, mend=finding.mend)

    def _adopt(self, changed: frozenset[str]) -> None:
        """Takes over changed values while running: new flows get them, the flows keep theirs."""
        if "real_ip" in changed:
            self._take_view(self._look())
            self._warn_of_surroundings()
            for flow in self.nat.unanswered():
                if flow.server.addr != self._config.real_ip.packed:
                    self.nat.end(flow)  # the client's next packet makes it anew
        self._apply()
        self._refresh_rules()

    def _apply(self) -> None:
        """New flows get what is in force now."""
        wanted, served = self._config.gport, self.gateways.served
        if wanted in served or self._gport not in served:
            self._gport = wanted
        policy = self._worker.policy = self._policy()
        terminated = policy.tcp - policy.forwarded
        for backend in sorted(policy.backends):
            self.relays.remember(InForce(policy.gport, backend, policy.source, terminated))

    def _take_view(self, view: HostView) -> None:
        self._view = view
        self.nat.reserved = view.reserved
        self.gateways.check()

    def _has_connection(self, own: Endpoint, peer: Endpoint) -> bool:
        try:
            return self._diag.carrier(own, peer) is not None
        except OSError:
            return False  # the kernel doesn't tell: as if there were none

    # Whom T1 leads to

    def _gateways_changed(self) -> None:
        """A tcp-relay listens, or does no more, or is not alone; T1 follows before anything else.

        Clients that it hasn't accepted end, since their next packets might reach another.
        """
        if self.queue is None:
            self._loop.call_soon(self._begin_where_free)
            return
        served = self.gateways.served
        self._was_served |= bool(served)
        self._worker.waiting_until = self._loop.now + AWAY_GRACE
        if self._stopping:
            assert self._worker.policy is not None
            self._worker.policy = replace(self._worker.policy, served=served)
        else:
            self._apply()
            self._loop.call_soon(self._refresh_rules)
        for flow in self.nat.workers:
            if flow.gport is not None and flow.gport not in served and not flow.accepted:
                self.nat.end(flow)
        self._on_change()

    def _look_who_listens(self) -> None:
        """Relaying can't begin where another program has the gateway port."""
        port = self._config.gport
        if self.queue is None or self._stopping or not self._config.terminated:
            return
        if self._was_served:
            return  # by a tcp-relay, which may be away: its clients alone are refused
        if others := self.gateways.others(port):
            who = self._called(others)
            self._fail(f"port {port}, the gateway port, is in use by {who}; end that, or set gport")
            self._again_at, self._again_after = None, START_AGAIN
            self._waits_for_port = True

    def _begin_where_free(self) -> None:
        """Begins after all, if it was for the gateway port that relaying couldn't."""
        port = self._config.gport
        if self._waits_for_port and self._config.start and not self.gateways.others(port):
            self._start()
            self._on_change()

    def _why_refused(self) -> str | None:
        """Why clients of TCP are refused now; None if they aren't."""
        port = self._gport if self._gport and self.queue else self._config.gport
        if port in self.gateways.served:
            return None
        others = self.gateways.others(port)
        if others is None:
            return "the kernel doesn't tell who listens on a port; modprobe tcp_diag"
        if others:
            return f"port {port} is in use by {self._called(others)}; end that, or set gport"
        return f"no tcp-relay listens on port {port}"

    def _called(self, others: list[sockdiag.Socket]) -> str:
        if self._named[0] != others:
            who = self._holder([each.inode for each in others])
            self._named = (others, str(who or f"another program of user {others[0].uid}"))
        return self._named[1]

    def _warn_of_refusal(self, now: float) -> None:
        why = self._why_refused() if self._config.terminated else None
        lasts = why is not None and why == self._refusing
        if lasts and now >= self._worker.recovering_until:
            before = self._refusal_warning.admit(now)
            if before is not None:
                _log.warning("clients of TCP are refused", reason=why, again=before or None)
        self._refusing = why

    def _policy(self) -> Policy:
        config = self._config
        assert self._gport is not None
        return Policy(
            gport=self._gport,
            served=self.gateways.served,
            server=config.real_ip.packed,
            source=Source(config.source),
            tcp=_ports(s for s in config.services if s.proto == "tcp"),
            udp=_ports(s for s in config.services if s.proto == "udp"),
            forwarded=_ports(s for s in config.services if s.forward),
            any_port=_ports(s for s in config.services if s.any_port),
            own=self._view.own,
            beside=self._view.beside,
            towards=self._view.towards,
            mtu=self._view.mtu,
            answers=config.limits_refusal == "reset",
        )

    def _wanted(self) -> RuleSpec:
        config, policy = self._config, self._worker.policy
        assert self._gport is not None
        room, self._no_maps = self.kernel.room(config, self._backend)
        has_maps = self._backend is not None and self._backend.has_maps
        return ruleset.wanted(
            name=self._name,
            queue=self._queue_num,
            tcp=((s.first, s.last) for s in config.terminated),
            udp=((s.first, s.last) for s in config.services if s.proto == "udp"),
            forwarded=((s.first, s.last) for s in config.services if s.forward),
            gport=self._gport if config.terminated else None,
            server=config.real_ip,
            source_is_relay=config.source == Source.RELAY,
            beside=self._view.beside,
            footprints=self.nat.footprints,
            room=room,
            answered_within=config.timeouts_udp_dns,
            learning=self.kernel.learning(config, policy) if room and policy else None,
            tells_ends=self.kernel.tells_ends,
            any_port=((s.first, s.last) for s in config.services if s.any_port),
            asked_within=config.timeouts_udp if has_maps else 0,
            tells_strays=self.kernel.tells_strays and has_maps,
            follows_dscp=self._knows_dscp,
        )

    def _install(self, spec: RuleSpec, *, afresh: bool) -> None:
        """Puts these rules in force; `afresh` also their maps.  Raises RulesUnavailable."""
        assert self._backend is not None
        former = self._spec
        if afresh:
            self.kernel.leave()
            self._spec = None  # if this fails, the next try is to make all of it
        self._backend.install(spec, afresh=afresh, former=former)
        self._spec = spec
        try:
            port = self.kernel.enter(spec, afresh=afresh)
        except OSError as error:
            self._spec = None  # made afresh at the next try
            if self.kernel.refused(error):
                self._install(self._wanted(), afresh=True)
                return
            raise RulesDelayed(f"no socket to nf_tables: {error.strerror}") from None
        if self._rule_watcher is not None and port is not None:
            self._rule_watcher.ignore(port)
        self._rules_announced(ours=True)

    def _make_maps_anew(self) -> None:
        """The kernel's maps aren't as they were left.  The rules may have gone with them."""
        if self._backend is None or self._spec is None or self._stopping:
            self.kernel.leave()
            return
        try:
            whole = self._backend.intact(self._spec)
            if whole:
                self._install(self._wanted(), afresh=True)
        except RulesDelayed as error:
            self.kernel.leave()
            self._spec = None
            self._delayed(error)
            return
        except RulesUnavailable as error:
            self._fail(f"rules can't be changed: {error}", by_rules=True)
            return
        if not whole:
            self._restore_rules()

    def _refresh_rules(self) -> None:
        """Changes the rules if the config, the flows or the links need others."""
        if self.queue is None or self._backend is None or self._stopping:
            return
        depends_on = self._rules_depend_on()
        spec = self._wanted()
        if spec == self._spec:
            self._rules_made_for = depends_on
            return
        try:
            self._install(spec, afresh=self._spec is None or spec.maps != self._spec.maps)
        except RulesDelayed as error:
            self._delayed(error)
        except RulesUnavailable as error:
            self._fail(f"rules can't be changed: {error}", by_rules=True)

    def _rules_depend_on(self) -> tuple[object, ...]:
        """What `_wanted` is made of: as long as that stays, it needn't be made again every second.

        To make it costs some hundred objects, whose memory the interpreter keeps for a while.
        """
        mine = (self._config, self._worker.policy, self._view, self._gport, self._backend)
        kernel = (
            self.kernel.condition(self._config),
            self.kernel.tells_ends,
            self.kernel.tells_strays,
        )
        return *mine, self.nat.footprint_changes, *kernel

    def _delayed(self, error: RulesDelayed) -> None:
        """The rules stay as they are; within a second it is tried again (on_time)."""
        if (before := self._delay_warning.admit(self._loop.now)) is not None:
            _log.warning(
                "rules can't be changed now; trying again", reason=error, again=before or None
            )

    # Rules that somebody else takes out

    def _watch_rules(self, backend: Backend) -> None:
        self._look_at = self._loop.now + LOOK_EVERY
        if not backend.tables(self._name):
            return
        try:
            self._rule_watcher = RuleWatcher()
        except OSError as error:
            _log.info("changes of rules aren't announced; looking at times", error=error)
            return
        self._look_at = None
        self._loop.add(self._rule_watcher.fileno(), select.EPOLLIN, self._rules_announced)

    def _rules_announced(self, _: int = 0, *, ours: bool = False) -> None:
        """Somebody changed rules; `ours`: we did, so what is announced is known already."""
        if self._rule_watcher is None or self._backend is None:
            return
        tables = self._rule_watcher.drain()
        if ours or (tables is not None and not tables & self._backend.tables(self._name)):
            return
        if self._looking is None or not self._looking.pending:
            when = self._loop.now + LOOK_AFTER
            self._looking = self._loop.call_at(when, self._restore_rules)

    def _restore_rules(self) -> None:
        """Puts our rules back if somebody has taken some out: who wants them out writes start."""
        if self._backend is None or self._spec is None or self._stopping:
            return
        try:
            if self._backend.intact(self._spec):
                return
            self._spec = None  # there is nothing to go by
            self._install(self._wanted(), afresh=True)
        except RulesDelayed as error:
            self._delayed(error)
            self._loop.call_at(self._loop.now + RETRY, self._restore_rules)
            return
        except RulesUnavailable as error:
            reason = f"somebody took krelay's rules out, and they can't be put back: {error}"
            self._fail(reason, by_rules=True)
            return
        if (before := self._removal_warning.admit(self._loop.now)) is not None:
            _log.warning(
                "somebody took krelay's rules out; they are put back",
                again=before or None,
                mend="to stop relaying, krelay stop",
            )
        doubtful = [
            flow
            for flow in self.nat.workers
            if (flow.is_forwarded or flow.gport is not None) and flow.is_confirmed
        ]
        for wait in ASK_AFTER:
            self._loop.call_at(self._loop.now + wait, lambda: self._ask_ends(doubtful))

    def _ask_ends(self, flows: list[Flow]) -> None:
        """Has the ends of these TCP connections find out whether their peers are still there.

        What went on unrewritten while rules were gone was answered by a RST, mostly to one end
        alone; the other might wait for ever, also where tcp-relay has closed its own.  Who is just
        opening a connection must not be asked: it would take the query for the other's opening.
        """
        if self.queue is None or self._stopping:
            return
        for flow in flows[:ASKED_AT_ONCE]:
            if self.nat.of_id(flow.id) is not flow:
                continue  # it has ended meanwhile: what answers would be taken for this host's own
            for packet in asks(flow):
                self._sender.send(packet)
        if rest := flows[ASKED_AT_ONCE:]:
            self._loop.call_at(self._loop.now + _SOON, lambda: self._ask_ends(rest))

    def _probe(self) -> Backend | None:
        try:
            self._backend = netfilter.probe()
            self._knows_dscp = netfilter.knows_dscp(self._backend)
            if self._backend.has_maps and not self._knows_dscp:
                _log.info("nft has no maps with DSCP: changes of it are seen in the worker alone")
        except RulesUnavailable as error:
            self._fail(str(error), by_rules=True)
        return self._backend

    def _fail(self, reason: str, *, by_rules: bool = False) -> None:
        """Relaying isn't possible: the host is left as before, and `state` says why.

        It is begun again by and by, if it is still wished then.  `by_rules`: how rules can be made
        is found out anew then, since whoever mends it may do that in another way.
        """
        if self.queue is not None and self._loop.now - self._running_since >= STEADY:
            self._again_after = START_AGAIN
        if reason != self._told_failure:
            self._told_failure = reason
            self._failure_error = Throttle(TELL_AGAIN)
        if (before := self._failure_error.admit(self._loop.now)) is not None:
            _log.error("relaying failed", reason=reason, again=before or None)
        self._abandon()
        if by_rules:
            self._backend = None
        self._failure = reason
        if self._config.start:
            self._again_at = self._loop.now + self._again_after
            self._again_after = min(2 * self._again_after, START_AGAIN_MOST)
        self._on_change()

    def _wait_for_resets(self, deadline: float) -> None:
        alive = any(
            flow.closed_at is None and (flow.gport is not None or flow.abort_asked)
            for flow in self.nat.workers
        )
        now = self._loop.now
        if alive and now < deadline:
            self._stopping = self._loop.call_at(
                now + _SOON, lambda: self._wait_for_resets(deadline)
            )
        else:  # one turn more: the last resets are in the queue
            self._stopping = self._loop.call_at(now + 2 * _SOON, self._finish_stopping)

    def _end(self) -> None:
        if self._stopping:
            self._stopping.cancel()
            self._stopping = None
        if self.queue is not None:
            self._abandon()
            _log.info("relaying stopped")

    def _finish_stopping(self) -> None:
        self._end()
        then, self._on_stopped = self._on_stopped, None
        self._on_change()
        if then is not None:
            then()

    def _abandon(self) -> None:
        """Rules out, queue unbound, flows gone, whatever of these there is."""
        self._worker.policy = None
        self._spec = self._look_at = self._again_at = None
        if self._registering is not None:
            self._registering.cancel()
            self._registering = None
        if (watcher := self._rule_watcher) is not None:
            self._rule_watcher = None
            with self._telling():
                self._loop.remove(watcher.fileno())
                watcher.close()
        with self._telling():
            self.kernel.close()
        if self.queue is not None:
            self.dropped()
            self._remove_rules()
            for queue in self.queues:
                with self._telling():
                    self._loop.remove(queue.fileno())
                with self._telling():
                    queue.close()
            self.queue = self.openings = None
        self.nat.clear()
        self.relays.in_force = []
        self._resumable = []

    def _remove_rules(self) -> None:
        if self._backend is None:
            return
        for wait in REMOVE_AFTER:
            time.sleep(wait)
            try:
                self._backend.remove(self._name)
                return
            except RulesDelayed as error:
                reason = str(error)
            except RulesUnavailable as error:
                reason = str(error)
                break
        _log.error("rules can't be removed", reason=reason, mend="krelay clean")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What fails here is told, and what follows is done all the same."""
        try:
            yield
        except OSError as error:
            self._failures.tell(self._loop.now, "a call failed; going on", error)

    def _serve_queue(self, _: int) -> None:
        self._serve(self.queue)

    def _serve_openings(self, _: int) -> None:
        self._serve(self.openings)

    def _serve(self, queue: Queue | None) -> None:
        if queue is None:
            return
        try:
            queue.serve()
        except OSError as error:
            if queue not in self.queues:  # given up meanwhile
                return
            self._failed_in_a_row += 1
            if self._failed_in_a_row > MOST_FAILURES:
                self._fail(f"the queue is lost: {error}")
                return
            self._failures.tell(self._loop.now, "the queue can't be read; trying again", error)
            time.sleep(PAUSE)
        else:
            self._failed_in_a_row = 0

    def _warn_of_stopped(self, now: float) -> None:
        stopped = self.own_packets_stopped - self._stopped_told
        if stopped and self._stopped_warning.admit(now) is not None:
            _log.warning(
                "rules of this host stop krelay's own packets: who is refused or killed isn't told",
                packets=stopped,
                mend="krelay doctor",
            )
            self._stopped_told += stopped

    def _warn_of_overflow(self, now: float) -> None:
        lost = sum(self.dropped())
        if lost <= self._overflows_told:
            return
        if self._overflow_warning.admit(now) is not None:
            _log.warning(
                "the queue overflowed: packets dropped by the kernel",
                packets=lost - self._overflows_told,
                in_all=lost,
            )
            self._overflows_told = lost


def _ports(services: Iterable[Service]) -> frozenset[int]:
    return frozenset(
        port for service in services for port in range(service.first, service.last + 1)
    )
