"""From a URL and a token to a `Bus`."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio

from .arguments import check_flags, check_function, check_seconds, check_text
from .bus import Bus
from .coming_back import Backoff
from .racing import race
from .supervisor import BusEvent, Supervisor, Token
from .transport import Transport, make_ssl_context, parse_address
from .websocket import open_websocket

Dial = Callable[[], Awaitable[Transport]]


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
            from .webtransport import make_configuration, open_webtransport

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


MEMORY = 600.0
"""Seconds for which the way that was open first is tried first."""


class Ways:
    """Several ways to a broker: the one that was open first the last time is tried first, for a while."""

    def __init__(self, dials: Sequence[Dial]) -> None:
        self._dials = list(dials)
        self._winner: Dial | None = None
        self._until = 0.0

    async def __call__(self) -> Transport:
        """The transport that is there first. Raises `Disconnected`. Cancelling it leaves nothing open."""
        known = self._winner is not None and anyio.current_time() < self._until
        order = sorted(self._dials, key=lambda dial: known and dial is not self._winner)
        won: dict[int, Dial] = {}

        async def go(dial: Dial) -> Transport:
            transport = await dial()
            won[id(transport)] = dial
            return transport

        transport = await open_either([partial(go, dial) for dial in order])
        self._winner, self._until = won[id(transport)], anyio.current_time() + MEMORY
        return transport


async def open_either(dials: Sequence[Dial]) -> Transport:
    """The transport that is there first; the next is tried when the one before has failed or takes long.

    Raises the `Disconnected` that says most. Cancelling it leaves nothing open.
    """
    losers: list[Transport] = []
    try:
        return await race(dials, losers.append)
    finally:
        for loser in losers:
            with anyio.CancelScope() as at_once:
                at_once.cancel()
                await loser.aclose()


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
