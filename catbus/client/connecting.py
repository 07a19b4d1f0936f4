"""From a URL and a token to a `Bus`."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio

from ..errors import Disconnected
from ..wire import Error, GoAway
from .bus import Bus
from .conversation import Conversation
from .link import Link
from .transport import Driven, Transport, make_ssl_context, parse_address
from .websocket import open_websocket

BusEvent = GoAway | Error


@asynccontextmanager
async def connect(
    url: str,
    *,
    token: str,
    ssl_context: ssl.SSLContext | None = None,
    ca: str | os.PathLike[str] | None = None,
    certificate_hash: bytes | None = None,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """Connect to a broker and authenticate; leaving the block says goodbye and closes.

        async with catbus.connect("wss://bus.example.com/ws", token=token) as bus:
            seq = await bus.publish("orders.42", {"status": "paid"})

    `url` begins with `https://` (WebTransport, verified against the authorities in `ca`, PEM or a file of it, or the
    usual ones, or only by `certificate_hash`, the SHA-256 of the certificate's DER form), `ws://`, `wss://` (verified
    against `ssl_context`, `ca`, or the system's authorities) or `ws+unix:/path/of.sock:/ws`. `timeout`, in seconds,
    bounds connecting and authenticating together, and how long the broker may be silent after a ping, one of which is
    sent every `keepalive` seconds. `on_event` is called with `GoAway` when the broker will close soon, and with an
    `Error` that answers no request; it must not raise.

    Raises `ValueError` for a wrong URL, or an option that has no use with it; `OSError` or `ConfigError` for a `ca`
    that cannot be read and a hash of another length, `Refused` when the token is not
    taken, `Disconnected` when there is no connection to be had. What the block raises comes out as it is. Once a
    connection is lost, it stays so: everything raises `Disconnected`. Cancelling it closes the connection at once.
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
    async with open_bus(dial, token=token, timeout=timeout, keepalive=keepalive, on_event=on_event) as bus:
        yield bus


@asynccontextmanager
async def open_bus(
    dial: Callable[[], Awaitable[Transport]],
    *,
    token: str,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """As `connect`, over whatever transport `dial` brings; it raises `Disconnected` where there is none."""
    deadline = anyio.current_time() + timeout
    late = f"the broker did not answer within {timeout:g} s"
    try:
        with anyio.fail_after(timeout):
            transport = await dial()
    except TimeoutError:
        raise Disconnected(late) from None
    conversation = Conversation(on_event)
    link = Link(conversation, transport, keepalive=keepalive, timeout=timeout)
    bus = Bus(conversation, link)
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(link.run)
        if isinstance(transport, Driven):
            tasks.start_soon(transport.run)
        try:
            try:
                with anyio.fail_after(deadline - anyio.current_time()):
                    await bus.authenticate(token)
            except TimeoutError:
                # No use in waiting for its goodbye.
                tasks.cancel_scope.cancel()
                raise Disconnected(late) from None
            yield bus
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  # raised below
            # The task group would wrap it, and whoever waits for a Refused would not find it.
            failure = error
        finally:
            link.stop()
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None
