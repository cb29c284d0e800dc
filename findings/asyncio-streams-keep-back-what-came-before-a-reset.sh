#!/usr/bin/env bash
#
# Python 3.11 (3.11.7; 3.12.1 and 3.13.0 alike): asyncio's StreamReader never gives out what had arrived before a reset.
#
# Guess: bytes that have arrived are read first, and the reset is told afterwards, as recv() does.
# Seen: once connection_lost() has brought the ConnectionResetError, each read() raises that, although the bytes lie in the
# reader's buffer; they can't be had by any public call.  recv() on a socket in the same state gives them.  So a relay or a
# client built on streams loses an answer that was whole, if its sender ended with a reset (SO_LINGER 0, or unread input).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/reset.py" <<'PYTHON'
import asyncio
import contextlib
import platform
import socket
import struct
import sys
import time

ANSWER = b"x" * 1000
LINGER_NOT = struct.pack("ii", 1, 0)


def answer_and_reset(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.sendall(ANSWER)
    time.sleep(0.1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    connection.close()


async def by_stream() -> tuple[int, str, int]:
    listener = socket.create_server(("127.0.0.1", 0))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    await asyncio.to_thread(answer_and_reset, listener)
    await asyncio.sleep(0.1)  # both have arrived, and nobody has read yet
    raised, got = "nothing", 0
    try:
        got = len(await reader.read(1 << 16))
    except ConnectionResetError as error:
        raised = type(error).__name__
    held = len(reader._buffer)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return got, raised, held


def by_socket() -> int:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as connection:
        answer_and_reset(listener)
        return len(connection.recv(1 << 16))


got, raised, held = asyncio.run(by_stream())
plain = by_socket()
print(f"Python {platform.python_version()}: recv() {plain} bytes; stream: {got} bytes and {raised}, {held} in its buffer")
sys.exit(not (plain == held == len(ANSWER) and (got, raised) == (0, "ConnectionResetError")))
PYTHON
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case "$version" in 3.11 | 3.12 | 3.13) ;; *) echo "Python $version; nothing was tried"; exit 1 ;; esac
unshare -n sh -c 'ip link set lo up && exec python3 "$1"' sh "$work/reset.py"
