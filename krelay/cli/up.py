"""`krelay up`: the daemon and tcp-relay together, in the foreground, until Ctrl-C.

Both run as processes of their own, as they would under a service manager, and are told to end if
this one dies in whatever way.  One of the two that ends by itself is started again, at once and
then after longer and longer pauses; only one that doesn't stay up at all ends the whole.  While
krelay is away its rules stay, as they do under a service manager: what they catch is dropped, never
passed on unrewritten.  tcp-relay needs no privilege: it gives root up before it opens its first
socket, and runs as user `krelay`, or where there is none as a user id that is nobody else's
(privileges.py).  What wasn't there before is gone afterwards, the file tree included.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knet import children, privileges, trust
from knet.log import Log
from knet.privileges import Account, NoAccount
from knet.rules.run import RulesUnavailable
from krelay.control import client
from krelay.doctor import command as doctor
from krelay.host import cleanup, treelock
from procfs_sim import ondisk
from procfs_sim.ondisk import FileTree

START_WITHIN = 20.0
"""Seconds; a slow machine probes the kernel in one or two."""
TAKEN_FOR = 1.0
"""Seconds after which a gateway port that is in use is taken for another program's."""
STOP_WITHIN = 5.0
STEADY = 10.0
"""Seconds after which an end is no longer a sequel of the one before."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before another start, from the second on."""
MOST_STARTS = 10
"""In a row, after none of which a process has stayed up for STEADY."""
_FIRST_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_PAUSE = 0.02
_WATCH = 0.1


class UpFailed(Exception):
    """One of the two couldn't run.  The text says why."""


_log = Log("up")


