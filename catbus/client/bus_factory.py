"""The factory of a bus: `connect` takes a URL and a token, `open_bus` any transport."""

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
from .connection_supervisor import BusEvent, ConnectionSupervisor
from .happy_eyeballs import Dial, TransportRace
from .reconnect_policy import Backoff
from .token_source import Token
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
    """Connect to a broker and authenticate. Leaving the block closes the connection.

        async with catbus.connect("wss://bus.example.com/ws", token=token) as bus:
            seq = await bus.publish("orders.42", {"status": "paid"})

    | `url` begins with | transport, and how the certificate is verified |
    |---|---|
    | `https://` | WebTransport; by `ca` (PEM or a file), the usual authorities, or `certificate_hash` (SHA-256, DER) |
    | `wss://` | WebSocket; by `ssl_context`, `ca`, or the authorities of the system |
    | `ws://` | WebSocket without TLS |
    | `ws+unix:/path/of.sock:/ws` | WebSocket over a Unix socket |

    | Argument | |
    |---|---|
    | `fallback_url` | for networks that block UDP: tried beside `url` after 0.25 s, for each connection |
    | `token` | a token, or an async function that returns one |
    | `timeout` | seconds for connecting and authenticating together, and for the reply to a ping |
    | `keepalive` | seconds between pings |
    | `upgrade` | seconds between attempts to move from `fallback_url` to WebTransport |
    | `reconnect` | True, a `Backoff`, or False for a single connection |
    | `persist` | try the first connection until it is made, not once |
    | `wait` | False: the block begins at once, and the first connection is made as after a loss |
    | `on_event` | called with the events below; it must not raise |

    With a `fallback_url` the first transport that opens is used, and the other is closed. The winner has the first
    attempt for the next ten minutes. A move to WebTransport loses nothing.

    The token function is called before each connection, and before the present token expires if it says when. If it
    returns None or raises `Refused`, the user has signed out: every call raises `Disconnected` with the code 4001, and
    the function is not called again. After an `OSError` it is called again later, as after a failed connection. Any
    other exception leaves this block, in an exception group once there was a connection.

    A lost connection is made again after the pauses of `reconnect`: by default about 1 s, then longer, up to 30 s.
    Subscriptions resume at their cursors, and requests without a reply are sent again; see `Bus`. A broker that shuts
    down says when to reconnect: the next connection then takes over before the present one closes. The bus ends, and
    every call raises `Disconnected`, if the close code is final, or if the token is rejected and there is no other.

    | Event | |
    |---|---|
    | `Reconnecting` | the connection was lost, or an attempt failed |
    | `Reconnected` | there is a connection again; with `wait=False` also for the first one |
    | `GoAway` | the broker will close the connection soon |
    | `Error` | an error that answers no request |
    | `Ended` | there will be no further connection; not reported when this block is left |

    Raises `TypeError` and `ValueError`, which name it, for a wrong or useless argument; `OSError` or `ConfigError` for
    a `ca` that cannot be read or a hash of the wrong length; `Refused` if the token is rejected; `Disconnected` if
    connecting fails. Exceptions of the block leave it unchanged. Cancelling it closes the connection at once.
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
            # Importing it takes longer than all the rest of the client.
            from .webtransport_transport import make_configuration, open_webtransport

            dials.append(partial(open_webtransport, address, make_configuration(address, ca, certificate_hash)))
        else:
            context = ssl_context or (make_ssl_context(ca) if address.secure else None)
            dials.append(partial(open_websocket, address, context))
    dial = dials[0] if len(dials) == 1 else TransportRace(dials)
    async with open_bus(
        dial,
        upgrade_dial=dials[0] if len(dials) > 1 and addresses[0].quic and not addresses[1].quic else None,
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
    upgrade_dial: Dial | None = None,
    upgrade: float = 60.0,
    timeout: float = 10.0,
    keepalive: float = 30.0,
    reconnect: bool | Backoff = True,
    persist: bool = False,
    wait: bool = True,
    on_event: Callable[[BusEvent], None] | None = None,
) -> AsyncIterator[Bus]:
    """Connect as `connect`, over the transports that `dial` opens. `dial` raises `Disconnected` if it fails.

    `upgrade_dial` opens WebTransport. It is tried every `upgrade` seconds while another transport is used.
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
        supervisor = ConnectionSupervisor(
            tasks,
            dial,
            token,
            backoff=backoff,
            timeout=timeout,
            keepalive=keepalive,
            on_event=on_event,
            upgrade_dial=upgrade_dial,
            upgrade=upgrade,
        )
        try:
            await supervisor.start(persist=persist, wait=wait)
            yield Bus(supervisor)
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  # raised below
            # The task group would wrap it in a group, and `except Refused` would not match.
            failure = error
        finally:
            supervisor.stop()
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None
