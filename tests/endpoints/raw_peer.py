"""Raw WebSocket and HTTP clients that implement only the RFCs."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import trio
from trio.testing import MockClock

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The example key and its response from RFC 6455, section 1.3."""

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: bus.example\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n" % KEY
)

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONTROL = (CLOSE, PING, PONG)


def patience() -> AbstractContextManager[trio.CancelScope]:
    """Fail a test that hangs, by any clock."""
    mocked = isinstance(trio.lowlevel.current_clock(), MockClock)
    return trio.fail_after(100_000 if mocked else 30)


class Frame(NamedTuple):
    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """The code of a Close frame."""
        return int.from_bytes(self.payload[:2], "big")


class Mixed(Exception):
    """The bytes are not a sequence of frames of a server."""


class FrameParser:
    """Parses a server's bytes into frames, and checks everything."""

    def __init__(self) -> None:
        self.buffer = b""

    def feed(self, data: bytes) -> list[Frame]:
        self.buffer += data
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        buffer = self.buffer
        if len(buffer) < 2:
            return None
        opcode = buffer[0] & 0x0F
        if buffer[0] & 0xF0 != 0x80 or opcode not in (TEXT, *CONTROL) or buffer[1] & 0x80:
            raise Mixed(buffer[:16])
        size, start = buffer[1], 2
        if size >= 126:
            if opcode in CONTROL:
                raise Mixed(buffer[:16])
            start = 4 if size == 126 else 10
            if len(buffer) < start:
                return None
            size = int.from_bytes(buffer[2:start], "big")
            if size < (126 if start == 4 else 65_536) or size > 1 << 22:
                raise Mixed(buffer[:16])
        if len(buffer) < start + size:
            return None
        self.buffer = buffer[start + size :]
        return Frame(opcode, buffer[start : start + size])


def masked(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """Make a client's frame."""
    mask = b"\x5a\x17\xc3\x88"
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    body = bytes(byte ^ key for byte, key in zip(payload, itertools.cycle(mask), strict=False))
    return bytes((0x80 * fin | opcode,)) + length + mask + body


def close_frame(code: int) -> bytes:
    return masked(CLOSE, code.to_bytes(2, "big"))


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


class Peer:
    """A client on a stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = b""
        self.frames: list[Frame] = []
        self.parser = FrameParser()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def response(self, *, head: bool = False) -> Response:
        """Return the next HTTP response; `head` if it answers a HEAD request."""
        while b"\r\n\r\n" not in self.buffer:
            await self._more()
        top, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = top.decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        headers: dict[str, str] = {}
        for name, value in pairs:
            key = name.lower()
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
        status = int(first.split()[1])
        size = 0 if head or status < 200 or status in (204, 304) else int(headers["content-length"])
        while len(self.buffer) < size:
            await self._more()
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return Response(status, headers, body)

    async def upgrade(self, request: bytes = UPGRADE) -> None:
        """Open a WebSocket."""
        await self.send(request)
        response = await self.response(head=True)
        assert response.status == 101
        assert response.headers["sec-websocket-accept"] == ACCEPT.decode()

    async def frame(self) -> Frame:
        """Return the next frame."""
        while not self.frames:
            if not self.buffer:
                await self._more()
            data, self.buffer = self.buffer, b""
            self.frames += self.parser.feed(data)
        return self.frames.pop(0)

    async def at_end(self) -> bool:
        """Whether the server closes without sending another byte."""
        assert not self.buffer
        assert not self.frames
        try:
            return not await self.stream.receive_some(1000)
        except trio.BrokenResourceError:
            return True

    async def _more(self) -> None:
        data = await self.stream.receive_some(65_536)
        if not data:
            raise EOFError(self.buffer)
        self.buffer += data
