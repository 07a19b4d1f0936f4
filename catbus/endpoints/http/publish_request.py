"""`POST /publish`: one message, or several, published by an HTTP request."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ...auth.grants import Identity, client_of
from ...error_codes import ErrorCode
from ...errors import PeerError, Unavailable
from ...log import KEY_REUSED, Outcome, Rejected
from ...protocol import wire_messages as wire
from ...session.hooks import ClientInfo
from ..replica_interface import ReplicaInterface
from .error_responses import ERROR_STATUSES, error_response
from .http_request import HttpRequest, bearer_token
from .http_response import HttpResponse, json_response, retry_headers


class PublishHeaders(Struct, rename={"idempotency_key": "Idempotency-Key"}):
    """The headers of `POST /publish`."""

    idempotency_key: Annotated[str, Meta(max_length=255, description="A repeated request publishes nothing twice.")] = (
        ""
    )


class PublishResult(Struct, omit_defaults=True):
    """What became of one message. An ephemeral message has no `seq`. A rejected one has `error` and `code`.

    With the code `conflict`, `seq` is that of the channel's retained message, 0 for none.
    """

    seq: int | UnsetType = UNSET
    channel: str | UnsetType = UNSET
    duplicate: bool = False
    error: str | UnsetType = UNSET
    code: ErrorCode | UnsetType = UNSET


PUBLISH_ANSWER = PublishResult | list[PublishResult]
"""The body of a response: one result for one message, and an array for an array."""


async def publish(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Publish the message in the body, or an array of messages in order.

    A rejected message has its error at its place in the response, and the status is that of the first error. The other
    messages are published.
    """
    try:
        token = bearer_token(request)
        identity = await replica.authenticate(token, request.network)
        single, items = _split(await request.read(), replica.config.limits.pending_publishes)
        wanted = [_decode(item, replica.config.limits.message_size) for item in items]
        requests = [item for item in wanted if isinstance(item, wire.Publish)]
        client = client_of(identity, token, request.network)
        source = ClientInfo(identity.client_id, "http", request.network)
        found = await replica.publish(identity, requests, _producer(request, identity), client, source=source)
        outcomes = iter(found)
    except (PeerError, Unavailable) as error:
        return error_response(replica, error)
    results: list[PublishResult] = []
    errors: list[int] = []
    for item in wanted:
        outcome = Rejected(item.code, item.message) if isinstance(item, PeerError) else next(outcomes)
        if isinstance(outcome, Rejected):
            errors.append(409 if outcome == KEY_REUSED else ERROR_STATUSES.get(outcome.code, 400))
            replica.runtime_statistics.count_error(outcome.code)
        results.append(_result(item, outcome))
    status = errors[0] if errors else 200
    return json_response(results[0] if single else results, status, retry_headers(status))


def _producer(request: HttpRequest, identity: Identity) -> bytes:
    """Return the producer of a request with an `Idempotency-Key`: the same when the same client repeats the key."""
    key = request.header(b"idempotency-key")
    if len(key) > 255:
        raise PeerError(ErrorCode.BAD_MESSAGE, "an Idempotency-Key has at most 255 bytes")
    subject = (identity.client_id or "").encode()
    return blake2b(key + b"\0" + subject, digest_size=16, person=b"catbus publish").digest() if key else b""


def _split(body: bytes, most: int) -> tuple[bool, Sequence[bytes | msgspec.Raw]]:
    """Return whether the body is a single message, and its messages. Raises `PeerError`."""
    if not body.lstrip(b" \t\r\n").startswith(b"["):
        return True, [body]
    try:
        items = msgspec.json.decode(body, type=list[msgspec.Raw])
    except wire.UNDECODABLE as error:
        raise wire.decoding_error(error) from None
    if len(items) > most:
        raise PeerError(ErrorCode.TOO_LARGE, f"at most {most} messages in a request")
    return False, items


def _decode(item: bytes | msgspec.Raw, limit: int) -> wire.Publish | PeerError:
    data = bytes(item)
    if len(data) > limit:
        return PeerError(ErrorCode.TOO_LARGE, f"a message may have at most {limit} bytes")
    try:
        return wire.decode_publish(data)
    except wire.UNDECODABLE as error:
        return wire.decoding_error(error)


def _result(item: wire.Publish | PeerError, outcome: Outcome | None) -> PublishResult:
    if isinstance(outcome, Rejected):
        seq = UNSET if outcome.retained_seq is None else outcome.retained_seq
        return PublishResult(seq, error=outcome.message, code=outcome.code)
    assert isinstance(item, wire.Publish)
    if outcome is None:
        return PublishResult(channel=item.channel)
    return PublishResult(outcome.seq, item.channel, outcome.duplicate)
