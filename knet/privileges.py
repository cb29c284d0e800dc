"""What a process may do, and how it gives up for good what it needs no longer.

A process that talks to the network shall have nothing worth taking: no user id that owns anything,
no capability (capabilities(7)), no way to get one back by a program that is set-user-ID or has its
own (PR_SET_NO_NEW_PRIVS), and no process of the same user may read or steer it (PR_SET_DUMPABLE,
ptrace(2)).

Three things to know.  To empty the bounding set takes CAP_SETPCAP, so that comes before the user
changes.  Root's supplementary groups stay unless they are set as well, before the
user, too.  And a change of user takes away the wish to end with the parent (process.py), which is
then made again.

Capabilities belong to a thread: all of this is for a process that has one.
"""

import ctypes
import grp
import os
import pwd
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from knet import process

USER = "krelay"
"""The user that tcp-relay runs as where it exists; also the group that relay.sock is for."""
DYNAMIC = range(61184, 65520)
"""User ids that belong to no account: a service that needs one while it runs takes it from here
(systemd's DynamicUser, https://systemd.io/UIDS-GIDS)."""
_DYNAMIC_TAKEN = Path("/run/systemd/dynamic-uid")

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2  # linux/prctl.h
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
_VERSION_3 = 0x20080522  # linux/capability.h
_HEADER, _SETS = struct.Struct("=Ii"), struct.Struct("=6I")
_libc = ctypes.CDLL(None, use_errno=True)


class Cap(IntEnum):
    """Capabilities by the kernel's numbers (linux/capability.h)."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    KILL = 5
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    NET_RAW = 13
    SYS_PTRACE = 19
    BPF = 39


@dataclass(frozen=True, slots=True)
class Account:
    """The user and the groups that a process is to run as."""

    name: str
    """As people are told: `krelay`, or the number of a user that has no name."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary ones, the first included."""

    def __str__(self) -> str:
        """As `account` reads it."""
        return f"{self.uid}:{self.gid}" if self.name.isdecimal() else self.name


class NoAccount(Exception):
    """There is none to run as.  The text says what to do."""


def account(text: str) -> Account:
    """A user by name, or by the numbers `UID:GID`.  Raises NoAccount."""
    uid, colon, gid = text.partition(":")
    try:
        if colon:
            return Account(uid, int(uid), int(gid), (int(gid),))
        known = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except (KeyError, ValueError, OverflowError):
        raise NoAccount(f"there is no user {text!r}; a number is followed by its group's") from None
    return _of(known)


def unprivileged() -> Account:
    """What tcp-relay runs as: USER, or where there is none a user id that no one else has.

    Its group is USER's, where there is such a group: relay.sock is for that group.  Raises
    NoAccount if every id is taken, or none can be had in this user namespace.
    """
    with suppress(KeyError):
        return _of(pwd.getpwnam(USER))
    running = frozenset(_running())
    mapped = _mapped(Path("/proc/self/uid_map").read_text())
    first = os.getpid() % len(DYNAMIC)  # not the one that another krelay is just about to take
    for uid in (*DYNAMIC[first:], *DYNAMIC[:first]):
        if uid in running or not any(uid in ids for ids in mapped) or _is_known(uid):
            continue
        gid = group() if group() is not None else uid
        assert gid is not None
        return Account(str(uid), uid, gid, (gid,))
    raise NoAccount(
        f"there is no user {USER} to run tcp-relay as, and no free user id; make one: "
        f"useradd --system --no-create-home --shell /usr/sbin/nologin {USER}"
    )


def is_alone() -> bool:
    """Whether this user namespace has no user id but that of this process (`unshare -Ur`).

    Then its root is an ordinary process's user outside, or at least has no capability there.
    """
    mapped = _mapped(Path("/proc/self/uid_map").read_text())
    return sum(map(len, mapped)) == 1


def group() -> int | None:
    """The number of the group whose members may use relay.sock; None: there is none."""
    try:
        return grp.getgrnam(USER).gr_gid
    except KeyError:
        return None


