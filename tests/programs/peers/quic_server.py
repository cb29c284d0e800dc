"""Gives back what comes on each stream: `quic_server.py PORT CERTIFICATE KEY`."""

import asyncio
import sys

from aioquic.asyncio import serve
from aioquic.quic.configuration import QuicConfiguration


def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A new stream."""
    tasks.add(asyncio.ensure_future(_echo(reader, writer)))


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.write_eof()


async def main(port: str, certificate: str, key: str) -> None:
    """Serves for ever."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["echo"])
    configuration.load_cert_chain(certificate, key)
    await serve("0.0.0.0", int(port), configuration=configuration, stream_handler=echo)
    await asyncio.Event().wait()


tasks: set[asyncio.Future[None]] = set()
asyncio.run(main(*sys.argv[1:]))
