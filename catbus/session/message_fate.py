"""What became of one message for one session. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, Struct, structs

from ..protocol.channels import matches
from .session_report import OpenSession
from .state_machine import Session

Fate = Literal["sent", "queued", "lagging", "earlier", "not subscribed", "not permitted"]

_BEST = ("sent", "queued", "lagging", "earlier")
"""Of several subscriptions that match, the first of these counts."""


class SessionFate(Struct, frozen=True):
    """What became of the message for one open session."""

    session: Annotated[int, Meta(description="Its `id` in `/api/sessions`.")]
    transport: str
    opened: Annotated[int, Meta(description="When it was opened, in milliseconds since 1970.")]
    fate: Annotated[
        Fate,
        Meta(
            description="`sent`: handed to its connection. `queued`: in its send queue, or sent already. `lagging`: it "
            "comes. `earlier`: its subscription begins after the message. `not permitted`: it is not subscribed, and "
            "has no read grant for the channel now."
        ),
    ]
    pattern: Annotated[str | None, Meta(description="The pattern of the subscription that this is about.")] = None
    behind: Annotated[int, Meta(ge=0, description="Messages of the log that come before it, for `lagging`.")] = 0
    queued: Annotated[int, Meta(ge=0, description="Bytes that wait in the send queue of the subscription.")] = 0
    ephemeral_dropped: Annotated[
        int, Meta(ge=0, description="Ephemeral messages that its full send queues had no room for.")
    ] = 0


def fate_for(opened: OpenSession, channel: str, seq: int | None, position: int) -> SessionFate:
    """Say what became of a message on a channel for a session. `seq` is None for an ephemeral message.

    `position`: the seq up to which live subscriptions are complete.
    """
    session = opened.driver.session
    permitted = session.identity is not None and session.identity.grants.may_read(channel)
    without = SessionFate(
        session=opened.id,
        transport=opened.driver.transport,
        opened=opened.opened,
        fate="not subscribed" if permitted else "not permitted",
        ephemeral_dropped=session.send_queue.count.dropped,
    )
    fates = {fate.fate: fate for fate in _subscription_fates(session, without, channel, seq, position)}
    return next((fates[name] for name in _BEST if name in fates), without)


def _subscription_fates(
    session: Session, without: SessionFate, channel: str, seq: int | None, position: int
) -> Iterator[SessionFate]:
    """Yield what became of it for each subscription that matches. `without`: what is so for all of them."""
    for pattern, subscription in session.subscriptions.items():
        if not matches(pattern, channel):
            continue
        complete = subscription.cursor if subscription.lagging else position
        queued, behind = subscription.send_queue.size, 0
        fate: Fate = "queued" if queued else "sent"
        if seq is not None and seq <= subscription.wanted_after(pattern):
            fate = "earlier"
        elif seq is not None and seq > complete:
            fate, behind = "lagging", seq - complete - 1
        yield structs.replace(without, fate=fate, pattern=pattern, behind=behind, queued=queued)
