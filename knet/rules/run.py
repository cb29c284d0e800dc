"""Runs nft, iptables and their like: what they print, and what their complaints mean."""

import errno
import os
import subprocess
from collections.abc import Iterable

from knet import children

TIMEOUT = 10.0
"""Seconds for one run of nft or iptables; they take milliseconds unless another run holds a
lock."""


class RulesUnavailable(Exception):
    """The kernel or the tools can't do it.  The text says what was tried and what is missing."""


class RulesDelayed(RulesUnavailable):
    """This host lacks what it takes at the moment (a descriptor, memory, a process): try again."""


class RulesAbsent(RulesUnavailable):
    """What the tool was asked about isn't there: no such table, no nf_tables, no tool."""


PASSING = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC),
    *(errno.EIO, errno.EROFS),
)
"""Errors of which a tool's complaint says that another try may go well."""
_HELD = 4
"""iptables(8): the lock of the tables is held by another run (RESOURCE_PROBLEM)."""
_ABSENT = (
    *(errno.ENOENT, errno.EINVAL),
    *(errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT),
)
"""Errors of which a tool's complaint says that there can't be what it was asked for."""


def run(command: tuple[str, ...], text: str = "") -> str:
    """What the command printed.  Raises RulesUnavailable with the last line of its complaint."""
    try:
        done = subprocess.run(
            command,
            input=text,
            env=children.environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise RulesAbsent(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired as error:
        raise RulesUnavailable(str(error)) from None
    except OSError as error:
        text = f"{command[0]}: {error.strerror}"
        raise (RulesAbsent if error.errno == errno.EACCES else RulesDelayed)(text) from None
    if done.returncode:
        complaint = _complaint(done.stderr)
        held = done.returncode == _HELD and "lock" in complaint
        if held or done.returncode < 0 or _is_of(PASSING, complaint):
            raise RulesDelayed(complaint or f"{command[0]}: exit status {done.returncode}")
        kind = RulesAbsent if _is_of(_ABSENT, complaint) else RulesUnavailable
        raise kind(complaint or f"{command[0]}: exit status {done.returncode}")
    return done.stdout


def _is_of(errors: Iterable[int], complaint: str) -> bool:
    return any(os.strerror(each) in complaint for each in errors)


def _complaint(stderr: str) -> str:
    """The telling line of a tool's error output: the first that is more than a hint."""
    hints = ("#", "Try ", "Error occurred at line")
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" ^~\t")]
    return ([line for line in lines if not line.startswith(hints)] or lines or [""])[0][:200]
