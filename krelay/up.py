"""`krelay up`: the daemon and tcp-relay together, in the foreground, until Ctrl-C.

Both run as processes of their own, as they would under a service manager, and are told to end if
this one dies in whatever way.  tcp-relay needs no privilege: it gives root up before it opens its
first socket, and runs as user `krelay`, or where there is none as a user id that is nobody else's
(privileges.py).  What wasn't there before is gone afterwards, the file tree included.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krelay import children, client, privileges, treelock
from krelay.clean import remove_tree
from krelay.doctor import checks
from krelay.doctor import command as doctor
from krelay.privileges import Account, NoAccount
from procfs_sim import trust
from procfs_sim.ondisk import FileTree

START_WITHIN = 20.0
"""Seconds; a slow machine probes the kernel in one or two."""
TAKEN_FOR = 1.0
"""Seconds after which a gateway port that is in use is taken for another program's."""
STOP_WITHIN = 5.0
_FIRST_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_PAUSE = 0.02
_WATCH = 0.1


class UpFailed(Exception):
    """One of the two couldn't run.  The text says why."""


@dataclass(frozen=True, slots=True)
class Child:
    """One of the two."""

    name: str
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raises UpFailed if it has ended."""
        status = self.process.poll()
        if status is not None:
            raise UpFailed(f"{self.name} ended with exit status {status}; its log says why")

    def end(self) -> None:
        """SIGTERM, and if that takes too long SIGKILL."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_WITHIN)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def run(root: Path, values: Mapping[str, str], options: list[str]) -> int:
    """Serves with these values (file -> text, checked already) until KeyboardInterrupt or SIGTERM.

    Raises UpFailed; trust.Untrusted if others can change the tree.
    """
    trust.check(root)
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
        daemon = children.start("krelay", "daemon", *tree, *options, *_relay_group(who))
        both.append(Child("krelay", daemon))
        _wait(both, "krelay doesn't answer", lambda: bool(_status(root)))
        config = _checked(root, values)
        _refuse_low_port(who, int(config["gport"]))
        as_whom = ("--user", str(who)) if who else ()
        both.append(Child("tcp-relay", children.start("tcp_relay", *tree, *as_whom)))
        _wait(both, "tcp-relay isn't ready", _served(root))
        _look_first(root)
        _write(root, {"start": "1"})
        _wait(both, "krelay isn't running", lambda: _is_running(root))
        print(
            f"relaying to {config['real_ip']}: {config['services']} "
            f"(rules by {_status(root)['rules']}); tcp-relay runs as {_in_words(who)}; "
            "Ctrl-C ends it",
            flush=True,
        )
        while True:
            for child in both:
                child.check()
            time.sleep(_WATCH)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for child in both:  # krelay first: it has tcp-relay reset its connections
            child.end()
        if not existed:
            remove_tree(root)
        else:
            _write(root, {"start": "0"})


def _look_first(root: Path) -> None:
    """Says what is wrong with this host before the first packet.  Raises UpFailed."""
    failed = doctor.before_start(root)
    fatal = checks.fatal(failed)
    doctor.say(finding for finding in failed if finding not in fatal)
    if fatal:
        raise UpFailed(fatal[0])


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
        raise UpFailed(errors[0].partition(";")[0] if errors else "a value was refused")
    return config


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