def become(who: Account) -> None:
    """Runs as that user from now on, with nothing but its groups.  Raises OSError.

    For a process that is root; for one that is that user already it is `give_up`.
    """
    parent, with_parent = os.getppid(), _ends_with_parent()
    _empty_bounding_set(keep=())
    if os.geteuid() != who.uid or os.geteuid() == 0:
        set_groups(who.groups)
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
    give_up()
    if with_parent:
        process.die_with(parent)


def set_groups(groups: Iterable[int]) -> None:
    """Supplementary groups, for root: as far as its user namespace lets anybody have others.

    One that a user who isn't root has made doesn't (user_namespaces(7), "setgroups").  Raises
    OSError.
    """
    try:
        os.setgroups(list(groups))
    except PermissionError:
        if Path("/proc/self/setgroups").read_text().strip() != "deny":
            raise


def give_up(keep: Collection[Cap] = (), *, for_programs: bool = False) -> None:
    """Has no capability from now on but these, nor gets any, and can't be looked into.

    What of them it doesn't have it doesn't get.  `for_programs`: those that it starts have the
    same, which root's have anyway, and others' by the ambient set.  Raises OSError.
    """
    _empty_bounding_set(keep)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    kept = sum(1 << cap for cap in keep) & capabilities()
    _set_capabilities(kept, inherited=kept if for_programs else 0)
    for cap in keep:
        if for_programs and os.geteuid() != 0 and kept >> cap & 1:
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, cap)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)


def capabilities() -> int:
    """The effective ones of this thread, a bit each (1 << Cap)."""
    header, sets = _HEADER.pack(_VERSION_3, 0), ctypes.create_string_buffer(_SETS.size)
    if _libc.capget(header, sets):
        _fail("capget")
    low, _, _, high, _, _ = _SETS.unpack(sets.raw)
    return int(low | high << 32)


def _set_capabilities(held: int, inherited: int) -> None:
    """Effective and permitted; and inheritable."""
    low, high = held & 0xFFFFFFFF, held >> 32
    sets = _SETS.pack(low, low, inherited & 0xFFFFFFFF, high, high, inherited >> 32)
    if _libc.capset(_HEADER.pack(_VERSION_3, 0), sets):
        _fail("capset")


def _empty_bounding_set(keep: Collection[Cap]) -> None:
    """As far as this process may: without CAP_SETPCAP no_new_privs alone has to do."""
    cap = 0
    while (held := _libc.prctl(_PR_CAPBSET_READ, cap, 0, 0, 0)) >= 0:  # EINVAL after the last
        if held and cap not in keep and _libc.prctl(_PR_CAPBSET_DROP, cap, 0, 0, 0):
            return
        cap += 1


def _ends_with_parent() -> bool:
    number = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value != 0


def _prctl(option: int, argument: object, another: int = 0) -> None:
    value = ctypes.c_ulong(argument) if isinstance(argument, int) else argument
    if _libc.prctl(option, value, ctypes.c_ulong(another), *(ctypes.c_ulong(0),) * 2):
        _fail("prctl")


def _fail(call: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def _of(known: pwd.struct_passwd) -> Account:
    groups = os.getgrouplist(known.pw_name, known.pw_gid)
    return Account(known.pw_name, known.pw_uid, known.pw_gid, tuple(groups))


def _is_known(uid: int) -> bool:
    """Whether the number is in use, as a user's or a group's."""
    for look in (pwd.getpwuid, grp.getgrgid):
        with suppress(KeyError):
            look(uid)
            return True
    return (_DYNAMIC_TAKEN / str(uid)).exists()


def _running() -> Iterator[int]:
    """The user ids of all processes, real and other."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                for line in (entry / "status").read_text().splitlines():
                    if line.startswith("Uid:"):
                        yield from map(int, line.split()[1:])


def _mapped(text: str) -> list[range]:
    """The ids that exist in this user namespace (user_namespaces(7)).

    >>> _mapped("         0          0 4294967295\\n")
    [range(0, 4294967295)]
    """
    lines = (line.split() for line in text.splitlines())
    return [range(int(first), int(first) + int(count)) for first, _, count in lines]
