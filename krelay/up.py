"""`krelay up`: the daemon and tcp-relay together, in the foreground, until Ctrl-C.

Both run as processes of their own, as they would under a service manager, and are told to end if this
one dies in whatever way.  tcp-relay needs no privilege: where a user `krelay` exists it runs as that.
What wasn't there before is gone afterwards, the file tree included.
"""

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from krelay import client
from krelay.clean import remove_tree
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import SETTINGS

USER = "krelay"
START_WITHIN = 20.0
"""Seconds; a slow machine probes the kernel in one or two."""
STOP_WITHIN = 5.0
_PR_SET_PDEATHSIG = 1
_PAUSE = 0.02


class UpFailed(Exception):
    """One of the two couldn't run.  The text says why."""


def run(root: Path, values: Mapping[str, str], options: list[str]) -> int:
    """Serves with these values (file -> text, checked already); the exit status.

    Raises UpFailed.  KeyboardInterrupt and SIGTERM end it in order.
    """
    existed = (root / "start").exists()
    signal.signal(signal.SIGTERM, _interrupt)
    children: list[subprocess.Popen[bytes]] = []
    try:
        tree = FileTree(root)
        try:
            tree.create()
            for name in SETTINGS:
                if name in values:
                    tree.show(name, values[name] + "\n")
            tree.show("start", "1\n")
        except OSError as error:
            raise UpFailed(
                f"cannot write the file tree at {root}: {error.strerror}; "
                "run as root, or choose another place with --root"
            ) from None
        daemon = _child("krelay", ["daemon", "--root", str(root), *options])
        children.append(daemon)
        _wait_until_running(root, daemon)
        children.append(_child("tcp_relay", ["--root", str(root)], user=_relay_user()))
        _wait_until_connected(root, children)
        status = client.ask_json(root, "show status json")[0]
        print(
            f"relaying to {values.get('real_ip') or _text(root, 'real_ip')}: "
            f"{_text(root, 'services')} (rules by {status['rules']}); Ctrl-C ends it",
            flush=True,
        )
        return _watch(children)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for child in children:  # krelay first: it has tcp-relay reset its connections
            _end(child)
        if not existed:
            remove_tree(root)
        elif (root / "start").exists():
            tree.show("start", "0\n")


def _watch(children: list[subprocess.Popen[bytes]]) -> int:
    while True:
        for child in children:
            if child.poll() is not None:
                raise UpFailed(f"{_name(child)} ended with exit status {child.returncode}")
        time.sleep(0.1)


def _wait_until_running(root: Path, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            raise UpFailed("krelay could not start, see above")
        try:
            state = str(client.ask_json(root, "show status json")[0]["state"])
        except (client.NoDaemon, client.Rejected, OSError):
            state = ""
        if state == "running":
            return
        if state.startswith("failed: "):
            raise UpFailed(state.removeprefix("failed: "))
        time.sleep(_PAUSE)
    raise UpFailed(f"krelay isn't running after {START_WITHIN:.0f} seconds")


def _wait_until_connected(root: Path, children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline:
        for child in children:
            if child.poll() is not None:
                raise UpFailed(f"{_name(child)} could not start, see above")
        if client.ask_json(root, "show status json")[0]["tcp_relays"]:
            return
        time.sleep(_PAUSE)
    raise UpFailed("tcp-relay doesn't come to the relay socket")


def _child(module: str, arguments: list[str], user: str | None = None) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is ours to pass on, in order
        preexec_fn=die_with_parent,
        user=user,
        group=user and pwd.getpwnam(user).pw_gid,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _relay_user() -> str | None:
    try:
        return pwd.getpwnam(USER).pw_name if os.geteuid() == 0 else None
    except KeyError:
        return None


def _text(root: Path, name: str) -> str:
    return (FileTree(root).read(name) or "").strip()


def _name(child: subprocess.Popen[bytes]) -> str:
    return "krelay" if "krelay" in list(map(str, child.args))[2:3] else "tcp-relay"  # type: ignore[arg-type]


def _interrupt(_signum: int, _frame: object) -> None:
    raise KeyboardInterrupt
