"""Sends bytes on a stream, checks what comes back: `quic_client.py HOST PORT CERTIFICATE BYTES`."""

import asyncio
import os
import sys

from aioquic.asyncio import connect
from aioquic.quic.configuration import QuicConfiguration


async def main(host: str, port: str, certificate: str, count: str) -> None:
    """Raises AssertionError if it is something else that comes back."""
    configuration = QuicConfiguration(alpn_protocols=["echo"], server_name="server.example")
    configuration.load_verify_locations(certificate)
    async with connect(host, int(port), configuration=configuration) as connection:
        reader, writer = await connection.create_stream()
        data = os.urandom(int(count))
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data
        print(f"{len(data)} bytes came back")


asyncio.run(main(*sys.argv[1:]))
