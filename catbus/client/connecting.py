"""From a URL and a token to a `Bus`."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio

from .bus import Bus
from .coming_back import Backoff
from .supervisor import BusEvent, Supervisor, Token
from .transport import Transport, make_ssl_context, parse_address
from .websocket import open_websocket


@asynccontextmanager
async def connect(
    url: str,
    *,
    token: Token,
    ssl_context: ssl.SSLContext | None = None,
    ca: str | os.PathLike[str] | None = None,
    certificate_hash: bytes | None = None,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    reconnect: bool | Backoff = True,
    persist: bool = False,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """Connect to a broker and authenticate; leaving the block says goodbye and closes.

        async with catbus.connect("wss://bus.example.com/ws", token=token) as bus:
            seq = await bus.publish("orders.42", {"status": "paid"})

    `url` begins with `https://` (WebTransport, verified against the authorities in `ca`, PEM or a file of it, or the
    usual ones, or only by `certificate_hash`, the SHA-256 of the certificate's DER form), `ws://`, `wss://` (verified
    against `ssl_context`, `ca`, or the system's authorities) or `ws+unix:/path/of.sock:/ws`. `timeout`, in seconds,
    bounds connecting and authenticating together, and how long the broker may be silent after a ping, one of which is
    sent every `keepalive` seconds. `token` is one, or an async function that is asked for one before each connection,
    and before the time of the last one is over where it says when that is. What it raises ends everything and comes out
    of this block, except an `OSError`: then it is asked again, as after a connection that could not be made.

    A connection that is lost is made anew, after pauses as `reconnect`, a `Backoff`, says: about a second first, then
    longer, 30 s at most. Subscriptions go on where they were, and what had no answer is sent again; see `Bus`. A broker
    that is about to stop says when to connect anew; that is done beside the old connection, which ends when the new
    one has taken over. It is the end, and everything raises `Disconnected`, where the broker says that coming back is
    no use, and where the token is not taken any more and there is no other. The first connection is tried once; with
    `persist`, until it is made. With `reconnect=False` there is one connection and no other.

    `on_event` is called with `Reconnecting` when a connection is lost and whenever the next one could not be made, with
    `Reconnected` when there is one again, with `GoAway` when the broker will close soon, and with an `Error` that
    answers no request; it must not raise.

    Raises `ValueError` for a wrong URL, or an option that has no use with it; `OSError` or `ConfigError` for a `ca`
    that cannot be read and a hash of another length, `Refused` when the token is not
    taken, `Disconnected` when there is no connection to be had. What the block raises comes out as it is. Cancelling it
    closes the connection at once.
    """
    address = parse_address(url)
    dial: Callable[[], Awaitable[Transport]]
    if address.quic:
        if ssl_context is not None:
            raise ValueError("ssl_context is for wss:// only; for https:// there are ca and certificate_hash")
        # QUIC takes longer to import than all the rest.
        from .webtransport import make_configuration, open_webtransport

        dial = partial(open_webtransport, address, make_configuration(address, ca, certificate_hash))
    else:
        if certificate_hash is not None:
            raise ValueError("certificate_hash is for https:// only")
        if address.secure and ssl_context is None:
            ssl_context = make_ssl_context(ca)
        dial = partial(open_websocket, address, ssl_context)
    async with open_bus(
        dial,
        token=token,
        timeout=timeout,
        keepalive=keepalive,
        reconnect=reconnect,
        persist=persist,
        on_event=on_event,
    ) as bus:
        yield bus


@asynccontextmanager
async def open_bus(
    dial: Callable[[], Awaitable[Transport]],
    *,
    token: Token,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    reconnect: bool | Backoff = True,
    persist: bool = False,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """As `connect`, over whatever transport `dial` brings; it raises `Disconnected` where there is none."""
    backoff = reconnect if isinstance(reconnect, Backoff) else Backoff() if reconnect else None
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        supervisor = Supervisor(
            tasks, dial, token, backoff=backoff, timeout=timeout, keepalive=keepalive, on_event=on_event
        )
        try:
            await supervisor.start(persist=persist)
            yield Bus(supervisor)
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  # raised below
            # The task group would wrap it, and whoever waits for a Refused would not find it.
            failure = error
        finally:
            supervisor.stop()
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None
