"""A client that sends invalid input, and checks that the broker replies as the specification allows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from itertools import count

import msgspec

from ..close_codes import CloseCode
from ..protocol import wire_messages as wire
from .blocking_connection import BlockingConnection

BETWEEN_OBJECTS, INSIDE_OBJECT, MALFORMED = "whole", "inside", "broken"
CLOSE_CODES = frozenset(CloseCode) - {CloseCode.INTERNAL} | {1000, 1007, 1009}
"""The codes with which the broker may close a connection (section 11, and RFC 6455)."""

_numbers = count(1 << 40)


def stream_state(data: bytes) -> str:
    """Return where a stream of objects ends: between two objects, inside one, or after a syntax error (section 4).

    Implemented again here on purpose: it shares no code with what it checks.
    """
    level, inside_text, escaped = 0, False, False
    for byte in data:
        if inside_text:
            inside_text = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord("{"):
            level += 1
        elif level == 0:
            if byte not in b" \t\r\n":
                return MALFORMED
        elif byte == ord("}"):
            level -= 1
        elif byte == ord('"'):
            inside_text = True
    return INSIDE_OBJECT if level else BETWEEN_OBJECTS


def attack(
    connection: BlockingConnection, pieces: Iterable[bytes], timeout: float, *, token: str | None = None
) -> None:
    """Send `pieces`, after an `auth` if there is a token, check the replies, and close the connection.

    Raises `AssertionError` unless every message of the broker is valid, a malformed stream ends with a code of
    section 11, and a well-formed stream is answered or ends with such a code. Waits at most `timeout` seconds.
    """
    pieces = list(pieces)
    try:
        if token is not None:
            connection.send(json.dumps({"type": "auth", "token": token, "protocol": 1}).encode())
        for piece in pieces:
            connection.send(piece)
        end, number = stream_state(b"".join(pieces)), next(_numbers)
        if end == INSIDE_OBJECT:
            # The stream ends inside an object, so the broker has nothing to reply to.
            return
        if end == BETWEEN_OBJECTS:
            connection.send(json.dumps({"type": "ping", "seq": number}).encode())
        deadline = time.monotonic() + timeout
        while (found := _receive(connection, deadline, end)) is not None:
            _check_message(found, strict=token is not None)
            if end == BETWEEN_OBJECTS and (found["type"], found.get("seq")) == ("pong", number):
                return
        code = connection.code
        assert code in CLOSE_CODES, f"the connection was closed with {code}, after {pieces}"
    finally:
        connection.close()


def _receive(connection: BlockingConnection, deadline: float, end: str) -> dict[str, object] | None:
    try:
        return connection.receive(deadline - time.monotonic())
    except TimeoutError:
        what = "a ping is not answered" if end == BETWEEN_OBJECTS else "a malformed stream does not end the connection"
        raise AssertionError(what) from None


def _check_message(found: dict[str, object], *, strict: bool) -> None:
    """Raise `AssertionError` unless the broker may send that. Fields may be missing for a first-version client."""
    if strict:
        try:
            wire.decode_server(json.dumps(found).encode())
        except msgspec.ValidationError as error:
            raise AssertionError(f"{found} is not a valid broker message: {error}") from None
    else:
        assert found.get("type") in UNAUTHENTICATED_REPLIES, f"{found} is not a reply to an unauthenticated client"


UNAUTHENTICATED_REPLIES = ("auth_error", "subscribe_error", "publish_error", "error", "pong")
