"""Gives back each message: `websocket_server.py PORT`."""

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, serve


async def echo(connection: ServerConnection) -> None:
    """One connection."""
    async for message in connection:
        await connection.send(message)


async def main(port: str) -> None:
    """Serves for ever."""
    async with serve(echo, "0.0.0.0", int(port), max_size=None) as server:
        await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
