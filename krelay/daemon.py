"""The krelay daemon: file tree -> config -> rules, queue -> worker -> verdict, and the two sockets.

What is in force is decided in one place, `_settle`, whatever the reason: a file was written, an
address changed, a row needs an old server still to be queued.  Relaying has three phases:

    stopped    no rules, no queue
    running    both; the queue is bound before the rules are in, so that no packet waits for nobody
    stopping   nothing new is relayed, tcp-relay resets its connections, the rules stay until the
               last of these resets is through, STOP_WITHIN at most

A killed krelay leaves its rules; while nobody serves the queue the kernel drops what they catch.
The next krelay binds the queue, puts its rules in their place in one step, and for RECOVERY seconds
drops what it can't assign yet, until tcp-relay has resumed its connections.
"""

import gc
import os
import select
import signal
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from random import SystemRandom

from krelay import control, listeners, netfilter, notify, ruleset, treelock
from krelay.control import Values
from krelay.controlsock import ControlSocket
from krelay.flow import Proto, Source
from krelay.links import HostView, LinkWatcher, look
from krelay.log import Log, Throttle
from krelay.loop import Loop, Timer
from krelay.nat import Limits, NatTable
from krelay.netfilter import Backend, RulesUnavailable
from krelay.nfqueue import Queue, QueueUnavailable, figures
from krelay.rawsend import RawSender
from krelay.relay import Relays
from krelay.relaysock import RelaySocket
from krelay.row import Row, Timeouts
from krelay.ruleset import RuleSpec
from krelay.worker import Policy, Worker
from procfs_sim.ondisk import FileTree, TreeWatcher
from procfs_sim.state import Outcome, TreeState, applied_text, errors_text
from procfs_sim.tree import DEFAULT_ROOT, SETTINGS, Config, in_force

STOP_WITHIN = 0.06
"""Seconds: a change is in force within 100 ms."""
SWITCH_WITHIN = 0.08
"""Seconds that a new gateway port may take to be listened on."""
RECOVERY = 5.0
"""Seconds after a start over stale rules in which unknown packets are dropped, not passed."""
TICK = 1.0
_SOON = 0.005

_log = Log("daemon")


class CannotServe(Exception):
    """The daemon can't start.  The text says why and what to do."""


