"""What an administrator sees of an open session."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

from msgspec import Meta, Struct

from ..auth.role_tokens import role_handle
from .driver import SessionDriver

MAX_PATTERNS = 10
"""Patterns of a session that its report lists."""

_LAST = 253_402_300_799
"""The last second of the year 9999: tokens may name a later one."""


class SessionReport(Struct, frozen=True):
    """One open session."""

    id: Annotated[int, Meta(ge=1, description="Ascends on this replica in the order in which sessions open.")]
    client_id: Annotated[str | None, Meta(description="Null before the session is authenticated, or if it has none.")]
    state: Annotated[Literal["new", "open", "closing"], Meta(description="`new`: it has not sent a valid token yet.")]
    transport: str
    protocol: Annotated[int, Meta(description="0 for a client of the first version of the protocol.")]
    network: Annotated[str, Meta(description="The address of the client, or its IPv6 network; empty if unknown.")]
    opened: Annotated[int, Meta(description="When it was opened, in milliseconds since 1970.")]
    admin: Annotated[bool, Meta(description="Whether it was opened with the admin key.")]
    role: Annotated[str | None, Meta(description="The handle of its role, for a role token.")]
    expires: Annotated[int | None, Meta(description="When its token expires, in milliseconds since 1970.")]
    subscriptions: Annotated[int, Meta(ge=0, description="The number of its subscriptions.")]
    patterns: Annotated[list[str], Meta(description=f"The first {MAX_PATTERNS} of their patterns.")]
    lagging: Annotated[int, Meta(ge=0, description="How many of them lag.")]
    lag: Annotated[int, Meta(ge=0, description="The largest lag of them, in messages.")]
    queued: Annotated[int, Meta(ge=0, description="Bytes that wait in its send queues.")]
    pending: Annotated[int, Meta(ge=0, description="Publishes that are not acknowledged yet.")]
    published: Annotated[int, Meta(ge=0, description="Messages that it has published, whatever became of them.")]
    delivered: Annotated[int, Meta(ge=0, description="Messages sent to it, except those in datagrams.")]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session in the registry of its replica. `opened` is in milliseconds since 1970, `began` the Trio time of it."""

    id: int
    opened: int
    began: float
    network: str
    driver: SessionDriver

    @property
    def client_id(self) -> str | None:
        """The client_id of its token; None before authentication and for a token without one."""
        identity = self.driver.session.identity
        return None if identity is None else identity.client_id

    def report(self, position: int) -> SessionReport:
        """Describe the session. `position`: the seq up to which live subscriptions are complete.

        The cost grows with the number of its subscriptions.
        """
        session, identity = self.driver.session, self.driver.session.identity
        subscriptions = session.subscriptions
        queues = {session.send_queue, *(subscription.send_queue for subscription in subscriptions.values())}
        cursors = [subscription.cursor for subscription in subscriptions.values() if subscription.lagging]
        expires = None if identity is None or identity.expires is None else int(min(identity.expires, _LAST) * 1000)
        return SessionReport(
            id=self.id,
            client_id=self.client_id,
            state="closing" if session.closed else "new" if identity is None else "open",
            transport=self.driver.transport,
            protocol=int(session.protocol),
            network=self.network,
            opened=self.opened,
            admin=identity is not None and identity.admin,
            role=None if identity is None or identity.role is None else role_handle(identity.role),
            expires=expires,
            subscriptions=len(subscriptions),
            patterns=list(islice(subscriptions, MAX_PATTERNS)),
            lagging=len(cursors),
            lag=max(0, position - min(cursors, default=position)),
            queued=sum(queue.size for queue in queues),
            pending=session.pending,
            published=session.published,
            delivered=session.send_queue.count.messages,
        )
