"""catbus.endpoints.http.query, and where the token of a request is found"""

from __future__ import annotations

from typing import Annotated

import pytest
from msgspec import UNSET, Meta, Struct, UnsetType

from catbus.endpoints.http.http_request import HttpRequest, request_token
from catbus.endpoints.http.query import (
    decode_percent,
    format_cursor,
    parse_cursor,
    parse_query,
    parse_query_as,
    since,
)
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError

ALLOWED = {"pattern": 2, "since": 1, "epoch": 1}
BEARER = ((b"authorization", b"Bearer good"),)
SECRET = "sub-c2VjcmV0LXRva2Vu.c2ln"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("&&", {}),
        ("pattern=a.*", {"pattern": ["a.*"]}),
        ("pattern=a.%2A&pattern=%c3%a4+b", {"pattern": ["a.*", "ä b"]}),
        ("%70attern=a", {"pattern": ["a"]}),
        ("since", {"since": [""]}),
        ("since=1=2", {"since": ["1=2"]}),
        ("epoch=%2B%26%3D", {"epoch": ["+&="]}),
        ("access_token=x&pattern=a", {"access_token": ["x"], "pattern": ["a"]}),
    ],
)
def test_query_is_parsed_as_forms_are(text: str, found: dict[str, list[str]]) -> None:
    assert parse_query(text, ALLOWED) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patern=a", "there is no parameter `patern` here (known: pattern, since, epoch)"),
        ("=a", "there is no parameter `` here (known: pattern, since, epoch)"),
        ("x" * 16_000, f"there is no parameter `{'x' * 32}` here (known: pattern, since, epoch)"),
        ("since=1&since=1", "`since` may occur once"),
        ("pattern=a&pattern=b&pattern=c", "`pattern` may occur 2 times"),
        (f"access_token={SECRET}&access_token={SECRET}", "`access_token` may occur once"),
        ("epoch=%", "`epoch` has a `%` without two hexadecimal digits"),
        ("epoch=%4", "`epoch` has a `%` without two hexadecimal digits"),
        ("epoch=%zz", "`epoch` has a `%` without two hexadecimal digits"),
        (f"access_token={SECRET}%", "`access_token` has a `%` without two hexadecimal digits"),
        ("epoch=%ff", "`epoch` is not UTF-8"),
        ("epoch=%ed%a0%80", "`epoch` is not UTF-8"),
        ("%ff=1", "a parameter's name is not UTF-8"),
    ],
)
def test_invalid_query_is_rejected(text: str, message: str) -> None:
    with pytest.raises(PeerError) as caught:
        parse_query(text, ALLOWED)
    assert (caught.value.code, caught.value.message) == (ErrorCode.BAD_MESSAGE, message)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("since=0", (0, None)),
        ("since=9223372036854775807", (2**63 - 1, None)),
        ("since=17&epoch=e", (17, "e")),
        ("since=17.e", (17, "e")),
        ("since=17.e&epoch=e", (17, "e")),
        ("since=17.0b6c3a3e-6f65-4b54-9a52-7a6c7d9f0d11", (17, "0b6c3a3e-6f65-4b54-9a52-7a6c7d9f0d11")),
    ],
)
def test_position_to_resume_after_has_two_forms(text: str, found: tuple[int, str | None] | None) -> None:
    assert since(parse_query(text, ALLOWED)) == found


@pytest.mark.parametrize(
    "text",
    [
        "since=", "since=x", "since=-1", "since=%2B1", "since=1_0", "since=1.5.e", "since=1.", "since=.e", "since=%20",
        "since=9223372036854775808", "since=99999999999999999999", "since=%D9%A1", "since=1%0A", "since=1.e%0A",
        "since=1.e&epoch=f", "epoch=e",
    ],
)  # fmt: skip
def test_invalid_position_is_rejected(text: str) -> None:
    with pytest.raises(PeerError) as caught:
        since(parse_query(text, ALLOWED))
    assert caught.value.code is ErrorCode.BAD_MESSAGE


def test_cursor_is_parsed_as_it_was_formatted() -> None:
    assert parse_cursor(format_cursor(2**63 - 1, "e-1")) == (2**63 - 1, "e-1")
    assert parse_cursor("nonsense") is None


@pytest.mark.parametrize("query", ["access_token=good", "pattern=%&access_token=g%6Fod", "acc%65ss_token=good&x"])
def test_token_may_be_in_the_query(query: str) -> None:
    assert request_token(HttpRequest("GET", "/", query=query)) == "good"


def test_token_in_the_header_is_found_beside_a_query() -> None:
    assert request_token(HttpRequest("GET", "/", BEARER, query="pattern=%ff")) == "good"


@pytest.mark.parametrize(
    ("headers", "query", "code"),
    [
        ((), "", ErrorCode.UNAUTHENTICATED),
        ((), "token=good", ErrorCode.UNAUTHENTICATED),
        ((), "access_token=", ErrorCode.UNAUTHENTICATED),
        ((), "access_token", ErrorCode.UNAUTHENTICATED),
        (BEARER, "access_token=good", ErrorCode.BAD_MESSAGE),
        ((), "access_token=good&acc%65ss_token=good", ErrorCode.BAD_MESSAGE),
        ((), "access_token=%ff", ErrorCode.BAD_MESSAGE),
    ],
)
def test_request_has_one_token(headers: tuple[tuple[bytes, bytes], ...], query: str, code: ErrorCode) -> None:
    with pytest.raises(PeerError) as caught:
        request_token(HttpRequest("GET", "/", headers, query=query))
    assert caught.value.code is code


def test_text_of_a_request_contains_no_token() -> None:
    text = repr(HttpRequest("GET", "/messages", ((b"authorization", SECRET.encode()),), query=f"access_token={SECRET}"))
    assert SECRET not in text


class Page(Struct):
    name: Annotated[str, Meta(min_length=1, max_length=5)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=100)] = 10
    old: bool = False


def test_query_becomes_a_struct() -> None:
    assert parse_query_as("", Page) == Page()
    assert parse_query_as("name=null&limit=7&old=true&access_token=x", Page) == Page("null", 7, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limit=0", "`limit`: expected `int` >= 1"),
        ("limit=1e3", "`limit`: expected `int` <= 100"),
        ("limit=%2B1", "`limit`: expected `int`, got `str`"),
        ("old=yes", "`old`: expected `bool`, got `str`"),
        ("name=", "`name`: expected `str` of length >= 1"),
        ("name=123456", "`name`: expected `str` of length <= 5"),
        ("limit=1&limit=2", "`limit` may occur once"),
        ("other=1", "there is no parameter `other` here (known: name, limit, old)"),
    ],
)
def test_value_of_another_type_is_rejected(text: str, expected: str) -> None:
    with pytest.raises(PeerError) as caught:
        parse_query_as(text, Page)
    assert (caught.value.code, caught.value.message) == (ErrorCode.BAD_MESSAGE, expected)


def test_plus_is_a_space_in_a_query_alone() -> None:
    assert decode_percent("a+b%2Fc%00", "it") == "a+b/c\0"
