"""Sends messages of 1 byte to 200 kB and checks the answers: `websocket_client.py HOST PORT`."""

import os
import sys

from websockets.sync.client import connect

host, port = sys.argv[1:]
with connect(f"ws://{host}:{port}/", max_size=None, compression=None) as connection:
    for n in range(200):
        message = os.urandom(n * 1000 + 1)
        connection.send(message)
        assert connection.recv() == message
    pong = "pong" if connection.ping().wait(5) else "no pong"
print(f"200 messages came back, {pong}")
