"""From a URL and a token to a `Bus`."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio

from .argument_checks import check_flags, check_function, check_seconds, check_text
from .broker_address import make_ssl_context, parse_address
from .bus import Bus
from .connection_supervisor import BusEvent, Supervisor, Token
from .happy_eyeballs import Dial, Ways
from .reconnect_policy import Backoff
from .websocket_transport import open_websocket


@asynccontextmanager
async def connect(
    url: str,
    *,
    fallback_url: str | None = None,
    token: Token,
    ssl_context: ssl.SSLContext | None = None,
    ca: str | os.PathLike[str] | None = None,
    certificate_hash: bytes | None = None,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    upgrade: float = 60.0,
    reconnect: bool | Backoff = True,
    persist: bool = False,
    wait: bool = True,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """Connect to a broker and authenticate; leaving the block says goodbye and closes.

        async with catbus.connect("wss://bus.example.com/ws", token=token) as bus:
            seq = await bus.publish("orders.42", {"status": "paid"})

    `url` begins with `https://` (WebTransport, verified against the authorities in `ca`, PEM or a file of it, or the
    usual ones, or only by `certificate_hash`, the SHA-256 of the certificate's DER form), `ws://`, `wss://` (verified
    against `ssl_context`, `ca`, or the system's authorities) or `ws+unix:/path/of.sock:/ws`. A `fallback_url`, for
    networks that let no UDP through, is tried beside it when it has not answered within a quarter of a second, each
    time that a connection is made: the first that is there is taken, and the other is closed. For the next ten minutes
    that one is tried first. While it is the `fallback_url`, WebTransport is tried again every `upgrade` seconds, and
    everything goes over to it, without a loss, once it gets through. `timeout`, in seconds,
    bounds connecting and authenticating together, and how long the broker may be silent after a ping, one of which is
    sent every `keepalive` seconds. `token` is one, or an async function that is asked for one before each connection,
    and before the time of the last one is over where it says when that is. Where it returns None or raises `Refused`,
    nobody is signed in any more: that is final, everything raises `Disconnected` with the code 4001, and it is not
    asked again. After an `OSError` it is asked again, as after a connection that could not be made. Anything else that
    it raises comes out of this block, in an exception group once there was a connection.

    A connection that is lost is made anew, after pauses as `reconnect`, a `Backoff`, says: about a second first, then
    longer, 30 s at most. Subscriptions go on where they were, and what had no answer is sent again; see `Bus`. A broker
    that is about to stop says when to connect anew; that is done beside the old connection, which ends when the new
    one has taken over. It is the end, and everything raises `Disconnected`, where the broker says that coming back is
    no use, and where the token is not taken any more and there is no other. The first connection is tried once; with
    `persist`, until it is made. With `wait=False` the block begins at once, also while the broker is away: the first
    connection is made beside it, as after a loss, and what is asked for meanwhile waits for it. With `reconnect=False`
    there is one connection and no other.

    `on_event` is called with `Reconnecting` when a connection is lost and whenever the next one could not be made, with
    `Reconnected` when there is one again (with `wait=False`, also when there is the first), with `GoAway` when the
    broker will close soon, with an `Error` that answers no request, and with `Ended` when there will be no further
    connection, unless because this block was left; it must not raise.

    Raises `TypeError` and `ValueError`, which name it, for a wrong argument or one that has no use here; `OSError` or
    `ConfigError` for a `ca` that cannot be read and a hash of another length, `Refused` when the token is not taken,
    `Disconnected` when there is no connection to be had. What the block raises comes out as it is. Cancelling it closes
    the connection at once.
    """
    check_text("url", url)
    if fallback_url is not None:
        check_text("fallback_url", fallback_url)
    addresses = [parse_address(each) for each in (url, fallback_url) if each is not None]
    if ssl_context is not None and all(address.quic for address in addresses):
        raise ValueError("ssl_context is for wss:// only; for https:// there are ca and certificate_hash")
    if certificate_hash is not None and not any(address.quic for address in addresses):
        raise ValueError("certificate_hash is for https:// only")
    dials: list[Dial] = []
    for address in addresses:
        if address.quic:
            # It takes longer to import than all the rest.
            from .webtransport_transport import make_configuration, open_webtransport

            dials.append(partial(open_webtransport, address, make_configuration(address, ca, certificate_hash)))
        else:
            context = ssl_context or (make_ssl_context(ca) if address.secure else None)
            dials.append(partial(open_websocket, address, context))
    dial = dials[0] if len(dials) == 1 else Ways(dials)
    async with open_bus(
        dial,
        better=dials[0] if len(dials) > 1 and addresses[0].quic and not addresses[1].quic else None,
        upgrade=upgrade,
        token=token,
        timeout=timeout,
        keepalive=keepalive,
        reconnect=reconnect,
        persist=persist,
        wait=wait,
        on_event=on_event,
    ) as bus:
        yield bus


@asynccontextmanager
async def open_bus(
    dial: Dial,
    *,
    token: Token,
    better: Dial | None = None,
    upgrade: float = 60.0,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    reconnect: bool | Backoff = True,
    persist: bool = False,
    wait: bool = True,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """As `connect`, over whatever transport `dial` brings; it raises `Disconnected` where there is none.

    `better` is a way to WebTransport that is tried every `upgrade` seconds while `dial` has brought something else.
    """
    if not callable(token):
        check_text("token", token)
    check_seconds(timeout=timeout, keepalive=keepalive, upgrade=upgrade)
    check_flags(persist=persist, wait=wait)
    check_function("on_event", on_event)
    if not isinstance(reconnect, bool | Backoff):
        raise TypeError(f"reconnect: True, False or a Backoff, not {type(reconnect).__name__}")
    backoff = reconnect if isinstance(reconnect, Backoff) else Backoff() if reconnect else None
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        supervisor = Supervisor(
            tasks,
            dial,
            token,
            backoff=backoff,
            timeout=timeout,
            keepalive=keepalive,
            on_event=on_event,
            better=better,
            upgrade=upgrade,
        )
        try:
            await supervisor.start(persist=persist, wait=wait)
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
