"""How a TCP or TLS connection is closed so that the peer reads everything that was sent to it."""

from __future__ import annotations

from contextlib import suppress

import trio

from ..limits.cpu_scheduler import CpuScheduler

_CHUNK = 65_536
_UNREAD = 2 << 20
"""Bytes that are read of a peer whose connection is about to be closed: a whole body, and what stands behind it."""

TlsStream = trio.SSLStream[trio.SocketStream]


async def close_gently(stream: trio.abc.Stream, cpu_scheduler: CpuScheduler) -> None:
    """Tell the peer that nothing follows, and read until it closes, or has sent more than a whole body.

    To close a socket with bytes unread makes the kernel reset the connection, and the peer may then lose what it has
    not read itself. It takes as long as the peer does: put a limit around it. A peer that goes on sending waits for its
    turn after each piece.
    """
    if isinstance(stream, trio.SSLStream):
        # `unwrap` takes the transport away from a stream that it has closed cleanly.
        transport = stream.transport_stream
        await say_goodbye(stream)
        stream = transport
    try:
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        left = _UNREAD
        while left > 0 and (data := await stream.receive_some(_CHUNK)):
            left -= len(data)
            await cpu_scheduler.yield_cpu()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def say_goodbye(stream: TlsStream) -> None:
    """Send the close_notify alert of TLS, and wait for the peer's.

    Without it, a peer cannot tell the end from an attack that cuts the connection. It takes as long as the peer does:
    put a limit around it. A peer that sends something else, or closes without an alert, ends it too.
    """
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.unwrap()
