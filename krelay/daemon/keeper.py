"""Keeps a file tree for as long as the daemon runs, whatever becomes of the disk it lies on.

All that the daemon writes to its tree goes through here, and so does each text that it reads.  A
write may fail: the disk is full, or can't be written any more.  The tree itself may be gone: it was
removed, replaced, unmounted, another process holds its lock, or others can change it now
(knet.trust).  None of that touches the values in force.  What couldn't be shown is kept, and
tried again every second until it is shown; what is wrong is logged when it begins and when it is
over, and stands in `show status`.

A write that fails is an event as any other (the file was opened for writing, and closed), and so is
the file that was made and couldn't be filled.  So of a file that waits to be written, the text that
was judged already is no news.
"""

import errno
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from knet.log import Log
from knet.loop import Loop
from knet.trust import Untrusted, in_words
from krelay.daemon.troubles import Troubles
from krelay.host import reserve, treelock
from krelay.host.reserve import NO_ROOM, Reserve
from procfs_sim.follower import TreeFollower
from procfs_sim.ondisk import FileTree, check
from procfs_sim.state import Outcome, TreeState
from procfs_sim.tree import SETTINGS, STATUS, in_force

_log = Log("tree")


class CannotKeep(Exception):
    """There is no tree to serve.  The text says why and what to do."""


class Renewable(Protocol):
    """A socket that lies in the tree."""

    @property
    def path(self) -> Path:
        """Where."""

    def renew(self) -> None:
        """Has it lie there again if it doesn't any more.  Raises OSError."""


