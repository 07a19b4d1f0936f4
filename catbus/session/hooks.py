"""Hooks: async functions of an embedding program, which decide about tokens, publishes and sessions.

Each call has a bound in time. A hook that raises an exception, or does not return in time, fails the request for which
it was called, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from math import inf
from typing import Any, TypedDict, TypeVar

import msgspec
import trio

from ..auth.grants import Grants, Identity
from ..close_codes import CloseCode
from ..error_codes import RETRYABLE, ErrorCode
from ..errors import PeerError, Refused, Unavailable
from ..observability.loggers import RateLimitedLog, get_logger
from ..protocol.channels import check_pattern
from ..protocol.wire_messages import Publish, check_payload, clip, decode_payload, to_json

HOOK_TIMEOUT = 5.0
"""Seconds that a hook may take, by default."""

_CLOSE_CODES = {
    ErrorCode.TOKEN_EXPIRED: CloseCode.TOKEN_EXPIRED,
    ErrorCode.TOKEN_NOT_VALID_YET: CloseCode.TOKEN_NOT_VALID_YET,
    ErrorCode.REVOKED: CloseCode.REVOKED,
    ErrorCode.OVERLOADED: CloseCode.OVERLOADED,
    ErrorCode.RATE_LIMITED: CloseCode.OVERLOADED,
    ErrorCode.SHUTTING_DOWN: CloseCode.SHUTTING_DOWN,
    ErrorCode.INTERNAL: CloseCode.INTERNAL,
}
"""Close codes for rejected tokens. Those of other error codes depend on whether a retry can help."""

T = TypeVar("T")

logger = get_logger("catbus.hooks")


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """The client for which a hook is called.

    - `client_id`: its client_id, or None; always None for `authenticate`
    - `transport`: "websocket", "webtransport", "sse", or "http" for a request without a session
    - `network`: its IPv4 address, or the /64 network of its IPv6 address; behind a trusted proxy, that of the client
    - `session`: a number that no other session of this replica has, or None for a request without a session
    """

    client_id: str | None
    transport: str
    network: str
    session: int | None = None


@dataclass(frozen=True, slots=True)
class AuthenticatedClient:
    """The client that a token names, and what it may do: what the hook `authenticate` returns.

    `read` and `write` are patterns. `expires` is in seconds since 1970, or None for never: a session ends then, unless
    its client has sent a newer token. Raises `TypeError` and `ValueError` for wrong values.
    """

    client_id: str | None
    read: Collection[str] = ()
    write: Collection[str] = ()
    expires: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.client_id, str | None):
            raise TypeError("client_id: a text or None")
        if "\0" in (self.client_id or ""):
            raise ValueError("client_id: U+0000 is not allowed")
        (self.client_id or "").encode()
        for name in ("read", "write"):
            patterns = getattr(self, name)
            # A text is a collection of texts, too, and one of its letters may be `*`.
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{name}: a list of patterns")
            try:
                for pattern in patterns:
                    check_pattern(pattern)
            except PeerError as error:
                raise ValueError(f"{name}: {error.message}") from None
        if self.expires is not None and not math.isfinite(self.expires):
            raise ValueError("expires: seconds since 1970, or None")


@dataclass(frozen=True, slots=True)
class Replacement:
    """The payload, a JSON value, that is published instead of the client's: what the hook `on_publish` may return."""

    payload: Any


AuthenticateHook = Callable[[str, ClientInfo], Awaitable[AuthenticatedClient | None]]
PublishHook = Callable[[ClientInfo, str, Any], Awaitable[Replacement | None]]
SessionHook = Callable[[ClientInfo], AbstractAsyncContextManager[object]]


class HookOptions(TypedDict, total=False):
    """The hooks that `catbus.serve` takes, as options of other functions."""

    authenticate: AuthenticateHook | None
    on_publish: PublishHook | None
    on_session: SessionHook | None
    hook_timeout: float


class RefusedByHook(PeerError):
    """A hook raised `Refused`: its code and its text are for the client."""


