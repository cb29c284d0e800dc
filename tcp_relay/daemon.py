"""The wiring of the daemon: file tree -> gateway -> relay <-> krelay, on one loop.

It has no start and stop of its own: it listens where `gport` says, and whoever krelay sends there
is served.  Fallen silent are only those that krelay knows nothing of.

The cyclic collector is off.  It walks all objects there are, tens of thousands of sockets and
pairs, for circles that this program doesn't leave behind: who ends a connection cuts the one circle
it has (and a test counts).
"""

import gc
import resource
import signal
from pathlib import Path

from krelay import notify
from krelay.log import Log
from krelay.loop import Loop
from procfs_sim import Config
from tcp_relay.gateway import Gateway
from tcp_relay.gport import TreeFollower
from tcp_relay.relay import Relay

log = Log("daemon")

INTERRUPTED = 128 + signal.SIGINT


class Daemon:
    """tcp-relay on the tree at `root`."""

    def __init__(self, loop: Loop, root: Path) -> None:
        self._loop = loop
        self._exit_status = 0
        self._is_ready = False
        self._relay = Relay(loop, root / "relay.sock", self._on_room)
        self._gateway = Gateway(loop, self._relay.accepted)
        self._follower = TreeFollower(loop, root, self._configured)
        loop.on_signal(signal.SIGTERM, self._stop)
        loop.on_signal(signal.SIGINT, self._interrupted)
        loop.on_signal(signal.SIGHUP, _ignored)

    def run(self) -> int:
        """Serves until a signal ends it; the exit status."""
        try:
            self._loop.run()
        finally:
            self._follower.close()
            self._gateway.close()
            self._relay.close("tcp-relay stops")
        log.info("stopped")
        return self._exit_status

    def _configured(self, config: Config) -> None:
        self._relay.real_ip = str(config.real_ip)
        self._gateway.listen_on(config.gport)
        if self._gateway.port is not None and not self._is_ready:
            self._is_ready = True
            if (problem := notify.ready()) is not None:
                log.warning("the service manager can't be told", error=problem)

    def _on_room(self) -> None:
        self._gateway.resume()

    def _stop(self) -> None:
        self._loop.stop()

    def _interrupted(self) -> None:
        self._exit_status = INTERRUPTED
        self._loop.stop()


def serve(root: Path) -> int:
    """Runs the daemon in the foreground."""
    raise_descriptor_limit()
    with Loop() as loop:
        daemon = Daemon(loop, root)
        gc.collect()
        gc.freeze()
        gc.disable()
        return daemon.run()


def raise_descriptor_limit() -> None:
    """A connection takes two descriptors: as many as this user may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ignored() -> None:
    """The file tree is followed as it changes: there is nothing to read again."""