class TreeKeeper:
    """Takes the tree at `root`, which is made if need be.  Raises CannotKeep.

    `judged` is called with what has come of texts that were written; `status` are the texts of the
    status files.  `sockets` are kept in their places: the maker of the sockets sets it.
    """

    def __init__(
        self,
        loop: Loop,
        root: Path,
        state: TreeState,
        judged: Callable[[Outcome], None],
        status: Callable[[], Mapping[str, str]],
    ) -> None:
        self._loop = loop
        self._root = root
        self._state = state
        self._judged = judged
        self._status = status
        self._tree = FileTree(root)
        self._reserve = Reserve(root)
        self.sockets: Sequence[Renewable] = ()
        self._lock = self._take()
        self._follower = TreeFollower(loop, root, self._changed)
        self._is_lost = False
        self._unshown: dict[str, str | None] = {}
        """Settings whose files don't show the value in force, and the text that was judged."""
        self._published: dict[str, str] = {}
        self._troubles = Troubles(root)

    @property
    def state(self) -> str:
        """`ok`, or what is wrong: `real_ip: No space left on device`."""
        return self._troubles.state

    def left(self, name: str) -> str:
        """What a krelay before has left in this file; empty if it can't be read."""
        try:
            return self._tree.read(name) or ""
        except OSError:
            return ""

    def begin(self) -> Outcome:
        """Watches and reads the tree; what comes of it.  Raises OSError."""
        self._watch()
        texts = self._follower.read_all()
        outcome = self._state.written(texts, self._loop.now)
        self._write_back(outcome)
        self._fill_reserve()
        return outcome

    def close(self) -> None:
        """Leaves the tree as it is."""
        self._follower.stop()
        os.close(self._lock)

    def read_again(self) -> None:
        """Judges all files anew, written or not."""
        if self._is_lost:
            return
        texts: dict[str, str | None] = {}
        for name in SETTINGS:
            try:
                texts[name] = self._tree.read(name)
            except OSError as error:
                self._troubles.begin(name, in_words(error))
                self._follower.forget(name, error)
        self._unshown.clear()
        self._judge(texts)

    def late(self) -> None:
        """Judges what has been empty for too long: call at the state's deadline."""
        self._finish(self._state.on_time(self._loop.now))

    def publish(self) -> None:
        """Shows state, values and errors in the status files, where they differ from before."""
        self._publish(STATUS)

    def _publish(self, names: Collection[str]) -> None:
        for name, text in self._status().items():
            if name not in names or self._published.get(name) == text:
                continue
            if self._is_lost:  # whose the place is now, isn't known
                return
            try:
                self._with_room(partial(self._tree.publish, name, text))
            except OSError as error:
                self._troubles.begin(name, in_words(error))
            else:
                self._published[name] = text
                self._troubles.end(name)
        self._troubles.tell(self._loop.now)

    def on_time(self) -> None:
        """Tries again what has failed; call about once a second."""
        if not self._is_lost:
            self._check()
        if self._is_lost:
            self._take_again()
        if not self._is_lost:
            self._look_again()
            self._show_again()
            self._renew_sockets()
            self.publish()
            if not self._unshown:
                self._fill_reserve()
        self._troubles.tell(self._loop.now)

    # Taking the tree, and losing it

    def _take(self) -> int:
        try:
            self._tree.create_directories()
            lock = treelock.take(self._root)
            if lock is not None:
                self._tree.create()
        except Untrusted as error:
            raise CannotKeep(str(error)) from None
        except OSError as error:
            raise CannotKeep(
                f"cannot create the file tree at {self._root}: {error.strerror}; "
                "run as root, or choose another place with --root"
            ) from None
        if lock is None:
            raise CannotKeep(
                f"another krelay serves {self._root}; stop it, or choose another tree with --root"
            )
        return lock

    def _take_again(self) -> None:
        """The directories were removed or replaced: everything in force is shown again."""
        try:
            self._tree.create_directories()
            lock: int | None = self._lock
            if not treelock.holds(self._root, self._lock):
                lock = treelock.take(self._root)
            if lock is None:
                raise OSError(errno.EBUSY, f"another process serves {self._root}")
            if lock != self._lock:
                before, self._lock = self._lock, lock
                with suppress(OSError):
                    os.close(before)
            found = self._tree.read_all()
        except OSError as error:
            self._troubles.begin("", in_words(error))
            return
        self._is_lost = False
        self._troubles.end_all()
        self._published.clear()
        self._unshown.clear()
        for name in SETTINGS:
            text = in_force(name, self._state.config) + "\n"
            self._follower.saw(name, text)
            try:
                self._with_room(partial(self._tree.show, name, text))
            except OSError as error:
                self._unshown[name] = found[name]
                self._troubles.begin(name, in_words(error))
        try:
            self._watch()
        except OSError as error:
            self._lose(in_words(error))
            return
        self._renew_sockets()
        self.publish()
        _log.warning("the file tree is made again, with what is in force", root=self._root)

    def _check(self) -> None:
        """Finds out whether the tree is still ours, and ours alone."""
        try:
            check(self._root)
            if not treelock.holds(self._root, self._lock):
                self._lose("it was replaced, or its lock removed")
            elif self._follower.is_watching:
                self._troubles.end("")
        except Untrusted as error:
            self._lose(str(error))
        except OSError as error:  # the next time will tell
            self._troubles.begin("", in_words(error))

    def _lose(self, why: str) -> None:
        self._is_lost = True
        self._follower.stop()
        self._troubles.begin("", why)

    def _watch(self) -> None:
        """Has changes told, if the kernel can; else the tree is looked at every second."""
        if self._follower.watch() is not None:
            self._troubles.begin(
                "",
                "no inotify watch is left, so it is looked at every second; "
                "raise fs.inotify.max_user_instances and max_user_watches",
            )
        else:
            self._troubles.end("")

    # Texts that were written

    def _changed(self) -> None:
        texts = self._follower.changes()  # an OSError leaves its events where they are
        if self._follower.gone:
            self._lose("it was removed or replaced")
            self._take_again()
            self._troubles.tell(self._loop.now)
            return
        try:
            check(self._root)
        except Untrusted as error:
            self._lose(str(error))
            self._troubles.tell(self._loop.now)
            return
        except OSError as error:
            self._troubles.begin("", in_words(error))
        if any(name not in SETTINGS for name in texts):
            self._published.clear()  # a status file was written by others: say it again
            self.publish()
        self._judge(texts)

    def _look_again(self) -> None:
        """Reads what couldn't be read, or what may have changed while nothing is watched."""
        if not self._follower.is_watching:
            try:
                self._watch()
            except OSError as error:
                self._lose(in_words(error))
                return
            try:
                texts = self._follower.look()
            except OSError as error:
                self._troubles.begin("", in_words(error))
                return
            self._judge(texts)
        elif self._follower.unread:
            try:
                self._changed()
            except OSError as error:
                self._troubles.begin("", in_words(error))

    def _judge(self, texts: Mapping[str, str | None]) -> None:
        news = {
            name: text
            for name, text in texts.items()
            if not (name in self._unshown and self._unshown[name] == text)
        }
        for name in news:
            self._unshown.pop(name, None)
            self._troubles.end(name)
        for name, error in self._follower.unread.items():
            self._troubles.begin(name, in_words(error))
        if news:  # or what fails to be published would be published again for its own events
            self._finish(self._state.written(news, self._loop.now))
        self._troubles.tell(self._loop.now)

    def _finish(self, outcome: Outcome) -> None:
        self._publish({"status/errors"})  # a user whose text was put back finds the reason there
        self._write_back(outcome)
        self._judged(outcome)
        self._troubles.tell(self._loop.now)

    def _write_back(self, outcome: Outcome) -> None:
        failed = self._tree.write_back(outcome)
        while any(error.errno in NO_ROOM for error in failed.values()) and self._give_room():
            failed = self._tree.write_back(outcome)
        for name, error in failed.items():
            self._unshown[name] = outcome.judged[name]
            self._troubles.begin(name, in_words(error))

    def _show_again(self) -> None:
        for name, judged in list(self._unshown.items()):
            try:
                text = self._state.shown(name)
                self._with_room(partial(self._tree.show_if, name, judged, text))
            except OSError as error:
                self._troubles.begin(name, in_words(error))
            else:
                del self._unshown[name]
                self._troubles.end(name)

    # Room on the disk

    def _with_room(self, write: Callable[[], object]) -> None:
        """Writes; with the reserve's room, if there is no other.  Raises OSError."""
        while True:
            try:
                write()
                return
            except OSError as error:
                if error.errno not in NO_ROOM or not self._give_room():
                    raise

    def _give_room(self) -> bool:
        given = self._reserve.release()
        if given:
            self._troubles.begin(reserve.NAME, os.strerror(errno.ENOSPC))
        return given

    def _fill_reserve(self) -> None:
        try:
            self._reserve.fill()
        except OSError as error:
            self._troubles.begin(reserve.NAME, in_words(error))
        else:
            self._troubles.end(reserve.NAME)

    # Sockets

    def _renew_sockets(self) -> None:
        for each in self.sockets:
            name = each.path.name
            try:
                each.renew()
            except OSError as error:
                self._troubles.begin(name, in_words(error))
            else:
                self._troubles.end(name)
