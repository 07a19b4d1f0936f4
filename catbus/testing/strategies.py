"""Hypothesis strategies for valid, nearly valid and hostile protocol input.

Values are small so that failing examples are short, and channels are few so that patterns match often.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st
from msgspec import UNSET, Raw, UnsetType

from ..auth.grants import Grants
from ..auth.tokens import sign
from ..protocol import wire_messages as wire

MAX_INTEGER = 2**63 - 1

SEGMENTS = st.text(alphabet="abz019_-", min_size=1, max_size=4)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def channels() -> st.SearchStrategy[str]:
    """Channels of one to four segments (section 2 of the specification)."""
    return st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


def patterns() -> st.SearchStrategy[str]:
    """Patterns: channels, channels followed by `.*`, and `*`."""
    return channels() | channels().map(lambda channel: channel + ".*") | st.just("*")


def payloads() -> st.SearchStrategy[bytes]:
    """Payloads: JSON as bytes, with non-ASCII characters unescaped."""
    return JSON.map(lambda value: json.dumps(value, ensure_ascii=False).encode())


def grants() -> st.SearchStrategy[Grants]:
    """Grants with up to three patterns each to read and to write."""
    some = st.lists(patterns(), max_size=3, unique=True).map(tuple)
    return st.builds(Grants, read=some, write=some)


def tokens(secret: str) -> st.SearchStrategy[str]:
    """Tokens signed with `secret` that do not expire (section 13)."""
    names = st.none() | st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)
    return st.builds(lambda name, allowed: sign(secret, client_id=name, grants=allowed), names, grants())


def client_messages() -> st.SearchStrategy[Any]:
    """Every message that a client may send, as a struct of `catbus.wire`. Fields hold any value of their type."""
    return st.one_of([messages(kind) for kind in get_args(wire.ClientMessage)])


def server_messages() -> st.SearchStrategy[Any]:
    """Every message that a broker may send, as a struct of `catbus.wire`."""
    return st.one_of([messages(kind) for kind in get_args(wire.ServerMessage)])


def messages(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Messages of one type, a struct of `catbus.wire`."""
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: _values(hints[name]) for name in kind.__struct_fields__})


def _values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field of this type."""
    if hint == wire.Number:
        return st.integers(0, MAX_INTEGER)
    if hint is int:
        return st.integers(-(2**63), MAX_INTEGER)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if hint is Raw:
        return payloads().map(Raw)
    if hint is UnsetType:
        return st.just(UNSET)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of(*map(_values, arguments))
    if origin is list:
        return st.lists(_values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(_values(arguments[0]), _values(arguments[1]), max_size=3)
    if hasattr(hint, "__metadata__"):
        return st.integers(1, MAX_INTEGER)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return messages(hint)
    return st.from_type(hint)


def malformed_messages() -> st.SearchStrategy[bytes]:
    """JSON objects that are nearly valid client messages: one field missing, of another type, or unknown."""
    return st.builds(_malform, client_messages(), st.integers(0, 7), JSON, st.integers(0, 2))


def _malform(message: Any, place: int, value: Any, how: int) -> bytes:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(message))
    name = sorted(found)[place % len(found)]
    if how == 0:
        del found[name]
    elif how == 1:
        found[name] = value
    else:
        found[f"{name}_"] = value
    return msgspec.json.encode(found)


def byte_streams() -> st.SearchStrategy[bytes]:
    """Up to five client messages with any or no white space between them (section 4)."""
    spaces = st.text(alphabet=" \t\r\n", max_size=2).map(str.encode)
    return st.lists(st.tuples(spaces, client_messages().map(msgspec.json.encode)), max_size=5).map(
        lambda parts: b"".join(part for pair in parts for part in pair)
    )


def hostile_streams() -> st.SearchStrategy[bytes]:
    """Invalid input: nearly valid messages, truncated objects, and arbitrary bytes."""
    pieces = st.one_of(
        malformed_messages(),
        client_messages().map(msgspec.json.encode),
        st.binary(max_size=20),
        st.sampled_from([b"{", b"}", b'{"', b'"}', b"[", b"null", b"\xff\xfe", b"\xef\xbb\xbf", b'{"type":' * 70]),
    )
    return st.lists(pieces, min_size=1, max_size=6).map(b"".join)


@st.composite
def cut(draw: st.DrawFn, data: bytes, most: int = 6) -> Sequence[bytes]:
    """`data` in up to `most` pieces, some of them empty, as a network may deliver it."""
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=most - 1)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