class Hooks:
    """The hooks of one replica. `catbus.serve` documents them.

    The tasks of `on_session` run in `nursery`, which is needed for this hook only.
    """

    def __init__(
        self,
        nursery: trio.Nursery | None = None,
        *,
        authenticate: AuthenticateHook | None = None,
        on_publish: PublishHook | None = None,
        on_session: SessionHook | None = None,
        hook_timeout: float = HOOK_TIMEOUT,
    ) -> None:
        self._nursery = nursery
        self._authenticate = authenticate
        self._on_publish = on_publish
        self._on_session = on_session
        self._timeout = hook_timeout
        self._failures = RateLimitedLog(logger.error)

    @property
    def check_publishes(self) -> bool:
        """Whether `check_publish` has a hook to call."""
        return self._on_publish is not None

    async def authenticate(self, token: str, client: ClientInfo) -> Identity | None:
        """Return the identity that the hook finds for a token; None if the token is not for it.

        Raises `PeerError` that closes.
        """
        if self._authenticate is None:
            return None
        found = await self._call("authenticate", self._authenticate, AuthenticatedClient, token, client)
        if found is None:
            return None
        return Identity(found.client_id, Grants(tuple(found.read), tuple(found.write)), found.expires)

    async def check_publish(self, message: Publish, client: ClientInfo) -> bool:
        """Call the hook for a publish, and replace its payload if the hook says so. Return whether it did.

        Raises `PeerError` if the message must not be published.
        """
        if self._on_publish is None:
            return False
        payload = decode_payload(message.payload)
        found = await self._call("on_publish", self._on_publish, Replacement, client, message.channel, payload)
        if found is None:
            return False
        try:
            message.payload = msgspec.Raw(check_payload(to_json(found.payload)))
        except (TypeError, ValueError, OverflowError, RecursionError, PeerError) as error:
            raise self._rejection("on_publish", error) from None
        return True

    async def enter_session(self, client: ClientInfo, ended: trio.Event, on_failed: Callable[[], None]) -> None:
        """Enter the hook's context for a session, and have it left when `ended` is set.

        Raises `PeerError` that closes if the session must not be opened. `on_failed` is called if the context ends by
        itself. Cancelling it cancels the hook.
        """
        if self._on_session is not None:
            assert self._nursery is not None
            rejection = await self._nursery.start(self._run_session, self._on_session, client, ended, on_failed)
            if rejection is not None:
                raise rejection

    async def _run_session(
        self,
        hook: SessionHook,
        client: ClientInfo,
        ended: trio.Event,
        on_failed: Callable[[], None],
        *,
        task_status: trio.TaskStatus[PeerError | None],
    ) -> None:
        entered, failure = False, None
        try:
            # One scope for all of it: a context may hold a nursery open, and scopes must be left in order.
            with trio.CancelScope(deadline=trio.current_time() + self._timeout) as scope:
                async with hook(client):
                    scope.deadline, entered = inf, True
                    task_status.started(None)
                    await ended.wait()
                    scope.deadline = trio.current_time() + self._timeout
        except Exception as error:  # noqa: BLE001 (it is logged)
            failure = error
        if failure is not None or scope.cancelled_caught:
            rejection = self._rejection("on_session", failure)
            if not entered:
                task_status.started(rejection)
            elif not ended.is_set():
                on_failed()

    async def _call(
        self, name: str, hook: Callable[..., Awaitable[T | None]], kind: type[T], *arguments: object
    ) -> T | None:
        """Call a hook, which returns a `kind` or None. Raises `PeerError`."""
        try:
            with trio.move_on_after(self._timeout):
                found = await hook(*arguments)
                if not isinstance(found, kind | None):
                    raise TypeError(f"{name} returned {type(found).__name__}, not {kind.__name__} or None")
                return found
        except Exception as error:  # noqa: BLE001 (it is logged)
            raise self._rejection(name, error) from None
        raise self._rejection(name, None)

    def _rejection(self, name: str, error: Exception | None) -> PeerError:
        """Return the error reply for a hook that raised an error, or (None) has not returned in time.

        All but a refusal is logged.
        """
        if isinstance(error, Refused) and error.code in list(ErrorCode):
            code = ErrorCode(error.code)
            return RefusedByHook(code, clip(error.message), _close_code(code), error.retry_after)
        fields = {"seconds": self._timeout} if error is None else {}
        event = "a hook has not returned in time" if error is None else "a hook failed"
        self._failures.log(trio.current_time(), event, kind=name, exception=error, hook=name, **fields)
        if error is None or isinstance(error, Unavailable | trio.TooSlowError):
            text = "the application that has to decide about this is unavailable"
            return PeerError(ErrorCode.UNAVAILABLE, text, CloseCode.UNAVAILABLE)
        return PeerError(ErrorCode.INTERNAL, "the application that has to decide about this failed", CloseCode.INTERNAL)


def _close_code(code: ErrorCode) -> CloseCode:
    return _CLOSE_CODES.get(code, CloseCode.UNAVAILABLE if code in RETRYABLE else CloseCode.UNAUTHENTICATED)
