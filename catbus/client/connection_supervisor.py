"""The supervisor of a client's connections: makes the first one, and each further one after it or beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
import anyio.abc

from ..errors import Disconnected, Refused
from ..protocol.wire_messages import AuthOk, Error, GoAway
from .active_connection import ActiveConnection
from .channel_memberships import ChannelMemberships
from .in_flight_requests import InFlightRequests
from .protocol_connection import ProtocolConnection
from .reconnect_policy import (
    Backoff,
    Ended,
    ReconnectDecision,
    Reconnected,
    Reconnecting,
    SignedOut,
    State,
    decide_by_close_code,
    decide_by_token_error,
)
from .signals import ClientSignals, Signal
from .subscription_manager import SubscriptionManager
from .token_renewal import renewal_delay
from .token_source import Token, TokenSource, final_token_error
from .transport_interface import Transport

BusEvent = GoAway | Error | Reconnecting | Reconnected | Ended

MAX_UNSENT_BYTES = 256 * 1024
"""Bytes that may wait to be sent before `publish` waits for room."""

DEFAULT_PENDING_PUBLISHES = 1000
"""Publishes without a reply if the broker names no limit."""

ACKNOWLEDGEMENT_TIMEOUT = 2.0
"""Seconds that the old connection has for its replies to publishes, before their retry on the next connection."""

MAX_RETRY_AFTER = 300.0
"""The longest `retry_after` of a token that is not valid yet, in seconds. The clock may be corrected meanwhile."""

RETRY_INTERVAL = 2.0
"""Seconds before a publish with an uncertain outcome is sent again on the same connection."""


class ConnectionSupervisor:
    """The connections of one client, and the state that outlives them.

    `protocol` is that of the present connection, or of the last one. Without a `backoff` there is only one connection.
    With `upgrade_dial`, which opens WebTransport, it is tried every `upgrade` seconds while another transport is used.
    """

    def __init__(
        self,
        tasks: anyio.abc.TaskGroup,
        dial: Callable[[], Awaitable[Transport]],
        token: Token,
        *,
        backoff: Backoff | None,
        timeout: float,
        keepalive: float,
        on_event: Callable[[BusEvent], None] | None,
        upgrade_dial: Callable[[], Awaitable[Transport]] | None = None,
        upgrade: float = 60.0,
    ) -> None:
        self._retry_needed = Signal()
        self.in_flight = InFlightRequests(reconnects=backoff is not None, on_retry=self._retry_needed.notify)
        self.subscriptions = SubscriptionManager(self.in_flight.next_id, on_retry=self._retry_needed.notify)
        self.memberships = ChannelMemberships(self.in_flight.next_id, on_retry=self._retry_needed.notify)
        self.signals = ClientSignals()
        self.protocol = self._new_protocol(on_event)
        self._tasks = tasks
        self._dial = dial
        self._tokens = TokenSource(token)
        self._backoff = backoff
        self._timeout = timeout
        self._keepalive = keepalive
        self._on_event = on_event
        self._upgrade_dial = upgrade_dial
        self._upgrade = upgrade
        self._connection: ActiveConnection | None = None
        self._ended: tuple[str, int | None] | None = None
        self._connections: set[ActiveConnection] = set()
        self._scope = anyio.CancelScope()
        self._retries = anyio.CancelScope()
        self._failures = 0
        self._attempt = 0
        """The number of `Reconnecting` events since the last connection."""

    # Calls of the application

    @property
    def state(self) -> State:
        if self._ended is not None:
            return State.CLOSED
        connected = self._connection is not None and self.protocol.lost is None
        return State.CONNECTED if connected else State.RECONNECTING

    @property
    def transport(self) -> str:
        """The kind of transport of the present connection, or of the last one. Empty before the first."""
        return self._connection.kind if self._connection is not None else ""

    def check_not_closed(self) -> None:
        """Raise `Disconnected` if there will be no further connection."""
        if self._ended is not None:
            raise Disconnected(*self._ended)

    async def wait_connected(self) -> None:
        """Wait until there is a connection. Raises `Disconnected` if there will be none."""
        while self.state is not State.CONNECTED:
            self.check_not_closed()
            await self.signals.progress.wait()

    @property
    def congested(self) -> bool:
        """Whether the next publish has to wait for room."""
        window = self.protocol.limits.get("pending_publishes", DEFAULT_PENDING_PUBLISHES)
        return (
            self.protocol.outgoing_bytes + self.in_flight.unsent_bytes > MAX_UNSENT_BYTES
            or self.in_flight.publishes_in_flight >= window
        )

    async def wait_for_room(self) -> None:
        """Wait until a publish has room, or the client is closed. Safe to cancel."""
        while self.congested and self._ended is None:
            self.signals.notify_request()
            await self.signals.progress.wait()

    async def authenticate(self, token: str) -> None:
        """Send a new token, and use it for later connections. Raises `Refused` and `Disconnected`."""
        while True:
            await self.wait_connected()
            reply = await self._authenticate(self.protocol, token)
            if reply is not None:
                self._tokens.renew(token)
                return

    # Connections

    async def start(self, *, persist: bool, wait: bool) -> None:
        """Make the first connection, and start the tasks that make all further ones.

        One attempt is made, or with `persist` as many as necessary. Without `wait` the attempts are made by a task.
        Raises `Refused` and `Disconnected`, and what the token function raises.
        """
        first = await self._open_first(persist=persist) if wait else None
        self._tasks.start_soon(self._run, first)
        self._tasks.start_soon(self._retry)

    async def _open_first(self, *, persist: bool) -> ActiveConnection:
        while True:
            try:
                connection = await self._open()
                break
            except (Refused, Disconnected) as error:
                if not persist or self._backoff is None or self._decide(error) is ReconnectDecision.FINAL:
                    raise
                pause = self._delay_after(error)
                self._failures += 1
                self._report_failure(error, pause)
                await anyio.sleep(pause)
        # If the connection is already lost, the next one resumes.
        with suppress(Disconnected):
            connection.protocol.resume()
        self._set_current(connection)
        return connection

    def stop(self) -> None:
        """Close all connections with a close handshake."""
        self._set_ended("it has been closed on this side", None)
        for connection in self._connections:
            connection.stop()
        self._scope.cancel()

    async def _run(self, connection: ActiveConnection | None) -> None:
        with self._scope:
            try:
                if connection is None:
                    connection = await self._open_first(persist=True)
                    self._report(Reconnected())
                while True:
                    began = anyio.current_time()
                    connection = await self._upgrade_transport(connection)
                    if self._backoff is None:
                        await connection.lost_event.wait()
                        connection.protocol.check_connected()
                    elif anyio.current_time() - began >= self._backoff.pause(self._failures, 0):
                        # A connection that is closed at once counts as a failure.
                        self._failures = 0
                    connection = await self._reconnect(connection)
            except (Refused, Disconnected) as error:
                self._finish(error)

    async def _upgrade_transport(self, connection: ActiveConnection) -> ActiveConnection:
        """Wait until the connection is lost or the broker announces its end, and try to move to WebTransport meanwhile.

        Returns the connection that is present then.
        """
        while self._upgrade_dial is not None and connection.kind != "webtransport":
            with anyio.move_on_after(self._upgrade):
                await connection.wait_lost_or_goaway()
                return connection
            with suppress(Refused, Disconnected):
                # A failure leaves the present connection as it is.
                new = await self._open(self._upgrade_dial)
                await self._switch(connection, new)
                connection = new
        await connection.wait_lost_or_goaway()
        return connection

    async def _reconnect(self, old: ActiveConnection) -> ActiveConnection:
        """Replace a connection that is lost or ends soon. Raises `Disconnected` if there will be no other."""
        reason: Disconnected | Refused | None = None
        due = old.reconnect_at
        if due is not None and self._failures:
            # A client that several replicas in a row send away waits in between.
            due = max(due, anyio.current_time() + self._backoff_delay(self._failures - 1))
        while True:
            if due is None:
                assert reason is not None or old.protocol.lost is not None
                reason = reason or Disconnected(*(old.protocol.lost or ("", None)))
                due = anyio.current_time() + self._delay_after(reason)
            await self._wait_until(due, old, reason)
            self._failures += 1
            token = self._tokens.fixed
            try:
                new = await self._open()
                await self._switch(old, new)
            except (Refused, Disconnected) as error:
                reason, due = error, None
                continue
            if (renewed := self._tokens.fixed) is not None and renewed is not token:
                # The application renewed it meanwhile, on the old connection.
                with suppress(Refused, Disconnected):
                    await self._authenticate(new.protocol, renewed)
            return new

    async def _wait_until(self, due: float, old: ActiveConnection, reason: Disconnected | Refused | None) -> None:
        """Wait until it is time to reconnect, and report `Reconnecting` once the old connection is lost."""
        if old.protocol.lost is None:
            with anyio.CancelScope(deadline=due):
                await old.lost_event.wait()
        # After `stop` the task runs on until its next wait.
        self.check_not_closed()
        if old.protocol.lost is not None:
            end = Disconnected(*old.protocol.lost)
            if self._decide(end) is ReconnectDecision.FINAL:
                raise end
            self._report_failure(reason or end, max(0.0, due - anyio.current_time()))
        await anyio.sleep_until(due)

    async def _open(self, dial: Callable[[], Awaitable[Transport]] | None = None) -> ActiveConnection:
        """Connect and authenticate. Raises `Disconnected` and `Refused`, and leaves nothing open then."""
        timed_out = Disconnected(f"the broker did not answer within {self._timeout:g} s")
        token = await self._tokens.request()
        try:
            with anyio.fail_after(self._timeout) as limit:
                transport = await (dial or self._dial)()
        except TimeoutError:
            raise timed_out from None
        protocol = self._new_protocol(self._report)
        connection = ActiveConnection(
            protocol, transport, self.signals, keepalive=self._keepalive, timeout=self._timeout
        )
        self._connections.add(connection)
        self._tasks.start_soon(self._run_connection, connection)
        try:
            with anyio.fail_after(limit.deadline - anyio.current_time()):
                reply = await self._authenticate(protocol, token)
        except TimeoutError:
            # This broker would not answer a close handshake either.
            connection.abort()
            raise timed_out from None
        except Refused:
            connection.stop()
            raise
        except BaseException:
            connection.abort()
            raise
        if reply is None:
            protocol.check_connected()
        if self._tokens.fixed is None:
            self._tasks.start_soon(self._renew_token, connection, token)
        return connection

    async def _switch(self, old: ActiveConnection, new: ActiveConnection) -> None:
        """Move to a new connection. If the old one is still open, it serves until the new one has taken over.

        Raises `Disconnected` if the new one is lost meanwhile. The old one is closed all the same, and everything
        unfinished waits for the next connection.
        """
        in_flight, subscriptions, progress = self.in_flight, self.subscriptions, self.signals.progress
        new.protocol.check_connected()
        moved = old.protocol.lost is None
        try:
            in_flight.pause()
            new.protocol.resume_subscriptions()
            self.signals.notify_request()
            with anyio.move_on_after(ACKNOWLEDGEMENT_TIMEOUT):
                while in_flight.awaiting_acknowledgement and old.protocol.lost is None:
                    await progress.wait()
            with anyio.move_on_after(self._timeout):
                while moved and subscriptions.awaiting_reply and new.protocol.lost is None:
                    await progress.wait()
        finally:
            old.stop()
        new.protocol.resume_requests()
        if moved:
            # A move is not a failure.
            self._failures = 1
        self._set_current(new)
        self._report(Reconnected(moved))

    def _set_current(self, connection: ActiveConnection) -> None:
        self._connection, self.protocol = connection, connection.protocol
        self._attempt = 0
        self.signals.notify_request()
        self.signals.progress.notify()

    async def _run_connection(self, connection: ActiveConnection) -> None:
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def _finish(self, error: Disconnected | Refused) -> None:
        """Close the client because of an error, and report `Ended`."""
        if self._ended is None:
            end = error if isinstance(error, Disconnected) else final_token_error(error)
            self._set_ended(str(end), end.code)
            for connection in self._connections:
                connection.stop()
            self._report(Ended(str(end), end.code))

    def _set_ended(self, message: str, code: int | None) -> None:
        """Make no further connection, and wake all waiting tasks. The first reason counts."""
        if self._ended is None:
            self._ended = (message, code)
            self._retries.cancel()
            for state in (self.in_flight, self.subscriptions, self.memberships):
                state.wake_all()
            self.signals.progress.notify()

    async def _retry(self) -> None:
        """Send requests again, after a pause, that the broker could not serve for now."""
        states = (self.in_flight, self.subscriptions, self.memberships)
        with self._retries:
            while True:
                if any(state.retry_pending for state in states):
                    await anyio.sleep(RETRY_INTERVAL * random.uniform(0.7, 1))  # noqa: S311
                    for state in states:
                        state.retry()
                    self.signals.notify_request()
                else:
                    await self._retry_needed.wait()

    # Tokens

    async def _authenticate(self, protocol: ProtocolConnection, token: str) -> AuthOk | None:
        """Send a token and return the reply, or None if the connection is lost before it. Raises `Refused`."""
        signal = Signal()
        reply = protocol.authenticate(token, signal.notify)
        self.signals.notify_request()
        while reply.value is None and protocol.lost is None:
            await signal.wait()
        if isinstance(reply.value, Refused):
            raise reply.value
        return reply.value

    async def _renew_token(self, connection: ActiveConnection, token: str) -> None:
        """Send the next token before this one expires, as long as the connection lasts."""
        with connection.lifetime:
            while (delay := renewal_delay(token, time.time())) is not None:
                await anyio.sleep(delay)
                try:
                    new = await self._tokens.request()
                    await self._authenticate(connection.protocol, new)
                except SignedOut as error:
                    self._scope.cancel()
                    self._finish(error)
                    return
                except (Refused, Disconnected):
                    # If it matters, the broker closes the connection, and the next one begins with a token.
                    continue
                token = new

    # Decisions and events

    def _decide(self, error: Disconnected | Refused) -> ReconnectDecision:
        decision = decide_by_token_error(error) if isinstance(error, Refused) else decide_by_close_code(error.code)
        if decision is ReconnectDecision.NEW_TOKEN and self._tokens.fixed is not None:
            return ReconnectDecision.FINAL
        return decision

    def _delay_after(self, error: Disconnected | Refused) -> float:
        """Seconds to wait after a failure or a lost connection. Raises `Disconnected` if the error is final."""
        decision = self._decide(error)
        if decision is ReconnectDecision.FINAL:
            raise error if isinstance(error, Disconnected) else final_token_error(error)
        if decision is ReconnectDecision.NEW_TOKEN and not self._failures:
            return 0.0
        pause = self._backoff_delay(self._failures)
        wait = error.retry_after if isinstance(error, Refused) else None
        return pause if wait is None else max(pause, min(wait, MAX_RETRY_AFTER) + self._backoff_delay(0))

    def _backoff_delay(self, failures: int) -> float:
        assert self._backoff is not None
        return self._backoff.pause(failures, random.random())  # noqa: S311

    def _report_failure(self, reason: Disconnected | Refused, delay: float) -> None:
        code = reason.code if isinstance(reason, Disconnected) else None
        self._attempt += 1
        self._report(Reconnecting(str(reason), code, self._attempt, delay))

    def _report(self, event: BusEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _new_protocol(self, on_event: Callable[[GoAway | Error], None] | None) -> ProtocolConnection:
        return ProtocolConnection(self.in_flight, self.subscriptions, self.memberships, on_event)
