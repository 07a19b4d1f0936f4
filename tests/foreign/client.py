"""A client that uses a third-party WebTransport library: `client.py LIBRARY URL CERTIFICATE TOKEN`.

CERTIFICATE is the broker's certificate file; one library needs the file, the other its hash. Runs a session and prints
the received objects as JSON. Needs the packages of `requirements.txt`, and no module of Catbus.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Read = Callable[[], Awaitable[bytes]]


class JsonLines:
    """The JSON objects of a stream, one for each line."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._rest = b""

    async def next(self) -> Any:
        while b"\n" not in self._rest:
            data = await self._read()
            assert data, "the stream has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def encode(*messages: dict[str, Any]) -> bytes:
    return "".join(json.dumps(message) for message in messages).encode()


def encode_handshake(token: str) -> bytes:
    return encode(
        {"type": "auth", "token": token, "protocol": 1},
        {"type": "subscribe", "pattern": "foreign.*", "stream": True, "datagrams": True},
    )


def certificate_hash(certificate: Path) -> bytes:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).digest()


PUBLISHES = encode(
    {"type": "publish", "channel": "foreign.a", "payload": "kept", "id": 1},
    {"type": "publish", "channel": "foreign.a", "payload": "fleeting", "ephemeral": True, "ack": False},
)


async def run_pywebtransport(url: str, certificate: Path, token: str) -> dict[str, Any]:
    from pywebtransport.client import WebTransportClient
    from pywebtransport.config import ClientConfig

    async with WebTransportClient(config=ClientConfig(ca_certs=str(certificate))) as client:
        session = await client.connect(url=url)
        stream = await session.create_bidirectional_stream()
        main = JsonLines(lambda: stream.read(max_size=65536))
        await stream.write_all(data=encode_handshake(token))
        hello = await main.next()
        own = await anext(session.incoming_unidirectional_streams())
        lines = JsonLines(lambda: own.read(max_size=65536))
        received = [await lines.next()]
        await stream.write(data=PUBLISHES)
        received.append(await lines.next())
        datagram = json.loads(await session.read_datagram())
        published = await main.next()
        await own.stop_receiving(error_code=5)
        ended = await main.next()
        await session.close(error_code=7, reason="enough")
        return {"hello": hello, "own": received, "datagram": datagram, "published": published, "ended": ended}


async def run_quinn(url: str, certificate: Path, token: str) -> dict[str, Any]:
    import web_transport

    async with web_transport.Client(server_certificate_hashes=[certificate_hash(certificate)]) as client:
        session = await client.connect(url)
        send, receive = await session.open_bi()
        main = JsonLines(lambda: receive.read(65536))
        await send.write(encode_handshake(token))
        hello = await main.next()
        own = await session.accept_uni()
        lines = JsonLines(lambda: own.read(65536))
        received = [await lines.next()]
        await send.write(PUBLISHES)
        received.append(await lines.next())
        datagram = json.loads(await session.receive_datagram())
        published = await main.next()
        own.stop(5)
        ended = await main.next()
        session.close(7, "enough")
        await session.wait_closed()
        # The broker closes another session; the client receives its code and its reason.
        other = await client.connect(url)
        send, receive = await other.open_bi()
        await send.write(encode({"type": "auth", "token": "sub-wrong", "protocol": 1}))
        await other.wait_closed()
        closed = [getattr(other.close_reason, "code", None), getattr(other.close_reason, "reason", None)]
        return {
            "hello": hello,
            "own": received,
            "datagram": datagram,
            "published": published,
            "ended": ended,
            "closed": closed,
        }


LIBRARIES = {"pywebtransport": run_pywebtransport, "web-transport-quinn": run_quinn}

if __name__ == "__main__":
    library, url, certificate, token = sys.argv[1:5]
    print(json.dumps(asyncio.run(asyncio.wait_for(LIBRARIES[library](url, Path(certificate), token), 40))), flush=True)
    # Threads of a native library may run on while the interpreter ends, and abort the process.
    os._exit(0)
