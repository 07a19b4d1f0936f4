"""A client upon a WebSocket library of others: `libraries.py NAME`, with a command in JSON on each line of stdin.

Answers each on stdout with `result`, `error` or `unable`. Needs what `requirements.txt` names, and nothing of ours.

| Command | Fields | Result |
|---|---|---|
| `connect` | `url`, `ca`, `headers`, `subprotocols`, `compression` | `subprotocol`, `extensions` |
| `send` | `data`, `binary` | |
| `fragments` | `parts` | |
| `ping` | | when it was answered |
| `pause` | | reads nothing until the next `hear` |
| `hear` | | `text`, or `closed` with code and reason |
| `close` | `code`, `reason` | `closed` with the code and the reason that came back |

`closed` is null where the library does not tell of codes.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from typing import Any


def context(ca: str | None) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=ca) if ca else None


class Unable(Exception):
    """The library has no way to do it."""


class Library:
    """All of them read no more than they are asked for, but for a little."""

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

    async def hear(self) -> Any:
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
        raise Unable("sends no fragments")

    async def ping(self) -> None:
        raise Unable("does not tell of pongs while it sees to pings itself")

    async def hear(self) -> Any:
        import aiohttp

        message = await self.socket.receive()
        if message.type in {aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY}:
            return {"text": message.data}
        return {"closed": [message.data, message.extra or ""]}

    async def close(self, code: int, reason: str) -> Any:
        await self.socket.close(code=code, message=reason.encode())
        return {"closed": [self.socket.close_code, None]}


class WebsocketClient(Library):
    """websocket-client, whose calls wait"""

    async def connect(
        self, url: str, ca: str | None, headers: dict[str, str], subprotocols: list[str], compression: bool
    ) -> Any:
        import websocket

        if compression:
            raise Unable("has no compression")
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

    async def hear(self) -> Any:
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
            raise Unable("has no compression")
        if subprotocols:
            headers = {**headers, "Sec-WebSocket-Protocol": ", ".join(subprotocols)}
        self.session = niquests.AsyncSession(disable_http3=True, disable_http1=True)
        answer = await self.session.get(url.replace("wss://", "wss+rfc8441://"), headers=headers, verify=ca)
        if answer.extension is None:
            raise ConnectionError(f"HTTP status {answer.status_code}")
        self.socket = answer.extension
        return {"subprotocol": answer.headers.get("sec-websocket-protocol"), "extensions": []}

    async def send(self, data: str, binary: bool) -> None:
        await self.socket.send_payload(data.encode() if binary else data)

    async def fragments(self, parts: list[str]) -> None:
        raise Unable("sends no fragments")

    async def ping(self) -> None:
        raise Unable("does not tell of pongs")

    async def hear(self) -> Any:
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
            answer = {"result": await getattr(library, command.pop("do"))(**command)}
        except Unable as error:
            answer = {"unable": str(error)}
        except Exception as error:  # noqa: BLE001 (it is told)
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
