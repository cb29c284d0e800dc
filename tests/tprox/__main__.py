"""`python -m tests.tprox [--stall SECONDS] [--only PHASE-PREFIX] [--list] COMMAND...`.

The exit status is 0 if all phases passed, 1 if not, 2 if the command line is wrong.
"""

import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType

from tests.tprox import plan
from tests.tprox.ends import Failure
from tests.tprox.field import Field, Ground
from tests.tprox.proxy import Proxy, free_ports
from tests.tprox.runner import run

HOST = "127.0.0.1"


def main(arguments: Sequence[str]) -> int:
    """Runs the tester; its exit status."""
    options = plan.parse(arguments)
    if not options.command:
        print(*(phase.name for phase in options.phases), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, _end)
    try:
        return 0 if passes(options) else 1
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def passes(options: plan.Options) -> bool:
    """Prints a line for each phase; whether all passed.  Raises Failure if there is no proxy."""
    first, second = free_ports()
    ground = Ground(
        listen=partial(socket.create_server, (HOST, 0), backlog=256),
        connect=partial(socket.create_connection, (HOST, first), 10),
        connect_chained=partial(socket.create_connection, (HOST, second), 10),
    )
    failed = 0
    with ExitStack() as stack:
        field = stack.enter_context(Field(ground))
        proxies: list[Proxy] = []
        chained = any(phase.chained for phase in options.phases)
        for port, listen in ((field.port, first), (first, second))[: 1 + chained]:
            command = plan.filled(options.command, HOST, port, listen)
            proxies.append(stack.enter_context(Proxy(command, listen)))

        def obituary() -> str | None:
            return next(filter(None, (proxy.obituary() for proxy in proxies)), None)

        for verdict in run(field, options.phases, options.stall, obituary):
            print(verdict, flush=True)
            failed += verdict.failure is not None
    return not failed


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