class Daemon:
    """krelay on the tree at `root`.  Raises CannotServe.

    Implements what the control socket may ask (control.Relay).
    """

    def __init__(self, loop: Loop, root: Path, queue_num: int = ruleset.DEFAULT_QUEUE) -> None:
        self._loop = loop
        self._root = root
        self._queue_num = queue_num
        self._name = ruleset.instance_name(str(root.absolute()), DEFAULT_ROOT)
        self._began_at = loop.now
        self._exit_status = 0
        self._leaving = False
        self._sender = _raw_sender()
        self._tree = FileTree(root)
        self._lock = self._take_tree()
        self.nat = NatTable(rng=SystemRandom())
        self.nat.on_footprint = lambda: loop.call_soon(self._refresh_rules)
        self._worker = Worker(self.nat)
        self._queue: Queue | None = None
        self._backend: Backend | None = None
        self._spec: RuleSpec | None = None
        self._failure: str | None = None
        self._stopping: Timer | None = None
        self._gport: int | None = None
        """The gateway port of new flows: the config's, as soon as it is listened on."""
        self._view = HostView(frozenset(), (), None)
        self._published: dict[str, str] = {}
        self._overflow_warning = Throttle()
        self._overflows_told = 0
        self._dropped_before = (0, 0)

        self._state = TreeState(host_check=self._host_check)
        self._relays = Relays(self.nat, self._source_for)
        try:
            self._watcher = TreeWatcher(root)
            self._links = LinkWatcher()
            self._control = ControlSocket(loop, root / "control.sock", self, self._worker)
            self._relay_socket: RelaySocket | None = None
            outcome = self._state.written(self._tree.read_all(), loop.now)
            self._tree.write_back(outcome)
            self._relay_socket = RelaySocket(loop, root / "relay.sock", self._relays)
        except OSError as error:
            raise CannotServe(f"cannot serve {root}: {error.strerror}") from None
        self._tell(outcome)
        loop.add(self._watcher.fileno(), select.EPOLLIN, self._tree_changed)
        loop.add(self._links.fileno(), select.EPOLLIN, self._links_changed)
        loop.on_signal(signal.SIGTERM, self._leave)
        loop.on_signal(signal.SIGINT, self._interrupted)
        loop.on_signal(signal.SIGHUP, self._reread)
        self._probe()
        self._remove_foreign_rules()
        self._settle()
        self._tick()

    def run(self) -> int:
        """Serves until a signal ends it; the exit status."""
        try:
            self._loop.run()
        finally:
            self._finish_stopping()
            self._control.close()
            if self._relay_socket:
                self._relay_socket.close()
            self._watcher.close()
            self._links.close()
            self._sender.close()
            self._publish()
            os.close(self._lock)
        _log.info("krelay ended")
        return self._exit_status

    # What the control socket asks

    def status(self) -> Values:
        """One value each of everything that is not a counter."""
        now = self._loop.now
        served = figures(self._queue_num) if self._queue else None
        tcp = sum(1 for row in self.nat if row.proto is Proto.TCP)
        return {
            "state": self._state_text(),
            "generation": self._state.generation,
            "uptime": round(now - self._began_at, 1),
            "flows": len(self.nat),
            "flows_tcp": tcp,
            "flows_udp": len(self.nat) - tcp,
            "tcp_relays": len(self._relay_socket.pids) if self._relay_socket else 0,
            "rules": self._backend.name if self._backend else "none",
            "queue": self._queue_num,
            "queue_waiting": served.waiting if served else 0,
            "recovering": round(max(0.0, self._worker.recovering_until - now), 1),
            "pid": os.getpid(),
        }

    def counters(self) -> Values:
        """All counters since the daemon began."""
        queue_dropped, socket_dropped = self._dropped()
        return control.counter_values(
            self._worker.counts,
            errors=self._queue.errors if self._queue else 0,
            overflows=self._queue.overflows if self._queue else 0,
            queue_dropped=queue_dropped,
            socket_dropped=socket_dropped,
        )

    def config_in_force(self) -> Values:
        """The generation and each setting's text."""
        config = self._state.config
        return {"generation": self._state.generation} | {
            name: in_force(name, config) for name in SETTINGS
        }

    def kill(self, row: Row) -> None:
        """Ends a row: a TCP one by resetting both its legs."""
        if row.gport is None:
            self.nat.end(row)
        else:
            self._relays.abort(row, self._loop.now)

    # The file tree

    def _tree_changed(self, _: int) -> None:
        texts = self._watcher.changes()
        if self._watcher.gone:
            self._restore_tree()
            return
        if any(name not in SETTINGS for name in texts):
            self._published.clear()  # somebody wrote a status file: say it again
        self._take(self._state.written(texts, self._loop.now))

    def _reread(self) -> None:
        self._take(self._state.written(self._tree.read_all(), self._loop.now))

    def _late(self) -> None:
        self._take(self._state.on_time(self._loop.now))

    def _take(self, outcome: Outcome) -> None:
        self._tree.write_back(outcome)
        self._tell(outcome)
        deadline = self._state.next_deadline()
        if deadline is not None:
            self._loop.call_at(deadline, self._late)
        if outcome.changed:
            self._settle(outcome.changed)
        self._publish()

    def _tell(self, outcome: Outcome) -> None:
        for name in sorted(outcome.changed):
            value = in_force(name, outcome.config)
            generation = self._state.generation
            _log.info("value applied", file=name, value=value, generation=generation)
        for line in outcome.refused:
            _log.warning("value refused", reason=line)

    def _host_check(self, old: Config, new: Config, changed: frozenset[str]) -> Mapping[str, str]:
        refused = {}
        if "real_ip" in changed and new.real_ip.packed in _look(new.real_ip).own:
            refused["real_ip"] = f"{new.real_ip} is an address of this host"
        if "gport" in changed and self._is_foreign(new.gport):
            who = listeners.holder(listeners.listening(new.gport))
            refused["gport"] = f"port {new.gport} is in use by {who}"
        return refused

    def _is_foreign(self, port: int) -> bool:
        """Whether a program that isn't tcp-relay listens there; no, before relays can connect."""
        inodes = listeners.listening(port)
        if not inodes or self._relay_socket is None:
            return False
        pids = self._relay_socket.pids
        return not any(listeners.holds_any(pid, inodes) in (True, None) for pid in pids)

    def _take_tree(self) -> int:
        try:
            self._tree.create()
            lock = treelock.take(self._root)
        except OSError as error:
            raise CannotServe(
                f"cannot create the file tree at {self._root}: {error.strerror}; "
                "run as root, or choose another place with --root"
            ) from None
        if lock is None:
            raise CannotServe(
                f"another krelay serves {self._root}; stop it, or choose another tree with --root"
            )
        if not os.access(self._root, os.W_OK):
            raise CannotServe(
                f"{self._root} can't be written; run as root, or choose another with --root"
            )
        return lock

    def _restore_tree(self) -> None:
        """Somebody removed or replaced our directories: everything in force is shown again."""
        _log.warning("the file tree was removed; made again", root=self._root)
        self._loop.remove(self._watcher.fileno())
        self._watcher.close()
        self._control.close()
        if self._relay_socket:
            self._relay_socket.close()
        os.close(self._lock)
        self._lock = self._take_tree()
        for name in SETTINGS:
            self._tree.show(name, in_force(name, self._state.config) + "\n")
        self._watcher = TreeWatcher(self._root)
        self._loop.add(self._watcher.fileno(), select.EPOLLIN, self._tree_changed)
        self._control = ControlSocket(self._loop, self._root / "control.sock", self, self._worker)
        self._relay_socket = RelaySocket(self._loop, self._root / "relay.sock", self._relays)
        self._published.clear()
        self._publish()

    def _publish(self) -> None:
        """Shows state, values and errors in the status files, where they differ from before."""
        texts = {
            "status/state": self._state_text() + "\n",
            "status/applied": applied_text(self._state.config, self._state.generation),
            "status/errors": errors_text(self._state.errors),
        }
        for name, text in texts.items():
            if self._published.get(name) != text:
                with suppress(OSError):
                    self._tree.publish(name, text)
                    self._published[name] = text

    def _state_text(self) -> str:
        if self._failure is not None:
            return f"failed: {self._failure}"
        return "running" if self._queue else "stopped"

    # What is in force

    def _settle(self, changed: frozenset[str] = frozenset()) -> None:
        """Makes everything as the config says."""
        config = self._state.config
        self.nat.limits = Limits(config.limits_flows, config.limits_flows_per_client)
        timeouts = Timeouts(
            config.timeouts_udp,
            config.timeouts_udp_dns,
            config.timeouts_tcp_transitory,
            config.timeouts_tcp_established,
        )
        if timeouts != self.nat.timeouts:
            self.nat.set_timeouts(timeouts)
        if config.start and not self._leaving:
            if self._stopping:
                self._finish_stopping()
            if self._queue is None:
                self._start()
            else:
                self._adopt(changed)
        elif self._queue and not self._stopping:
            self._stop()
        elif not config.start:
            self._failure = None
        self._publish()

    def _start(self) -> None:
        config = self._state.config
        self._failure = None
        try:
            backend = self._backend or self._probe() or self._give_up()
            stale = backend.present(self._name)
            self._queue = Queue(self._queue_num, self._worker, self._sender.send)
            self._dropped_before = (0, 0)
            self._loop.add(self._queue.fileno(), select.EPOLLIN, self._serve_queue)
            self._worker.recovering_until = self._loop.now + RECOVERY if stale else 0.0
            self._gport = config.gport
            self._view = _look(config.real_ip)
            self._worker.policy = self._policy()
            self._install(self._wanted())
        except (QueueUnavailable, RulesUnavailable, OSError) as error:
            self._abandon()
            self._failure = str(error)
            _log.error("relaying can't start", reason=error)
            return
        _log.info(
            "relaying started",
            real_ip=config.real_ip,
            gport=config.gport,
            services=in_force("services", config),
            source=config.source,
            rules=backend.name,
            queue=self._queue_num,
            after="a killed krelay" if stale else None,
        )

    def _give_up(self) -> Backend:
        raise RulesUnavailable(self._failure or "no way to queue packets")

    def _adopt(self, changed: frozenset[str]) -> None:
        """Takes over changed values while running: new flows get them, the rows keep theirs."""
        config = self._state.config
        if "real_ip" in changed:
            self._view = _look(config.real_ip)
            for row in self.nat.unanswered():
                if row.server.addr != config.real_ip.packed:
                    self.nat.end(row)  # the client's next packet makes it anew
        if "gport" in changed:
            self._switch_gport(self._loop.now + SWITCH_WITHIN)
        self._refresh_rules()
        self._worker.policy = self._policy()

    def _switch_gport(self, deadline: float) -> None:
        """Sends new connections to the new gateway port once tcp-relay listens there."""
        wanted = self._state.config.gport
        if self._loop.now < deadline and not listeners.listening(wanted):
            self._loop.call_at(self._loop.now + _SOON, lambda: self._switch_gport(deadline))
            return
        if self._queue and not self._stopping and self._gport != wanted:
            self._gport = wanted
            self._refresh_rules()
            self._worker.policy = self._policy()

    def _policy(self) -> Policy:
        config = self._state.config
        assert self._gport is not None
        return Policy(
            gport=self._gport,
            server=config.real_ip.packed,
            source=Source(config.source),
            tcp=_ports(config, "tcp"),
            udp=_ports(config, "udp"),
            own=self._view.own,
            beside=self._view.beside,
            towards=self._view.towards,
        )

    def _source_for(self, client: bytes) -> Source:
        policy = self._worker.policy
        return policy.source_for(client) if policy else Source.CLIENT

    def _wanted(self) -> RuleSpec:
        config = self._state.config
        assert self._gport is not None
        return ruleset.wanted(
            name=self._name,
            queue=self._queue_num,
            tcp=((s.first, s.last) for s in config.services if s.proto == "tcp"),
            udp=((s.first, s.last) for s in config.services if s.proto == "udp"),
            gport=self._gport,
            server=IPv4Address(config.real_ip),
            source_is_relay=config.source == Source.RELAY,
            beside=self._view.beside,
            footprints=self.nat.footprints,
        )

    def _refresh_rules(self) -> None:
        """Changes the rules if the config, the rows or the links need others."""
        if self._queue is None or self._stopping or self._failure:
            return
        spec = self._wanted()
        if spec == self._spec:
            return
        try:
            self._install(spec)
        except RulesUnavailable as error:
            _log.error("rules can't be changed; those before stay", reason=error)

    def _install(self, spec: RuleSpec) -> None:
        backend = self._backend
        assert backend is not None
        backend.install(spec)
        self._spec = spec

    def _probe(self) -> Backend | None:
        try:
            self._backend = netfilter.probe()
        except RulesUnavailable as error:
            self._failure = str(error)
            _log.error("relaying won't be possible", reason=error)
        return self._backend

    def _remove_foreign_rules(self) -> None:
        """Rules that a killed krelay put in another way than ours; all, if nothing is to run."""
        for backend in netfilter.CANDIDATES:
            is_ours = self._backend is not None and backend.name == self._backend.name
            if (is_ours and self._state.config.start) or not backend.present(self._name):
                continue
            with suppress(RulesUnavailable):
                backend.remove(self._name)
                _log.info("stale rules removed", rules=backend.name)

    # Stopping

    def _stop(self) -> None:
        """Nothing new; tcp-relay resets what lives."""
        self._worker.policy = None
        now = self._loop.now
        for row in self.nat:
            if row.gport is not None and row.closed_at is None:
                self._relays.abort(row, now)
        self._wait_for_resets(now + STOP_WITHIN)

    def _wait_for_resets(self, deadline: float) -> None:
        alive = any(row.gport is not None and row.closed_at is None for row in self.nat)
        now = self._loop.now
        if alive and now < deadline:
            self._stopping = self._loop.call_at(
                now + _SOON, lambda: self._wait_for_resets(deadline)
            )
        else:  # one turn more: the last resets are in the queue
            self._stopping = self._loop.call_at(now + 2 * _SOON, self._finish_stopping)

    def _finish_stopping(self) -> None:
        if self._stopping:
            self._stopping.cancel()
            self._stopping = None
        if self._queue is not None:
            self._abandon()
            _log.info("relaying stopped")
        if self._leaving:
            self._loop.stop()
        self._publish()

    def _abandon(self) -> None:
        """Rules out, queue unbound, rows gone, whatever of these there is."""
        self._worker.policy = None
        if self._backend is not None and self._queue is not None:
            try:
                self._backend.remove(self._name)
            except RulesUnavailable as error:
                _log.error("rules can't be removed; try: krelay clean", reason=error)
        self._spec = None
        if self._queue is not None:
            self._loop.remove(self._queue.fileno())
            self._queue.close()
            self._queue = None
        self.nat.clear()

    def _leave(self) -> None:
        if self._leaving:  # asked twice: at once
            self._finish_stopping()
            return
        self._leaving = True
        if self._queue is None:
            self._loop.stop()
        elif not self._stopping:
            self._stop()

    def _interrupted(self) -> None:
        self._exit_status = 128 + signal.SIGINT
        self._leave()

    # Now and then

    def _serve_queue(self, _: int) -> None:
        if self._queue is None:
            return
        try:
            self._queue.serve()
        except OSError as error:
            _log.error("the queue is lost", reason=error)
            self._abandon()
            self._failure = f"the queue is lost: {error}"
            self._publish()

    def _links_changed(self, _: int) -> None:
        self._links.drain()
        if self._queue is None or self._stopping:
            return
        view = _look(self._state.config.real_ip)
        if view != self._view:
            self._view = view
            self._worker.policy = self._policy()
            self._refresh_rules()

    def _tick(self) -> None:
        now = self._loop.now
        self.nat.expire(now)
        self._relays.on_time(now)
        self._control.on_time(now)
        self._refresh_rules()
        self._warn_of_overflow(now)
        self._loop.call_at(now + TICK, self._tick)

    def _dropped(self) -> tuple[int, int]:
        served = figures(self._queue_num) if self._queue else None
        if served is None:
            return self._dropped_before
        return served.queue_dropped, served.socket_dropped

    def _warn_of_overflow(self, now: float) -> None:
        lost = sum(self._dropped())
        if lost <= self._overflows_told:
            self._overflows_told = min(lost, self._overflows_told)
            return
        held_back = self._overflow_warning.admit(now)
        if held_back is not None:
            _log.warning(
                "the queue overflowed: packets dropped by the kernel",
                packets=lost - self._overflows_told,
                in_all=lost,
            )
            self._overflows_told = lost


def serve(root: Path, queue_num: int) -> int:
    """Runs the daemon in the foreground; its exit status.  Raises CannotServe.

    The cyclic collector is off: it would walk every row there is, and who ends a row cuts the
    circle between it and its rewrites.
    """
    with Loop() as loop:
        daemon = Daemon(loop, root, queue_num)
        if (problem := notify.ready()) is not None:
            _log.warning("the service manager can't be told", error=problem)
        gc.collect()
        gc.freeze()
        gc.disable()
        return daemon.run()


def _raw_sender() -> RawSender:
    try:
        return RawSender()
    except PermissionError:
        raise CannotServe(
            "needs root, or CAP_NET_ADMIN and CAP_NET_RAW, for the rules and the queue; try sudo"
        ) from None


def _look(server: IPv4Address) -> HostView:
    """As links.look; the netlink library leaves circles behind, and the collector is off."""
    view = look(server)
    gc.collect(0)
    return view


def _ports(config: Config, proto: str) -> frozenset[int]:
    return frozenset(
        port
        for service in config.services
        if service.proto == proto
        for port in range(service.first, service.last + 1)
    )
