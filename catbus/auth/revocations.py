"""Revocations: tokens of a client that were issued before a time are rejected, and close the sessions that use them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Set
from functools import partial
from math import inf
from time import perf_counter
from typing import Protocol

import trio

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import PeerError
from .token_errors import RejectionReason, TokenRejected, format_time

MAX_CLOSING_TIME = 0.002
"""Seconds for which sessions are closed before other tasks run."""

MAX_CLIENT_ID = 2000
"""Bytes of a client_id that can be revoked: an index of PostgreSQL has no room for longer ones."""

LATEST_TIME = 253_402_300_799.0
"""The last second of the year 9999."""


class RevocableSession(Protocol):
    """A session that was authenticated with a token of a client."""

    def revoke_token(self) -> None:
        """Close, because the token was revoked."""

    def disconnect(self) -> None:
        """Close, because an administrator wants so. The token stays valid."""


class Revocations:
    """The revocations that a replica knows, all in memory, and the sessions that they may close.

    For a log in memory this is the only place where revocations are kept, and they end with the process.
    """

    def __init__(self) -> None:
        self.closed = 0
        """How many sessions were closed."""
        self._issued_before: dict[str, float] = {}
        """By client_id, a time in seconds since 1970."""
        self._sessions: dict[str, dict[RevocableSession, float]] = {}
        """By client_id, its sessions, each with the time at which its token was issued."""
        self._client_ids: dict[RevocableSession, str] = {}
        self._unchecked: set[str] = set()
        """Clients with sessions that a revocation may close."""
        self._disconnected: set[str] = set()
        """Clients whose sessions are to be closed."""
        self._work = trio.Event()

    def __len__(self) -> int:
        return len(self._issued_before)

    async def wait_known(self) -> None:
        """Wait until the revocations are known. Raises `Unavailable` after some seconds."""

    async def revoke(
        self, client_id: str, issued_before: float | None = None, forget_after: float | None = None
    ) -> float:
        """Revoke the tokens of a client that were issued before a time, by default now; close sessions with them.

        Times are in seconds since 1970. From `forget_after` on no such token is valid, so that nothing of it has to be
        remembered. Returns the time that is in force: an earlier call with a later time stays in force. Raises
        `PeerError` for a client_id or a time that is not possible, and `Unavailable` if it cannot be stored. Cancelling
        it leaves open whether the tokens are revoked.
        """
        check_revocation(client_id, issued_before, forget_after)
        await trio.lowlevel.checkpoint()
        known = self._issued_before.get(client_id, -inf)
        # In microseconds, as the times of tokens: one that is issued at once is not issued before.
        before = math.floor(time.time() * 1e6) / 1e6 if issued_before is None else issued_before
        in_force = max(known, before)
        self._put({client_id: in_force})
        return in_force

    async def disconnect(self, client_id: str) -> int:
        """Close all sessions of a client, on every replica. Return how many this replica has.

        The client may connect again, with the same token. Raises `PeerError` for a client_id that is not possible, and
        `Unavailable` if the other replicas cannot be told: then no session is closed. Cancelling it leaves open whether
        sessions are closed.
        """
        check_revocation(client_id)
        await trio.lowlevel.checkpoint()
        self._disconnect({client_id})
        return len(self._sessions.get(client_id, ()))

    def check(self, client_id: str | None, issued: float) -> None:
        """Raise `TokenRejected` for a token of this client that was issued at this time, if it is revoked."""
        before = self._issued_before.get(client_id, -inf) if client_id else -inf
        if issued < before:
            raise TokenRejected(
                RejectionReason.REVOKED,
                f"issued at {format_time(issued)}; tokens issued before {format_time(before)} are revoked",
                message="the token was revoked",
                code=ErrorCode.REVOKED,
                close=CloseCode.REVOKED,
                subject=client_id,
            )

    def add(self, session: RevocableSession, client_id: str | None, issued: float) -> None:
        """Add a session with the client_id of its token and the time at which this was issued, or replace them."""
        self.remove(session)
        if client_id:
            self._client_ids[session] = client_id
            self._sessions.setdefault(client_id, {})[session] = issued
            # A revocation may have become known since the token was checked.
            if issued < self._issued_before.get(client_id, -inf):
                self._check_sessions({client_id})

    def remove(self, session: RevocableSession) -> None:
        """Remove a session, if it is here."""
        client_id = self._client_ids.pop(session, None)
        if client_id is not None:
            sessions = self._sessions[client_id]
            del sessions[session]
            if not sessions:
                del self._sessions[client_id]

    async def run(self) -> None:
        """Close sessions until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._unchecked or self._disconnected:
                if self._unchecked:
                    client_id = self._unchecked.pop()
                    before = self._issued_before.get(client_id, -inf)
                    await self._close_each(client_id, partial(self._revoke_session, client_id, before))
                else:
                    await self._close_each(self._disconnected.pop(), lambda session: session.disconnect())

    async def _close_each(self, client_id: str, close: Callable[[RevocableSession], None]) -> None:
        """Call `close` for the sessions of a client, and let other tasks run in between."""
        began = perf_counter()
        for session in list(self._sessions.get(client_id, ())):
            # Meanwhile the session may have ended, or be another client's.
            if self._client_ids.get(session) == client_id:
                close(session)
            if perf_counter() - began > MAX_CLOSING_TIME:
                await trio.lowlevel.checkpoint()
                began = perf_counter()

    def _revoke_session(self, client_id: str, before: float, session: RevocableSession) -> None:
        # Meanwhile the session may have another token.
        if self._sessions[client_id][session] < before:
            self.remove(session)
            session.revoke_token()
            self.closed += 1

    def _put(self, revocations: Mapping[str, float]) -> None:
        """Take changed revocations."""
        self._issued_before.update(revocations)
        self._check_sessions(revocations.keys())

    def _replace(self, revocations: dict[str, float]) -> None:
        """Take all revocations instead of those that are known."""
        self._issued_before = revocations
        self._check_sessions(revocations.keys())

    def _disconnect(self, client_ids: Set[str]) -> None:
        """Close the sessions of these clients soon."""
        self._disconnected |= self._sessions.keys() & client_ids
        if self._disconnected:
            self._work.set()

    def _check_sessions(self, client_ids: Set[str]) -> None:
        self._unchecked |= self._sessions.keys() & client_ids
        if self._unchecked:
            self._work.set()


def check_revocation(client_id: str, *times: float | None) -> None:
    """Raise `PeerError` unless these can be the client_id and the times, in seconds since 1970, of a revocation."""
    size = len(client_id.encode(errors="surrogatepass"))
    if not 1 <= size <= MAX_CLIENT_ID or "\0" in client_id or not _is_unicode(client_id):
        raise PeerError(ErrorCode.BAD_MESSAGE, f"a client_id has 1 to {MAX_CLIENT_ID} bytes of UTF-8, without U+0000")
    if not all(when is None or 0 <= when <= LATEST_TIME or when == inf for when in times):
        raise PeerError(ErrorCode.BAD_MESSAGE, "a time is in seconds since 1970, before the year 10000")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
