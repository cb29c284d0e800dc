"""A destination's addresses, looked up again and again without the loop ever waiting for it.

getaddrinfo knows all that the system knows: /etc/hosts, DNS, whatever nsswitch.conf names, and the
order in which addresses are best tried (RFC 6724).  But it blocks, for 30 seconds if the name
server is dead, and it tells no TTL.  So it runs in a thread, and what it found is good for FRESH
seconds, an error as well: neither a busy proxy nor a wrong name makes more than a look-up a second.
A look-up is made only for a client; another client that comes meanwhile waits for the same one.

A name server that fails is no reason to fail too.  If a look-up ends in an error, or takes longer
than PATIENCE, the last known addresses serve, with a warning.  The slow one isn't given up: while
it lasts, no other client has to wait, and what it finds in the end counts.  It ends by itself
(resolv.conf(5): timeout and attempts), so there is never more than one thread.  Without any address
from before, all clients wait for the end of it; the caller limits how long.  They also wait where a
look-up can't be made for want of a descriptor, memory or a thread: it is made as soon as it can be.

The thread holds up nothing.  It is a daemon thread, which the end of the process doesn't wait for;
and it alone owns the writing end of the pipe that it closes when it is done.  The loop, or `close`,
closes only the reading end: a look-up that comes back late finds no other file under its number.

A numeric address needs no look-up and no thread; reading one is quick.  It is read again each
FRESH seconds all the same: in fe80::1%eth0 eth0 stands for a number that changes when the interface
is made anew.
"""

import argparse
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import NamedTuple, cast

from knet.log import Failures, Log, Throttle
from knet.loop import Loop, Timer
from tcp_relay.engine.sockets import NO_ROOM

FRESH = 1.0
"""Seconds that a result is used without another look-up."""

AGAIN = 0.1
"""Seconds until a look-up is tried again that this host had no descriptor or memory for."""

PATIENCE = 1.0
"""Seconds that a look-up may take before the addresses from before are used."""

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
_FAMILIES = (socket.AF_INET, socket.AF_INET6)

log = Log("resolver")


class Address(NamedTuple):
    """Where to connect a stream socket of that family."""

    family: socket.AddressFamily
    sockaddr: tuple[str, int] | tuple[str, int, int, int]


Answer = list[Address] | OSError
"""One address at least, the best first, each once; or an error whose text is a sentence."""


class Resolver:
    """The addresses of `host` (name or number, IPv6 also in brackets) with `port`."""

    def __init__(self, loop: Loop, host: str, port: int) -> None:
        self._loop = loop
        self._host = _without_brackets(host)
        self._port = port
        self._answer: Answer = OSError(f"{self._host}: not looked up yet")
        self._fresh_until = loop.now
        self._waiting: list[Callable[[Answer], None]] = []
        self._lookup: _Lookup | None = None
        self._patience: Timer | None = None
        self._again: Timer | None = None
        self._complaints = Throttle()
        self._failures = Failures(log)

    def ask(self, done: Callable[[Answer], None]) -> None:
        """Calls `done(answer)` once: at once if nothing has to be waited for, else from the loop.

        The list is everybody's: not to be changed.  After `close` there are no more calls.
        """
        if self._lookup is None and self._again is None and self._loop.now >= self._fresh_until:
            self._look_up()
        if self._lookup is None and (self._again is None or isinstance(self._answer, list)):
            done(self._answer)
        elif self._patience is not None and not self._patience.pending:
            self._complain(f"no answer within {PATIENCE:g} s")
            done(self._answer)
        else:
            self._waiting.append(done)

    def close(self) -> None:
        """Those that wait aren't called any more.  May be called twice."""
        self._waiting.clear()
        self._finish()
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _look_up(self) -> None:
        with suppress(OSError, ValueError):
            self._settle(_addresses(self._host, self._port, _NUMERIC))
            return
        try:
            lookup = _Lookup(self._host, self._port)
        except OSError as error:
            self._look_up_again(error)
            return
        try:
            self._loop.add(lookup.reader, select.EPOLLIN, self._found)
        except OSError as error:
            os.close(lookup.reader)
            self._look_up_again(error)
            return
        self._lookup = lookup
        if isinstance(self._answer, list):
            self._patience = self._loop.call_at(self._loop.now + PATIENCE, self._late)

    def _look_up_again(self, error: OSError) -> None:
        """There was no descriptor, no memory or no thread for it; the session waits."""
        self._failures.tell(self._loop.now, "no look-up now", error, host=self._host)
        self._again = self._loop.call_at(self._loop.now + AGAIN, self._retry)
        if isinstance(self._answer, list):
            self._tell()

    def _retry(self) -> None:
        self._again = None
        if self._waiting:
            self._look_up()
        if self._lookup is None and self._again is None:
            self._tell()

    def _found(self, _: int) -> None:
        assert self._lookup is not None
        answer = self._lookup.answer
        self._finish()
        if isinstance(answer, HostFailed):
            self._look_up_again(answer)
            return
        self._settle(answer)
        self._tell()

    def _late(self) -> None:
        if self._waiting:
            self._complain(f"no answer within {PATIENCE:g} s")
        self._tell()

    def _settle(self, answer: Answer) -> None:
        """From now on this is the answer, unless addresses from before are better than an error."""
        self._fresh_until = self._loop.now + FRESH
        if isinstance(answer, OSError) and isinstance(self._answer, list):
            self._complain(str(answer).removeprefix(f"{self._host}: "))
        else:
            self._answer = answer

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(self._answer)

    def _finish(self) -> None:
        """No look-up is under way, or none that concerns us."""
        if self._lookup is not None:
            self._loop.remove(self._lookup.reader)
            os.close(self._lookup.reader)
            self._lookup = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _complain(self, error: str) -> None:
        if (suppressed := self._complaints.admit(self._loop.now)) is not None:
            log.warning(
                "the addresses from before are used",
                host=self._host,
                error=error,
                suppressed=suppressed or None,
            )


