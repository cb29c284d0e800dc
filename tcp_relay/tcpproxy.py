"""tcpproxy: the plain proxy.  No privilege, no netfilter, no krelay."""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from functools import partial

from knet import log, relayoptions
from knet.loop import Loop
from knet.usage import CommandParser
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.listener import PER_TURN, Accepted, Listener
from tcp_relay.engine.sockets import Socket, server_socket
from tcp_relay.proxy.proxy import Proxy
from tcp_relay.proxy.resolver import Resolver, host_name, service_port
from tcp_relay.service.service import RelayService, run_program

PROGRAM = "tcpproxy"
EXAMPLE = """\
example:
  tcpproxy 192.168.0.1 80 8080        who connects to port 8080 here talks to port 80 there

Names are looked up again for later connections, and each address is tried in turn.  The server
sees this host's address; krelay is for keeping the client's.  SIGTERM lets running connections
finish, Ctrl-C resets them; SIGUSR1 prints a table of them.
"""


def parser() -> CommandParser:
    """What can be typed."""
    parser = CommandParser(
        prog=PROGRAM,
        description="A plain TCP proxy that survives hung peers.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_version()
    parser.add_argument(
        "host",
        metavar="DESTINATION-HOST",
        type=host_name,
        help="name or address, IPv4 or IPv6",
    )
    parser.add_argument("port", metavar="DESTINATION-PORT", type=service_port, help="or its name")
    parser.add_argument("listen_port", metavar="LISTEN-PORT", type=service_port)
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="accept at this address only (all, IPv4 and IPv6)"
    )
    relayoptions.add_options(parser)
    log.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs tcpproxy; the exit status (0, 1, 2 for wrong usage, 130 after Ctrl-C)."""
    asked = parser().read(arguments)
    return run_program(
        PROGRAM,
        asked,
        lambda limits, _, ready: _serve(asked, limits, ready),
        before=lambda: _refuse_to_share(asked),
        in_words=lambda error: _sentence(asked, error),
    )


def _serve(asked: argparse.Namespace, limits: SessionLimits, ready: Callable[[], None]) -> int:
    with Loop() as loop:
        resolver = Resolver(loop, asked.host, asked.port)
        engine = Engine(loop, limits)
        proxy = Proxy(engine, resolver)
        listeners: list[Listener] = []

        def stop_accepting() -> None:
            for listener in listeners:
                listener.close()

        def on_room() -> None:
            for listener in listeners:
                listener.resume()
            service.on_room()

        # Before any process can see it listening: a signal would find no handler, and end it.
        service = RelayService(loop, engine, stop_accepting)
        engine.on_room = on_room
        listeners += _listeners(
            loop, asked, asked.workers > 1, proxy.accepted, proxy.spare, lambda: engine.room
        )
        log.Log("proxy").info(
            "listening",
            address=asked.listen or "all",
            port=asked.listen_port,
            destination=f"{asked.host}:{asked.port}",
        )
        ready()
        try:
            return service.run()
        finally:
            resolver.close()


def _listeners(
    loop: Loop,
    asked: argparse.Namespace,
    shared: bool,
    accepted: Accepted,
    spare: Callable[[], Socket] = server_socket,
    room: Callable[[], int] = lambda: PER_TURN,
) -> list[Listener]:
    """At the address asked for, or at all of IPv4 and of IPv6.  Raises OSError."""
    make = partial(
        Listener, loop, asked.listen_port, accepted, shared=shared, spare=spare, room=room
    )
    if asked.listen is not None:
        return [make(address=asked.listen)]
    listeners = [make(address="0.0.0.0")]
    try:
        listeners.append(make(address="::"))
    except OSError as error:
        if error.errno not in _NO_IPV6:
            listeners[0].abandon()
            raise
    return listeners


def _refuse_to_share(asked: argparse.Namespace) -> None:
    """Raises OSError if another program listens there.

    SO_REUSEPORT would let the workers in beside it.
    """
    if asked.workers == 1:
        return
    with Loop() as loop:
        for listener in _listeners(loop, asked, shared=False, accepted=lambda *_: None):
            listener.abandon()


def _sentence(asked: argparse.Namespace, error: OSError) -> str:
    where = f"port {asked.listen_port}" + (f" of {asked.listen}" if asked.listen else "")
    fix = _FIX.get(error.errno or 0)
    return f"can't listen on {where}: {(error.strerror or str(error)).lower()}" + (
        f"; {fix}" if fix else ""
    )


_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_FIX = {
    errno.EADDRINUSE: "end the program that listens there, or take another port",
    errno.EACCES: "take a port from 1024 up, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this host has no such address (ip address)",
}

if __name__ == "__main__":
    sys.exit(main())
