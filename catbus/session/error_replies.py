"""The error reply to each kind of request. Pure."""

from __future__ import annotations

from ..errors import PeerError
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import Reply


def error_reply(message: wire.ClientMessage, error: PeerError) -> Reply:
    """Return the error reply to a message, of the type that its sender waits for."""
    match message:
        case wire.Auth():
            return wire.AuthError(error.message, error.code)
        case wire.Subscribe(pattern=pattern) | wire.Unsubscribe(pattern=pattern):
            return wire.SubscribeError(wire.clip(pattern), error.message, error.code, message.id)
        case wire.Publish(channel=channel):
            return wire.PublishError(wire.clip(channel), error.message, error.code, message.id)
        case wire.History() | wire.Join() | wire.Leave() | wire.ListMembers():
            return wire.Error(error.message, error.code, message.id)
        case _:
            return wire.Error(error.message, error.code)