class HostFailed(OSError):
    """Nothing was looked up: this host had no descriptor or no memory for it."""


class _Lookup:
    """One getaddrinfo in a thread.  Raises OSError for want of a descriptor or a thread."""

    def __init__(self, host: str, port: int) -> None:
        self.answer: Answer = OSError(f"{host}: the look-up failed")
        """Valid once `reader` is at its end."""
        self.reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            Thread(target=self._run, args=(host, port, writer), daemon=True).start()
        except RuntimeError as error:
            os.close(self.reader)
            os.close(writer)
            raise OSError(str(error)) from None

    def _run(self, host: str, port: int, writer: int) -> None:
        try:
            self.answer = _addresses(host, port)
        except OSError as error:
            kind = HostFailed if _is_of_the_host(error) else OSError
            self.answer = kind(f"{host}: {error.strerror or error}")
        except ValueError:  # a label of more than 63 characters, or none: no DNS name
            self.answer = OSError(f"{host}: not a host name")
        finally:
            os.close(writer)


def _is_of_the_host(error: OSError) -> bool:
    """Whether getaddrinfo(3) had no memory, or a call of its own failed so that it passes."""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_MEMORY
    return error.errno in NO_ROOM  # EAI_SYSTEM


def host_name(text: str) -> str:
    """A name or address as it is, for argparse: raises ArgumentTypeError for what can't be one."""
    bare = _without_brackets(text)
    try:
        if not bare.isprintable() or " " in bare or not bare.encode("idna"):
            raise ValueError
        if bare != text:
            _addresses(bare, 0, _NUMERIC)
    except (OSError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host name or address") from None
    return text


def service_port(text: str) -> int:
    """A port from its number or its name (services(5)), for argparse.

    Raises ArgumentTypeError.

    >>> service_port("80")
    80
    """
    with suppress(OSError, ValueError, OverflowError):
        port = int(text) if text.isascii() and text.isdigit() else socket.getservbyname(text, "tcp")
        if 1 <= port <= 65535:
            return port
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a port from 1 to 65535, nor the name of a TCP service"
    )


def _without_brackets(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _addresses(host: str, port: int, flags: int = 0) -> list[Address]:
    """Raises OSError, or ValueError for what isn't a name at all."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    # A name may stand in several sources.  Families are those that this Python can connect.
    addresses = dict.fromkeys(
        Address(family, cast("tuple[str, int]", sockaddr))
        for family, _, _, _, sockaddr in found
        if family in _FAMILIES
    )
    if not addresses:
        raise OSError("no address")
    return list(addresses)