class Child:
    """One of the two; runs from construction on."""

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        self.name = name
        self._command = (module, *arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._since = 0.0
        self._starts = 0
        """In a row, without a long life in between."""
        self._again_at: float | None = None
        self._how = ""
        """How it ended last; empty: it has not."""
        self._start()

    def check(self) -> None:
        """Raises UpFailed if it has ended."""
        if self._process is not None and (status := self._process.poll()) is not None:
            raise UpFailed(f"{self.name} {_how_it_ended(status)}; its log says why")

    def keep(self, now: float) -> None:
        """Starts it again if it has ended.  Raises UpFailed if that doesn't help."""
        if self._again_at is not None:
            if now >= self._again_at:
                self._start()
        elif self._process is not None and (status := self._process.poll()) is not None:
            self._lost(_how_it_ended(status), now)

    def end(self) -> bool:
        """SIGTERM, and if that takes too long SIGKILL; whether it has ended in order."""
        process = self._process
        if process is None:
            return False
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode in (0, 128 + signal.SIGINT)

    def _start(self) -> None:
        self._again_at = None
        self._since = time.monotonic()
        self._starts += 1
        module, *arguments = self._command
        try:
            self._process = children.start(module, *arguments)
        except OSError as error:
            if self._starts == 1:
                raise
            self._process = None
            self._lost(f"can't be started: {error.strerror}", self._since)

    def _lost(self, how: str, now: float) -> None:
        lived = now - self._since
        if lived >= STEADY:
            self._starts = 1
        if self._starts >= MOST_STARTS:
            raise UpFailed(f"{self.name} {how} {self._starts} times in a row; its log says why")
        pause = pause_before(self._starts + 1)
        self._again_at = now + pause
        _log.warning(f"{self.name} {how}", lived=round(lived, 1), again_in=pause)


def pause_before(start: int) -> float:
    """Seconds before the second start in a row, the third, ...

    >>> [pause_before(start) for start in range(2, 10)]
    [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    """
    return min(FIRST_PAUSE * 2.0 ** (start - 3), LONGEST_PAUSE) if start > 2 else 0.0


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:  # most real-time signals have no name
        return f"was ended by signal {-status}"


def run(
    root: Path,
    values: Mapping[str, str],
    options: Sequence[str],
    relay_options: Sequence[str] = (),
    *,
    look: bool = True,
) -> int:
    """Serves with these values (file -> text, checked already) until KeyboardInterrupt or SIGTERM.

    `options` are the daemon's, `relay_options` tcp-relay's; `look`: says what is wrong on this
    host.  Raises UpFailed; trust.Untrusted if others can change the tree.
    """
    ondisk.check(root)
    if treelock.is_served(root):
        raise UpFailed(f"another krelay serves {root}; stop it, or choose another tree with --root")
    root = root.absolute()
    who = _relay_account()
    existed = (root / "start").exists()
    signal.signal(signal.SIGTERM, _interrupt)
    both: list[Child] = []
    try:
        _write(root, {**values, "start": "0"})
        tree = ("--root", str(root))
        both.append(Child("krelay", "krelay", "daemon", *tree, *options, *_relay_group(who)))
        _wait(both, "krelay doesn't answer", lambda: bool(_status(root)))
        config = _checked(root, values)
        _refuse_low_port(who, int(config["gport"]))
        as_whom = ("--user", str(who)) if who else ()
        both.append(Child("tcp-relay", "tcp_relay", *tree, *as_whom, *relay_options))
        _wait(both, "tcp-relay isn't ready", _served(root))
        if look and (fatal := doctor.before_start(root)):
            doctor.say(each for each in doctor.after_start(root) if each != fatal[0])
            raise UpFailed(fatal[0])
        _write(root, {"start": "1"})
        _wait(both, "krelay isn't running", lambda: _is_running(root))
        if look:
            doctor.say(doctor.after_start(root))
        print(
            f"relaying to {config['real_ip']}: {config['services']} "
            f"(rules by {_status(root)['rules']}); tcp-relay runs as {_in_words(who)}; "
            "Ctrl-C ends it",
            flush=True,
        )
        while True:
            for child in both:
                child.keep(time.monotonic())
            time.sleep(_WATCH)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # krelay first: it has tcp-relay reset its connections
        in_order = [child.end() for child in both]
        if not all(in_order[:1]):
            _remove_rules(root)
        if not existed:
            cleanup.remove_tree(root)
        else:
            _write(root, {"start": "0"})


def _remove_rules(root: Path) -> None:
    """Those of a krelay that was killed and isn't started again."""
    try:
        cleanup.clean(root, keep_settings=True)
    except (cleanup.StillServed, RulesUnavailable, OSError) as error:
        _log.error("rules can't be removed", reason=error, fix="krelay clean")


def _write(root: Path, texts: Mapping[str, str]) -> None:
    tree = FileTree(root)
    try:
        tree.create()
        for name, text in texts.items():
            tree.show(name, text + "\n")
    except trust.Untrusted:
        raise
    except OSError as error:
        raise UpFailed(
            f"cannot write the file tree at {root}: {error.strerror}; "
            "run as root, or choose another place with --root"
        ) from None


def _wait(both: list[Child], what: str, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline:
        for child in both:
            child.check()
        try:
            if reached():
                return
        except (client.NoDaemon, client.Rejected, OSError):
            pass  # not yet
        time.sleep(_PAUSE)
    raise UpFailed(f"{what} after {START_WITHIN:.0f} seconds; see the log above")


def _checked(root: Path, values: Mapping[str, str]) -> dict[str, Any]:
    """The values in force.  Raises UpFailed if one of ours isn't: krelay knows why."""
    config = client.ask_json(root, "show config json")[0]
    if any(config[name] != text for name, text in values.items()):
        errors = (FileTree(root).read("status/errors") or "").splitlines()
        if ours := [line for line in errors if line.partition(":")[0] in values]:
            raise UpFailed(ours[0].partition(";")[0])
    return config  # or a user has written another value meanwhile


def _served(root: Path) -> Callable[[], bool]:
    """Whether clients would be led to tcp-relay.

    Raises UpFailed if another program has the port.  tcp-relay's own socket is another's, too,
    until it has been handed over, so that isn't believed at once.
    """
    taken_since: float | None = None

    def is_served() -> bool:
        nonlocal taken_since
        status, now = _status(root), time.monotonic()
        reason = str(status["gateway_port"])
        if " is in use by " not in reason:
            taken_since = None
        elif taken_since is None:
            taken_since = now
        elif now - taken_since > TAKEN_FOR:
            raise UpFailed(reason)
        return bool(status["tcp_relays"]) and reason in ("served", "unused")

    return is_served


def _is_running(root: Path) -> bool:
    state = str(_status(root)["state"])
    if state.startswith("failed: "):
        raise UpFailed(state.removeprefix("failed: "))
    return state == "running"


def _status(root: Path) -> dict[str, Any]:
    return client.ask_json(root, "show status json")[0]


def _relay_account() -> Account | None:
    """Whom tcp-relay is to become; None if this isn't root, and so it can't, or if there is nobody
    else in this user namespace.  Raises UpFailed.
    """
    if os.geteuid() != 0 or privileges.is_alone():
        return None
    try:
        return privileges.unprivileged()
    except NoAccount as error:
        raise UpFailed(str(error)) from None


def _relay_group(who: Account | None) -> tuple[str, ...]:
    """What krelay is told, so that this user may use relay.sock."""
    if who is None or privileges.group() in who.groups:
        return ()
    return ("--relay-gid", str(who.gid))


def _refuse_low_port(who: Account | None, gport: int) -> None:
    """Raises UpFailed if tcp-relay couldn't listen there."""
    first = int(_FIRST_PORT.read_text()) if _FIRST_PORT.exists() else 1024
    if who is not None and who.uid != 0 and gport < first:
        raise UpFailed(
            f"gport: {gport} is a port for root alone, and tcp-relay runs as {_in_words(who)}; "
            f"take one from {first} up"
        )


def _in_words(who: Account | None) -> str:
    if who is None:
        alone = " (this user namespace has no other)" if os.geteuid() == 0 else ""
        return f"user id {os.geteuid()}, like this command{alone}"
    if who.name == privileges.USER:
        return f"user {who.name}"
    return f"user id {who.uid}, which is nobody else's (there is no user {privileges.USER})"


def _interrupt(_signum: int, _frame: object) -> None:
    raise KeyboardInterrupt
