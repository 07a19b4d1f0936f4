"""What a publish appends to the log. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ..auth.grants import Identity
from ..error_codes import ErrorCode
from ..errors import PeerError
from ..log import EPHEMERAL_SIZE, KEY_REUSED, UNDECIDED, Append, Outcome
from ..protocol import wire_messages as wire
from ..protocol.channels import check_channel, is_reserved

Settle = Callable[[Append, Outcome], None]

RESERVED = 'channels that begin with "_" are reserved for the broker'


def conflict_as_unknown(settle: Settle) -> Settle:
    """Settle a message whose payload a hook has replaced: a retry may have got another replacement than the first try.

    Then the log takes it for another message, and nothing shows whether the first try was published.
    """
    return lambda append, outcome: settle(append, UNDECIDED if outcome == KEY_REUSED else outcome)


def unknown_if_retry(message: wire.Publish, rejection: PeerError) -> PeerError:
    """Return the error for a publish that a hook rejects. The first try of a retry may have been published."""
    return PeerError(ErrorCode.UNKNOWN, rejection.message) if message.retry else rejection


def make_append(
    message: wire.Publish,
    identity: Identity,
    producer: bytes,
    settle: Settle,
    client: Hashable = None,
    owner: object = None,
) -> Append:
    """Return what a publish appends to the log. Raises `PeerError` when it is not allowed.

    `owner` and `client`: see `Append`.
    """
    check_channel(message.channel)
    if not identity.grants.may_write(message.channel):
        text = RESERVED if is_reserved(message.channel) else "no write grant covers this channel"
        raise PeerError(ErrorCode.UNAUTHORIZED, text)
    if message.retry and None in (message.id, message.after, message.epoch):
        raise PeerError(ErrorCode.BAD_MESSAGE, "a retry needs `id`, and the `after` and `epoch` of its first sending")
    if message.expect is not None and not message.retain:
        raise PeerError(ErrorCode.BAD_MESSAGE, "`expect` needs `retain`")
    if message.retain and message.ephemeral:
        raise PeerError(ErrorCode.BAD_MESSAGE, "an ephemeral message cannot be retained")
    if message.ephemeral:
        size = len(message.channel) + len(bytes(message.payload)) + len(wire.to_json(identity.client_id))
        if size > EPHEMERAL_SIZE:
            raise PeerError(ErrorCode.TOO_LARGE, f"an ephemeral message may have at most {EPHEMERAL_SIZE} bytes")
    return Append(
        channel=message.channel,
        payload=wire.payload_bytes(message.payload),
        settle=settle,
        producer=producer if producer and message.id is not None else None,
        number=message.id or 0,
        sender=identity.client_id,
        origin=None if message.echo else producer or None,
        after=message.after if message.retry else None,
        id=message.id,
        acknowledge=message.ack,
        owner=owner,
        client=client,
        retain=message.retain,
        expect=message.expect,
    )
