"""tcp-relay: file tree -> gateway -> relay <-> krelay, on one loop.

It has no start and stop of its own: it listens where `gport` says, and a client that krelay sends
there is served.  Fallen silent are only those that krelay knows nothing of.

Of several workers each follows the tree, listens and talks to krelay by itself.
"""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from knet.loop import Loop
from krelay.registration.messages import Report
from procfs_sim import Config
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.relay.follower import ConfigFollower
from tcp_relay.relay.gateway import Gateway
from tcp_relay.relay.relay import Relay
from tcp_relay.service.service import RelayService

REPORT = 1.0
"""Seconds between looks at whether krelay is to be told new counters."""


class TcpRelayDaemon:
    """One worker on the tree at `root`, the `index`th `of` so many.

    It `follows_stall` in the tree, or has that limit from its command line.  `keeps_dscp`: each leg
    sends with the DSCP with which the other end does.
    """

    def __init__(
        self,
        loop: Loop,
        root: Path,
        limits: SessionLimits,
        ready: Callable[[], None],
        index: int,
        of: int,
        follows_stall: bool = True,
        keeps_dscp: bool = True,
    ) -> None:
        self._loop = loop
        self._tell_ready = ready
        self._is_ready = False
        self._follows_stall = follows_stall
        self._reported: Mapping[str, int] = {}
        self._worker = secrets.token_hex(4)
        self._engine = Engine(loop, limits, self._on_room)
        self._relay = Relay(self._engine, root / "relay.sock", (index, of), keeps_dscp)
        self._gateway = Gateway(
            loop,
            self._relay.accepted,
            self._relay,
            shared=of > 1,
            room=lambda: self._engine.room,
        )
        self._follower = ConfigFollower(loop, root, self._configured)
        self._service = RelayService(loop, self._engine, self._stop_accepting)
        self._report()

    def run(self) -> int:
        """Serves until a signal ends it; the exit status."""
        try:
            return self._service.run()
        finally:
            self._relay.close()

    def _configured(self, config: Config) -> None:
        self._relay.real_ip = str(config.real_ip)
        if self._follows_stall:
            self._engine.use_stall(config.timeouts_stall)
        self._gateway.listen_on(config.gport)
        if self._gateway.port is not None and not self._is_ready:
            self._is_ready = True
            self._tell_ready()

    def _stop_accepting(self) -> None:
        self._follower.close()
        self._gateway.close()

    def _on_room(self) -> None:
        self._gateway.resume()
        self._service.on_room()

    def _report(self) -> None:
        self._loop.call_at(self._loop.now + REPORT, self._report)
        self._service.on_time()
        counts = self._engine.report()
        if counts != self._reported:
            self._reported = counts
            self._relay.report(Report(self._worker, counts))
