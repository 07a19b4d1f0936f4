"""A client that uses a third-party WebSocket library: `libraries.py NAME`. Each line of stdin is a command in JSON.

The reply on stdout has `result`, `error` or `unsupported`. The program needs the packages of `requirements.txt`, and no
module of Catbus.

| Command | Fields | Result |
|---|---|---|
| `connect` | `url`, `ca`, `headers`, `subprotocols`, `compression` | `subprotocol`, `extensions` |
| `send` | `data`, `binary` | |
| `fragments` | `parts` | |
| `ping` | | returns when the pong has arrived |
| `pause` | | stops reading until the next `receive` |
| `receive` | | `text`, or `closed` with code and reason |
| `close` | `code`, `reason` | `closed` with the returned code and reason |

`closed` is null if the library does not report close codes.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from typing import Any


def context(ca: str | None) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=ca) if ca else None


class Unsupported(Exception):
    """The library has no API for this command."""


class Library:
    """A library that reads little more than its application asks for, so a pause needs no call."""

    async def pause(self) -> None:
        pass


class Websockets(Library):
    """websockets"""

    async def connect(
        self, url: str, ca: str | None, headers: dict[str, str], subprotocols: list[str], **_: Any
    ) -> Any:
        from websockets.asyncio.client import connect

        self.socket = await connect(
            url, ssl=context(ca), additional_headers=headers, subprotocols=subprotocols or None, proxy=None
        )
        return {
            "subprotocol": self.socket.subprotocol,
            "extensions": [each.name for each in self.socket.protocol.extensions],
        }

    async def send(self, data: str, binary: bool) -> None:
        await self.socket.send(data.encode() if binary else data)

    async def fragments(self, parts: list[str]) -> None:
        await self.socket.send(parts)

    async def ping(self) -> None:
        await (await self.socket.ping())

    async def receive(self) -> Any:
        from websockets.exceptions import ConnectionClosed

        try:
            return {"text": await self.socket.recv()}
        except ConnectionClosed:
            return {"closed": [self.socket.close_code, self.socket.close_reason]}

    async def close(self, code: int, reason: str) -> Any:
        await self.socket.close(code, reason)
        return {"closed": [self.socket.close_code, self.socket.close_reason]}


class Aiohttp(Library):
    """aiohttp"""

    session: Any = None

    async def connect(
        self, url: str, ca: str | None, headers: dict[str, str], subprotocols: list[str], compression: bool
    ) -> Any:
        import aiohttp

        if self.session is None:
            self.session = aiohttp.ClientSession()
        self.socket = await self.session.ws_connect(
            url, ssl=context(ca) or True, headers=headers, protocols=subprotocols, compress=15 if compression else 0
        )
        return {"subprotocol": self.socket.protocol, "extensions": ["permessage-deflate"] * bool(self.socket.compress)}

    async def send(self, data: str, binary: bool) -> None:
        await (self.socket.send_bytes(data.encode()) if binary else self.socket.send_str(data))

    async def fragments(self, parts: list[str]) -> None:
        raise Unsupported("sends no fragments")

    async def ping(self) -> None:
        raise Unsupported("does not report pongs while it handles pings itself")

    async def receive(self) -> Any:
        import aiohttp

        message = await self.socket.receive()
        if message.type in {aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY}:
            return {"text": message.data}
        return {"closed": [message.data, message.extra or ""]}

    async def close(self, code: int, reason: str) -> Any:
        await self.socket.close(code=code, message=reason.encode())
        return {"closed": [self.socket.close_code, None]}


class WebsocketClient(Library):
    """websocket-client, which is synchronous"""

    async def connect(
        self, url: str, ca: str | None, headers: dict[str, str], subprotocols: list[str], compression: bool
    ) -> Any:
        import websocket

        if compression:
            raise Unsupported("has no compression")
        self.socket = await asyncio.to_thread(
            websocket.create_connection,
            url,
            sslopt={"ca_certs": ca} if ca else None,
            header=headers,
            subprotocols=subprotocols or None,
        )
        return {"subprotocol": self.socket.getsubprotocol(), "extensions": []}

    async def send(self, data: str, binary: bool) -> None:
        await asyncio.to_thread(
            self.socket.send_binary if binary else self.socket.send, data.encode() if binary else data
        )

    async def fragments(self, parts: list[str]) -> None:
        from websocket import ABNF

        for number, part in enumerate(parts):
            opcode = ABNF.OPCODE_CONT if number else ABNF.OPCODE_TEXT
            frame = ABNF.create_frame(part.encode(), opcode, int(number == len(parts) - 1))
            await asyncio.to_thread(self.socket.send_frame, frame)

    async def ping(self) -> None:
        from websocket import ABNF

        self.socket.ping("here")
        opcode, _ = await asyncio.to_thread(self.socket.recv_data, control_frame=True)
        while opcode == ABNF.OPCODE_PING:
            opcode, _ = await asyncio.to_thread(self.socket.recv_data, control_frame=True)
        assert opcode == ABNF.OPCODE_PONG, opcode

    async def receive(self) -> Any:
        from websocket import ABNF

        opcode, data = await asyncio.to_thread(self.socket.recv_data)
        return closed(data) if opcode == ABNF.OPCODE_CLOSE else {"text": data.decode()}

    async def close(self, code: int, reason: str) -> Any:
        from websocket import ABNF

        self.socket.send_close(code, reason.encode())
        opcode, data = await asyncio.to_thread(self.socket.recv_data)
        while opcode != ABNF.OPCODE_CLOSE:
            opcode, data = await asyncio.to_thread(self.socket.recv_data)
        self.socket.shutdown()
        return closed(data)


class Niquests(Library):
    """niquests, by extended CONNECT over HTTP/2 (RFC 8441)"""

    async def connect(
        self, url: str, ca: str | None, headers: dict[str, str], subprotocols: list[str], compression: bool
    ) -> Any:
        import niquests

        if compression:
            raise Unsupported("has no compression")
        if subprotocols:
            headers = {**headers, "Sec-WebSocket-Protocol": ", ".join(subprotocols)}
        self.session = niquests.AsyncSession(disable_http3=True, disable_http1=True)
        response = await self.session.get(url.replace("wss://", "wss+rfc8441://"), headers=headers, verify=ca)
        if response.extension is None:
            raise ConnectionError(f"HTTP status {response.status_code}")
        self.socket = response.extension
        return {"subprotocol": response.headers.get("sec-websocket-protocol"), "extensions": []}

    async def send(self, data: str, binary: bool) -> None:
        await self.socket.send_payload(data.encode() if binary else data)

    async def fragments(self, parts: list[str]) -> None:
        raise Unsupported("sends no fragments")

    async def ping(self) -> None:
        raise Unsupported("does not report pongs")

    async def receive(self) -> Any:
        data = await self.socket.next_payload()
        return {"closed": None} if data is None else {"text": data}

    async def close(self, code: int, reason: str) -> Any:
        await self.socket.close()
        return {"closed": None}


def closed(data: bytes) -> Any:
    return {"closed": [int.from_bytes(data[:2], "big") if data else 1005, data[2:].decode()]}


LIBRARIES = {"websockets": Websockets, "aiohttp": Aiohttp, "websocket-client": WebsocketClient, "niquests": Niquests}


async def main(name: str) -> None:
    library = LIBRARIES[name]()
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        try:
            reply = {"result": await getattr(library, command.pop("do"))(**command)}
        except Unsupported as error:
            reply = {"unsupported": str(error)}
        except Exception as error:  # noqa: BLE001 (it is reported)
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
