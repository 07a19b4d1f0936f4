"""A client that means no good, and what a broker owes it all the same: sensible words, and an end that says why."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from itertools import count

import msgspec

from ..errors import CloseCode
from ..protocol import wire_messages as wire
from .connections import Connection

WHOLE, INSIDE, BROKEN = "whole", "inside", "broken"
ENDS = frozenset(CloseCode) - {CloseCode.INTERNAL} | {1000, 1007, 1009}
"""The codes with which a connection may be closed (section 11, and RFC 6455)."""

_numbers = count(1 << 40)


def scan(data: bytes) -> str:
    """Where a stream of objects stands at its end: between objects, inside one, or past understanding (section 4).

    Said anew here: it shares no code with what it judges.
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
                return BROKEN
        elif byte == ord("}"):
            level -= 1
        elif byte == ord('"'):
            inside_text = True
    return INSIDE if level else WHOLE


def attack(connection: Connection, pieces: Iterable[bytes], patience: float, *, token: str | None = None) -> None:
    """Send `pieces`, after an `auth` where there is a token, hear what comes of it, and close the connection.

    Raises `AssertionError` unless each word of the broker's is one of the specification, a stream that makes no sense
    is closed with a code of section 11, and one that does is answered or closed so. Waits `patience` s at most.
    """
    pieces = list(pieces)
    try:
        if token is not None:
            connection.send(json.dumps({"type": "auth", "token": token, "protocol": 1}).encode())
        for piece in pieces:
            connection.send(piece)
        end, number = scan(b"".join(pieces)), next(_numbers)
        if end == INSIDE:
            # It is about to end an object that nobody expects the end of.
            return
        if end == WHOLE:
            connection.send(json.dumps({"type": "ping", "seq": number}).encode())
        deadline = time.monotonic() + patience
        while (found := _hear(connection, deadline, end)) is not None:
            _check(found, strict=token is not None)
            if end == WHOLE and (found["type"], found.get("seq")) == ("pong", number):
                return
        code = connection.code
        assert code in ENDS, f"the connection was closed with {code}, after {pieces}"
    finally:
        connection.close()


def _hear(connection: Connection, deadline: float, end: str) -> dict[str, object] | None:
    try:
        return connection.receive(deadline - time.monotonic())
    except TimeoutError:
        what = "a ping is not answered" if end == WHOLE else "what makes no sense does not end the connection"
        raise AssertionError(what) from None


def _check(found: dict[str, object], *, strict: bool) -> None:
    """Whether the broker may say that. To a first-version client, fields may be left out."""
    if strict:
        try:
            wire.decode_server(json.dumps(found).encode())
        except msgspec.ValidationError as error:
            raise AssertionError(f"{found} is nothing that a broker may say: {error}") from None
    else:
        assert found.get("type") in FIRST_VERSION, f"{found} is nothing that a broker says to who has shown no token"


FIRST_VERSION = ("auth_error", "subscribe_error", "publish_error", "error", "pong")
