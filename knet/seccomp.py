"""System calls that a process may make from now on, and no others (seccomp(2)), by libseccomp.

The library turns names into the numbers of this machine and the rules into the kernel's program;
it is a part of systemd and apt, so Debian and Ubuntu always have it.  A handful of its functions is
called here directly.  (Of the bindings on PyPI, pyseccomp had its last release in 2021 and starts
ldconfig and gcc when it is imported, to find the library.)

What happens to a call that isn't in the table is a choice between two mistakes.  To kill for it
means that an update of libc, which begins to use a new call where an old one did, ends a relay that
has done nothing wrong.  To refuse all the same way means that an attacker who has taken the process
over may go on trying.  So there are two answers.  What no relay ever does, under no libc (run a
program, trace another process, load a module), kills the process: its parent starts another, and
the log has the signal, SIGSYS.  All else fails with ENOSYS, "this kernel has no such call", upon
which libc takes the older one, and Python raises an OSError; the kernel's audit log has it.
"""

import ctypes
import errno
import os
from collections.abc import Iterable
from typing import NamedTuple

LIBRARY = "libseccomp.so.2"

_KILL_PROCESS, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000  # linux/seccomp.h
_BAD_ARCH, _TSYNC, _LOG, _SSB, _OPTIMIZE = 2, 4, 6, 7, 8  # enum scmp_filter_attr (seccomp.h)
_EQUAL, _MASKED_EQUAL = 4, 7
"""enum scmp_compare."""
_BINARY_TREE = 2
_UNKNOWN = -1
"""__NR_SCMP_ERROR: the library has never heard of that call."""


class Condition(NamedTuple):
    """The argument with that number, as far as the mask goes, has this value."""

    argument: int
    value: int
    mask: int | None = None


class SyscallRule(NamedTuple):
    """A call that is allowed, where all conditions hold."""

    call: str
    conditions: tuple[Condition, ...] = ()


class FilterUnavailable(Exception):
    """There is no filter.  The text says why."""


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp (seccomp.h)."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def load(allowed: Iterable[SyscallRule], deadly: Iterable[str]) -> None:
    """From now on all threads of this process make these calls alone, and so do its children.

    A call that neither this machine's kernel nor the library knows is left out.  It is for good:
    another filter can only allow less.  Raises FilterUnavailable, and then nothing has changed.
    """
    library = _library()
    context = library.seccomp_init(_ERRNO | errno.ENOSYS)
    if not context:
        raise FilterUnavailable("libseccomp can't make a filter")
    try:
        # Calls of another architecture (x86's 32-bit ones) would be beside all rules.
        _check(library.seccomp_attr_set(context, _BAD_ARCH, _KILL_PROCESS))
        _check(library.seccomp_attr_set(context, _TSYNC, 1))
        for attribute, value in ((_LOG, 1), (_SSB, 1), (_OPTIMIZE, _BINARY_TREE)):
            library.seccomp_attr_set(context, attribute, value)  # what it has of them
        for call in deadly:
            _add(library, context, _KILL_PROCESS, SyscallRule(call))
        for rule in allowed:
            _add(library, context, _ALLOW, rule)
        _check(library.seccomp_load(context))
    finally:
        library.seccomp_release(context)


def _add(library: ctypes.CDLL, context: int, action: int, rule: SyscallRule) -> None:
    number = library.seccomp_syscall_resolve_name(rule.call.encode())
    if number == _UNKNOWN:
        return
    compares = (_Compare * len(rule.conditions))(*map(_compare, rule.conditions))
    _check(library.seccomp_rule_add_array(context, action, number, len(rule.conditions), compares))


def _compare(condition: Condition) -> _Compare:
    argument, value, mask = condition
    if mask is None:
        return _Compare(argument, _EQUAL, value, 0)
    return _Compare(argument, _MASKED_EQUAL, mask, value)


def _check(result: int) -> None:
    if result < 0:
        raise FilterUnavailable(f"the system call filter was refused: {os.strerror(-result)}")


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise FilterUnavailable(f"there is no {LIBRARY}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    library.seccomp_init.argtypes, library.seccomp_init.restype = (number,), pointer
    library.seccomp_release.argtypes, library.seccomp_release.restype = (pointer,), None
    library.seccomp_load.argtypes = (pointer,)
    library.seccomp_attr_set.argtypes = (pointer, ctypes.c_int, number)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_rule_add_array.argtypes = (
        *(pointer, number, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Compare),
    )
    return library
