"""What is wrong with the file tree, for `show status` and for the log.

>>> troubles = Troubles(Path("/run/krelay"))
>>> troubles.begin("real_ip", "No space left on device"), troubles.state
(None, 'real_ip: No space left on device')
>>> troubles.end("real_ip"), troubles.state
(None, 'ok')
"""

from pathlib import Path

from knet.log import Log, Throttle

OK = "ok"
"""The state if nothing is wrong."""

_log = Log("tree")


class Troubles:
    """What is wrong with which file of the tree at `root`; "" stands for the tree."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._now: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._throttle = Throttle()

    @property
    def state(self) -> str:
        """`ok`, or what is wrong: `real_ip: No space left on device`."""
        lines = [f"{name}: {why}" if name else why for name, why in self._now.items()]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return lines[0] + more if lines else OK

    def begin(self, name: str, why: str) -> None:
        """This is wrong with that file."""
        self._now[name] = why

    def end(self, name: str) -> None:
        """Nothing is wrong with it any more."""
        self._now.pop(name, None)

    def end_all(self) -> None:
        """Nothing is wrong with any."""
        self._now.clear()

    def tell(self, now: float) -> None:
        """Says in the log what has become wrong, and when all is well again."""
        news = [name for name, why in self._now.items() if self._told.get(name) != why]
        if news:
            if (held_back := self._throttle.admit(now)) is not None:
                self._told = dict(self._now)
                _log.warning(
                    "the file tree can't be kept; what is in force stays",
                    root=self._root,
                    file=news[0] or None,
                    error=self._now[news[0]],
                    more=len(news) - 1 or None,
                    suppressed=held_back or None,
                )
        elif self._told and not self._now:
            self._told = {}
            _log.info("the file tree is kept again", root=self._root)
