"""What the file tree says: the gateway port to listen on, and where the server is.

tcp-relay reads the same files as krelay, by the same rules, and never writes: a text that is
refused leaves the value in force here as it does there, and krelay alone puts it back into the
file.  A tree that isn't there yet, went away, or can be changed by others (knet.trust), is
waited for by looking again: inotify can't watch for a directory whose parents may not exist either.
Where the kernel has no watch left at all, the tree is looked at as well.  Until there is news, what
is in force stays.
"""

from collections.abc import Callable
from pathlib import Path

from knet import trust
from knet.log import Log, Throttle
from knet.loop import Loop, Timer
from procfs_sim import Config, Outcome, TreeState, ondisk
from procfs_sim.follower import LOOK, TreeFollower

RETRY = 0.1
"""Seconds between looks for a tree that isn't there."""

log = Log("gport")


class ConfigFollower:
    """Calls `on_config` with the first config and with each that differs from the one before.

    Begins with the next turn of the loop.
    """

    def __init__(self, loop: Loop, root: Path, on_config: Callable[[Config], None]) -> None:
        self._loop = loop
        self._root = root
        self._on_config = on_config
        self._state = TreeState()
        self._told: Config | None = None
        self._tree = TreeFollower(loop, root, self._changed)
        self._complaints = Throttle()
        self._is_waiting = False
        self._timer: Timer = loop.call_at(loop.now, self._begin)

    def close(self) -> None:
        """Stops following."""
        self._timer.cancel()
        self._tree.stop()

    def _begin(self) -> None:
        try:
            ondisk.check(self._root)
            # The watch first: what is written between it and the reading is read twice rather than
            # missed.
            no_watch = self._tree.watch()
            if no_watch is not None and self._root.is_dir():
                self._look(no_watch)
                return
            texts = self._tree.read_all()
        except OSError as error:
            self._tree.stop()
            self._wait(error)
            return
        if self._is_waiting:
            self._is_waiting = False
            log.info("the file tree is there", root=self._root)
        self._judged(self._state.written(texts, self._loop.now))

    def _look(self, error: OSError) -> None:
        """Reads what has changed since the last look, and looks again in a while."""
        self._timer = self._loop.call_at(self._loop.now + LOOK, self._begin)
        self._complain("can't watch the file tree; it is looked at every second", error)
        try:
            whole = self._tree.look()
        except OSError as reason:
            self._complain("can't read the file tree", reason)
            return
        self._judged(self._state.written(whole, self._loop.now))
        self._judged(self._state.on_time(self._loop.now))

    def _wait(self, error: OSError) -> None:
        self._timer = self._loop.call_at(self._loop.now + RETRY, self._begin)
        if isinstance(error, FileNotFoundError):
            if not self._is_waiting:
                log.warning("waiting for the file tree", root=self._root, fix="start krelay daemon")
        else:
            self._complain("can't read the file tree", error)
        self._is_waiting = True

    def _complain(self, what: str, error: OSError) -> None:
        if (suppressed := self._complaints.admit(self._loop.now)) is not None:
            log.error(
                what,
                root=self._root,
                error=trust.in_words(error),
                suppressed=suppressed or None,
            )

    def _changed(self) -> None:
        try:
            texts = self._tree.changes()
            if not self._tree.gone:
                ondisk.check(self._root)
        except OSError as error:
            self._tree.stop()
            self._wait(error)
            return
        if unread := self._tree.unread:
            self._complain("can't read the file tree", next(iter(unread.values())))
        if self._tree.gone or unread:  # all is read again
            self._tree.stop()
            self._timer.cancel()
            self._timer = self._loop.call_at(self._loop.now + RETRY, self._begin)
        self._judged(self._state.written(texts, self._loop.now))

    def _judged(self, outcome: Outcome) -> None:
        if outcome.config != self._told:
            self._told = outcome.config
            self._on_config(outcome.config)
        deadline = self._state.next_deadline()
        if deadline is not None and self._tree.is_watching:
            self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._late)

    def _late(self) -> None:
        self._judged(self._state.on_time(self._loop.now))
