"""Relaying itself: the queue and the rules, in force or not, and what new flows get.

There are three phases:

    stopped    no rules, no queue
    running    both; the queue is bound before the rules are in: no packet waits without being read
    stopping   nothing new is relayed, tcp-relay resets its connections, the rules stay until the
               last of these resets is through, STOP_WITHIN at most

A killed krelay leaves its rules; while no krelay serves the queue the kernel drops what they catch.
The next krelay binds the queue, puts its rules in their place in one step, and for RECOVERY seconds
drops what it can't assign yet, until tcp-relay has resumed its connections.

Clients of TCP are led to tcp-relay from when it has handed over its listening socket
(registration/gatewayports.py) until its connection to the relay socket is lost.  Where another
program has the gateway port when relaying begins, it fails, and begins by itself when the port is
free.

What is in force follows from the config, the flows that live and the links of this host; whichever
of them has changed, the same few functions derive the rules and the policy again, and nothing is
done where the result is the same as before.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from knet import descriptors, listeners
from knet.listeners import Holder
from knet.log import Failures, Log
from knet.loop import Loop, Timer
from knet.rawsocket import RawSender
from knet.rules.run import RulesUnavailable
from krelay.daemon import apply
from krelay.daemon.attempts import Attempts
from krelay.daemon.flowends import FlowEnder
from krelay.daemon.gatewaywatch import UNUSED, GatewayWatch
from krelay.daemon.ownpackets import OwnPackets
from krelay.daemon.queues import Queues
from krelay.daemon.rulekeeper import InForceNow, RuleKeeper
from krelay.daemon.surroundings import Surroundings
from krelay.datapath.nfqueue import QueueUnavailable, figures_shown
from krelay.datapath.policy import Policy
from krelay.datapath.refusals import AWAY_GRACE
from krelay.datapath.worker import Worker
from krelay.host.hostview import HostView
from krelay.host.links import LocalAddresses, Looker
from krelay.nat.events import IdleObserver
from krelay.nat.table import NatTable
from krelay.offload.service import Offload
from krelay.registration.gatewayports import GatewayPorts
from krelay.registration.inforce import InForce
from krelay.registration.registry import Relays
from krelay.trace.lines import Filter
from procfs_sim.tree import Config, in_force

STOP_WITHIN = 0.06
"""Seconds: a change is in force within 100 ms."""
REGISTERED_WITHIN = 2.0
"""Seconds after the start in which a tcp-relay that listens says so; what doesn't is another
program."""
RECOVERY = 5.0
"""Seconds after a start over stale rules in which unknown packets are dropped, not passed."""
_SOON = 0.005

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
        self._loop = loop
        self._queue_num = queue_num
        self._worker = worker
        self._looker = looker
        self._on_change = on_change
        self._config = Config()
        self._resumable = InForce.parse(resumable)
        failures = Failures(_log)
        self.nat: NatTable = worker.nat
        self.nat.observers.add(self)
        self._host = Surroundings(loop, looker, addresses, self.links_changed, failures)
        worker.has_connection = self._host.has_connection
        worker.asks_host = addresses.has
        self.gateways = GatewayPorts(
            descriptors.cookie_of_listener, self._host.sockets.listeners, descriptors.close_all
        )
        self.gateways.on_change = self._gateways_changed
        self.gateways.is_own = self._host.may_be_asked
        self._gateway_watch = GatewayWatch(self.gateways, holder)
        self.relays = Relays(self.nat, lambda: worker.policy, self._host.sockets)
        self.relays.asks_host = addresses.has
        self.kernel = Offload(
            loop,
            self.nat,
            name,
            queue_num,
            lambda: self.rules.refresh(),
            worker.saw_elsewhere,
        )
        self.relays.before_answers = self.kernel.change_urgent
        self.flows = FlowEnder(loop, self.nat, self.relays, self.kernel, sender)
        """What ends flows."""
        self.rules = RuleKeeper(
            loop,
            name,
            queue_num,
            self.nat,
            self.kernel,
            lambda: InForceNow(self._config, worker.policy, self._host.view, self._gport),
            self._rules_failed,
            self.flows.probe_ends,
            failures,
        )
        self._has_begun = False
        """Whether the rules are in: before that, packets go to the host."""
        self.queues = Queues(
            loop, queue_num, worker, sender.send, self.kernel.change_urgent, self._fail, failures
        )
        self.own_packets = OwnPackets(sender)
        self.attempts = Attempts()
        """Why relaying failed, if it has."""
        self._failures = failures
        self._was_served = False
        """Whether a tcp-relay has listened on the gateway port since relaying began."""
        self._registering: Timer | None = None
        self._stopping: Timer | None = None
        self._on_stopped: Callable[[], object] | None = None
        self._gport = 0
        """The gateway port of new flows: the config's, unless only a former one is served."""

    @property
    def state(self) -> str:
        """`stopped`, `running`, or `failed: REASON`."""
        if self.attempts.reason is not None:
            return f"failed: {self.attempts.reason}"
        return "running" if self._has_begun else "stopped"

    @property
    def datapath(self) -> str:
        """`kernel`: flows are offloaded; `queue`, with the reason where it isn't by wish."""
        if self.kernel.policy.capacity:
            return "kernel"
        if not self.queues.bound or self._config.datapath == "queue":
            return "queue"
        return f"queue ({self.rules.no_maps})"

    @property
    def gateway(self) -> str:
        """`served`; `unused`, where nothing needs tcp-relay; or why clients of TCP are refused."""
        if not self._config.terminated:
            return UNUSED
        port = self._gport if self._gport and self.queues.bound else self._config.gport
        return self._gateway_watch.state(port)

    def settle(self, config: Config, changed: frozenset[str]) -> None:
        """Puts this config in force; `changed` names the settings that differ from before."""
        self._config = config
        self.nat.limits = apply.limits(config)
        if (timeouts := apply.timeouts(config)) != self.nat.timeouts:
            self.nat.timeouts = timeouts
        if config.start:
            if self._stopping:
                self._end()  # and begin afresh: no state in between is shown
            if not self.queues.bound:
                self.attempts.afresh()
                self._start()
            else:
                self._adopt(changed)
        elif not self.queues.bound:
            self.attempts.clear()
        elif not self._stopping:
            self.stop()

    def stop(self, then: Callable[[], object] | None = None) -> None:
        """Ends relaying in order, then calls `then`.  Called again it ends at once."""
        self._on_stopped = then or self._on_stopped
        if not self.queues.bound or self._stopping:
            self._finish_stopping()
            return
        nothing: frozenset[int] = frozenset()
        self._worker.policy = replace(self._policy(), tcp=nothing, udp=nothing, forwarded=nothing)
        self.rules.freeze()
        self.flows.end_all()
        self._wait_for_resets(self._loop.now + STOP_WITHIN)

    def needs_rules(self) -> None:
        """A flow needs rules that aren't there: they are made in the next turn of the loop."""
        self._loop.call_soon(self.rules.refresh)

    def trace(self, filters: Sequence[Filter]) -> None:
        """The flows that one of these admits are traced: they are on the slow path meanwhile."""
        self.kernel.trace(filters)
        self.rules.refresh()

    def close(self) -> None:
        """Ends relaying at once, if it hasn't ended."""
        self._on_stopped = None
        self._finish_stopping()

    def links_changed(self) -> None:
        """Addresses, links or routes of this host may have changed."""
        if not self.queues.bound or self._stopping:
            return
        if (view := self._host.look(self._config.real_ip)) != self._host.view:
            before = (self._host.view, self._policy())
            self._take_view(view)
            self._apply()
            self.flows.end_stale(before, (view, self._policy()))
            self.rules.refresh()

    def on_time(self, now: float) -> None:
        """Expiry and everything else that is done once a second."""
        self.nat.expire(now)
        self.relays.on_time(now)
        with suppress(OSError):
            self.nat.mappings.reserved = self._looker.reserved()
        if self.attempts.due(now):
            self._start()
            self._on_change()
        self._begin_where_free()
        if self.queues.bound:
            self.gateways.check()
            is_recovering = now < self._worker.recovering_until
            self._gateway_watch.warn(self.gateway, now, silent=is_recovering)
        self.rules.on_time(now)
        self.queues.warn(now)
        self.own_packets.warn(now)

    def _start(self) -> None:
        config = self._config
        self.attempts.clear()
        backend = self.rules.backend or self.rules.probe()
        if backend is None:
            return
        try:
            stale = self.rules.is_stale()
            self.queues.bind()
            self._worker.recovering_until = self._loop.now + RECOVERY if stale else 0.0
            self._gport = config.gport
            self._take_view(self._looker.look(config.real_ip))
            was_killed = stale or bool(self._resumable)
            self.relays.resumable_until = self._loop.now + RECOVERY if was_killed else 0.0
            self.relays.in_force, self._resumable = self._resumable, []
            self._apply()
            self.kernel.listen()
            self.rules.begin()
            self._has_begun = True
        except RulesUnavailable as error:
            self._rules_failed(str(error))
            return
        except QueueUnavailable as error:
            self._fail(str(error))
            return
        except OSError as error:
            self._fail(f"this host: {error.strerror}")
            return
        self.attempts.begun(self._loop.now)
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
                fix="give it the group root (SupplementaryGroups=root)",
            )
        self._host.warn(config)
        if not stale:
            self._was_served = bool(self.gateways.served)
            when = self._loop.now + REGISTERED_WITHIN
            self._registering = self._loop.call_at(when, self._look_who_listens)

    def _adopt(self, changed: frozenset[str]) -> None:
        """Takes over changed values while running: new flows get them, the flows keep theirs."""
        if "real_ip" in changed:
            self._take_view(self._host.look(self._config.real_ip))
            self._host.warn(self._config)
            self.flows.end_unanswered(self._config.real_ip.packed)
        self._apply()
        self.rules.refresh()

    def _apply(self) -> None:
        """New flows get what is in force now."""
        wanted, served = self._config.gport, self.gateways.served
        if wanted in served or self._gport not in served:
            self._gport = wanted
        policy = self._worker.policy = self._policy()
        terminated = policy.tcp - policy.forwarded
        for backend in sorted(policy.backends):
            self.relays.remember(InForce(policy.gport, backend, policy.source, terminated))

    def _policy(self) -> Policy:
        return apply.policy(self._config, self._host.view, self._gport, self.gateways.served)

    def _take_view(self, view: HostView) -> None:
        self._host.view = view
        self.nat.mappings.reserved = view.reserved
        self.gateways.check()

    # Where T1 leads

    def _gateways_changed(self) -> None:
        """A tcp-relay listens, or does no more, or is not alone; T1 follows before anything else.

        Clients that it hasn't accepted end, since their next packets might reach another.
        """
        if not self.queues.bound:
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
            self._loop.call_soon(self.rules.refresh)
        self.flows.end_unserved(served)
        self._on_change()

    def _look_who_listens(self) -> None:
        """Relaying can't begin where another program has the gateway port."""
        port = self._config.gport
        if not self.queues.bound or self._stopping or not self._config.terminated:
            return
        if self._was_served:
            return  # by a tcp-relay, which may be gone: its clients alone are refused
        if who := self._gateway_watch.taken_by(port):
            self._fail(f"port {port}, the gateway port, is in use by {who}; end that, or set gport")
            self.attempts.wait_for_port()

    def _begin_where_free(self) -> None:
        """Begins after all, if it was for the gateway port that relaying couldn't."""
        waits = self.attempts.waits_for_port and self._config.start
        if waits and not self.gateways.others(self._config.gport):
            self._start()
            self._on_change()

    # How relaying ends

    def _fail(self, reason: str) -> None:
        """Relaying isn't possible: the host is left as before, and `state` says why.

        It is begun again after a while, if it is still wished then.
        """
        before = self.attempts.failed(reason, self._loop.now, again=self._config.start)
        if before is not None:
            _log.error("relaying failed", reason=reason, again=before or None)
        self._abandon()
        self._on_change()

    def _rules_failed(self, reason: str) -> None:
        """The same for want of rules: by what they can be made is found out anew at the next try,
        since whoever fixes it may do that in another way."""
        self._fail(reason)
        self.rules.backend = None

    def _wait_for_resets(self, deadline: float) -> None:
        now = self._loop.now
        if self.flows.is_ending and now < deadline:
            self._stopping = self._loop.call_at(
                now + _SOON, lambda: self._wait_for_resets(deadline)
            )
        else:  # one turn more: the last resets are in the queue
            self._stopping = self._loop.call_at(now + 2 * _SOON, self._finish_stopping)

    def _finish_stopping(self) -> None:
        self._end()
        then, self._on_stopped = self._on_stopped, None
        self._on_change()
        if then is not None:
            then()

    def _end(self) -> None:
        if self._stopping:
            self._stopping.cancel()
            self._stopping = None
        if self.queues.bound:
            self.attempts.ended()
            self._abandon()
            _log.info("relaying stopped")

    def _abandon(self) -> None:
        """Rules out, queues unbound, flows gone, whatever of these there is."""
        self._worker.policy = None
        if self._registering is not None:
            self._registering.cancel()
            self._registering = None
        self.rules.end()
        with self._failures.going_on(self._loop.now):
            self.kernel.close()
        if self.queues.bound:
            self.queues.dropped()
            self.rules.remove()
            self.queues.close()
        self._has_begun = False
        self.nat.clear()
        self.relays.in_force = []
        self._resumable = []
