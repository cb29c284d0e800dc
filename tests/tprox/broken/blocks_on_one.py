"""A loop for all connections in which a send waits until the sink has taken everything."""

import selectors
import socket
import sys


def main() -> None:
    """Accepts and relays for ever, in one thread."""
    _, host, port, listen = sys.argv[1:]
    loop = selectors.DefaultSelector()
    peers: dict[socket.socket, socket.socket] = {}
    ended: set[socket.socket] = set()

    def accept(listener: socket.socket) -> None:
        client, _ = listener.accept()
        server = socket.create_connection((host, int(port)))
        peers.update({client: server, server: client})
        for sock in (client, server):
            loop.register(sock, selectors.EVENT_READ, move)

    def move(source: socket.socket) -> None:
        sink = peers[source]
        try:
            if data := source.recv(1 << 16):
                sink.sendall(data)
                return
            sink.shutdown(socket.SHUT_WR)
            loop.unregister(source)
            ended.add(source)
        except OSError:
            for sock in {source, sink} - ended:
                loop.unregister(sock)
            ended.update({source, sink})
        if sink in ended:
            for sock in (source, sink):
                ended.discard(sock)
                del peers[sock]
                sock.close()

    with socket.create_server(("127.0.0.1", int(listen)), backlog=256) as listener:
        loop.register(listener, selectors.EVENT_READ, accept)
        while True:
            for key, _ in loop.select():
                if key.fileobj is listener or key.fileobj in peers:
                    key.data(key.fileobj)


if __name__ == "__main__":
    main()
