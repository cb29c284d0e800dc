"""A server for tests: TCP that sends, takes and echoes known bytes, UDP that echoes.

    python server.py ADDRESS tcp/80 tcp/443 udp/7

A TCP client sends one line and then what that asks for; a line of the log tells who it was:

    who                      the client's address as seen here, then everything back
    download SEED SIZE RATE  SIZE bytes of blob(SEED), RATE bytes a second (0: as fast as possible)
    upload                   takes all there is, answers with its length and SHA-256
    sip RATE                 the same, RATE bytes a second; 0: takes nothing, until it is gone
    both SEED SIZE           download and upload at once; the answer follows the bytes

A datagram comes back as it is, `who` with the sender's address; it is answered from the address it
came to.
"""

import hashlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from random import Random

BLOCK = 1 << 16


def blob(seed: int, size: int) -> Iterator[bytes]:
    """The bytes of this seed, in blocks that all differ: one lost, doubled or swapped is seen."""
    filler = Random(seed).randbytes(BLOCK - 16)
    number = 0
    while size > 0:
        yield (seed.to_bytes(8) + number.to_bytes(8) + filler)[:size]
        number += 1
        size -= BLOCK


@lru_cache
def digest(seed: int, size: int) -> str:
    """SHA-256 of these bytes."""
    sha = hashlib.sha256()
    for block in blob(seed, size):
        sha.update(block)
    return sha.hexdigest()


def send_blob(connection: socket.socket, seed: int, size: int, rate: int = 0) -> None:
    """Sends these bytes at this rate."""
    began, sent = time.monotonic(), 0
    for block in blob(seed, size):
        connection.sendall(block)
        sent += len(block)
        if rate:
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))


def receipt(connection: socket.socket) -> bytes:
    """Takes all there is; its length and SHA-256 in one line."""
    sha, size = hashlib.sha256(), 0
    while block := connection.recv(1 << 18):
        sha.update(block)
        size += len(block)
    return f"{size} {sha.hexdigest()}\n".encode()


def sip(connection: socket.socket, rate: int) -> bytes:
    """Takes all there is at this rate, ten times a second; as `receipt`.  0: waits for a reset."""
    sha, size = hashlib.sha256(), 0
    while not rate and connection.fileno() >= 0:
        time.sleep(0.1)
        connection.send(b"")  # raises when it is over
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return b"reset\n"
    while block := connection.recv(max(1, rate // 10)):
        sha.update(block)
        size += len(block)
        time.sleep(0.1)
    return f"{size} {sha.hexdigest()}\n".encode()


def serve(connection: socket.socket, peer: tuple[str, int]) -> None:
    """One client's connection."""
    with connection, suppress(OSError):
        with connection.makefile("rb", buffering=0) as lines:
            words = lines.readline().split()
        print(f"tcp {connection.getsockname()[1]} {peer[0]} {peer[1]} {words[:1]}", flush=True)
        match words:
            case [b"who"]:
                connection.sendall(f"{peer[0]}:{peer[1]}\n".encode())
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            case [b"download", seed, size, rate]:
                send_blob(connection, int(seed), int(size), int(rate))
            case [b"sip", rate]:
                connection.sendall(sip(connection, int(rate)))
            case [b"upload"]:
                connection.sendall(receipt(connection))
            case [b"both", seed, size]:
                answer: list[bytes] = []
                reader = threading.Thread(target=lambda: answer.append(receipt(connection)))
                reader.start()
                send_blob(connection, int(seed), int(size))
                reader.join()
                connection.sendall(answer[0])
        connection.shutdown(socket.SHUT_WR)


def serve_tcp(address: str, port: int) -> None:
    """Accepts for ever."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(512)
        while True:
            threading.Thread(target=serve, args=listener.accept(), daemon=True).start()


def serve_udp(address: str, port: int) -> None:
    """Answers for ever."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        while True:
            data, peer = sock.recvfrom(1 << 16)
            with suppress(OSError):
                sock.sendto(f"{peer[0]}:{peer[1]}\n".encode() if data == b"who" else data, peer)


def main(address: str, *services: str) -> None:
    """Serves all of these until it is ended."""
    threads = []
    for service in services:
        proto, _, port = service.partition("/")
        one = serve_tcp if proto == "tcp" else serve_udp
        threads.append(threading.Thread(target=one, args=(address, int(port)), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
