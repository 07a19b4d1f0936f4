"""How a TCP or TLS connection is closed so that the peer reads everything that was sent to it."""

from __future__ import annotations

from contextlib import suppress

import trio

from ..limits.cpu_scheduler import CpuScheduler

_CHUNK = 65_536
_UNREAD = 2 << 20
"""Bytes that are read from a peer before its connection is closed: a whole body, and data behind it."""

TlsStream = trio.SSLStream[trio.SocketStream]


async def close_gracefully(stream: trio.abc.Stream, cpu_scheduler: CpuScheduler) -> None:
    """Send the end of the stream, and read until the peer closes or has sent more than a whole body.

    If a socket is closed with bytes unread, the kernel resets the connection, and the peer may lose data that it has
    not read yet. This takes as long as the peer does, so callers need a timeout. After each read, other tasks run
    first.
    """
    if isinstance(stream, trio.SSLStream):
        # `unwrap` detaches the transport from a stream that it has closed cleanly.
        transport = stream.transport_stream
        await send_close_notify(stream)
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


async def send_close_notify(stream: TlsStream) -> None:
    """Send the close_notify alert of TLS, and wait for the peer's.

    Without it, a peer cannot tell the end from an attack that cuts the connection. This takes as long as the peer
    does, so callers need a timeout. It also returns when the peer sends something else or closes without an alert.
    """
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.unwrap()
