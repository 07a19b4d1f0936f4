"""`protocol/README.md` agrees with the code: tests compare its tables, decode and verify its examples, and run them."""

from __future__ import annotations

import hmac
import json
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import jwt
import msgspec
import pytest
import trio
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import FieldInfo
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth import live_permissions
from catbus.auth.grants import Grants, Identity
from catbus.auth.jwt_keys import KeySetStatistics
from catbus.auth.role_tokens import make_role_token, role_handle, role_key
from catbus.auth.tokens import MAX_TOKEN, Authenticator, sign
from catbus.close_codes import CloseCode
from catbus.config import Config, LimitSettings
from catbus.delivery.page_size import MAX_HISTORY
from catbus.endpoints import queue_writer
from catbus.endpoints.http import error_responses, http_connection, routes
from catbus.endpoints.websocket import inbound_frame_limits, websocket_connection
from catbus.endpoints.webtransport import webtransport_session
from catbus.error_codes import RETRYABLE, ErrorCode
from catbus.errors import PeerError, Unavailable
from catbus.limits import unauthenticated
from catbus.log import EPHEMERAL_SIZE, MemoryLog
from catbus.postgres import outbox_relay
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, sqlstate
from catbus.postgres.listen import polling_interval
from catbus.postgres.roles import role_lookup
from catbus.presence.interface import MAX_INFO, MAX_MEMBERS
from catbus.protocol import channels
from catbus.protocol import wire_messages as wire
from catbus.protocol.json_splitter import JsonSplitter
from catbus.protocol.wire_messages import ProtocolVersion, Reply, Request
from catbus.replica import Replica
from catbus.session.driver import client_limits
from catbus.session.heads import HEAD_INTERVAL
from catbus.webtransport import ConnectionLimits
from tests.postgres.sql import open_sql
from tests.test_replica import Roles
from tests.test_tokens import signed_jwt

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "protocol" / "README.md").read_text(encoding="utf-8")
NOTHING = "-"

Row = dict[str, str]


# The document


def section(title: str) -> str:
    """The text below a heading, whatever its number, up to the next heading of the same level."""
    found = re.search(rf"^## \d+\. {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def prose(title: str) -> str:
    """The text of a section in one line, so that searches do not depend on its line breaks."""
    return " ".join(section(title).split())


def table(text: str, *columns: str) -> list[Row]:
    """The rows of the table whose first columns are these."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        head = _cells(line)
        if line.startswith("|") and head[: len(columns)] == list(columns):
            rows = []
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    break
                assert len(_cells(row)) == len(head), row
                rows.append(dict(zip(head, _cells(row), strict=True)))
            return rows
    pytest.fail(f"there is no table of {columns}")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def quoted(cell: str) -> list[str]:
    """The code spans in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def blocks(*kinds: str, within: str = DOCUMENT) -> Iterator[tuple[str, bytes]]:
    """The fenced blocks marked with one of `kinds`, in order."""
    for kind, text in re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", within, re.MULTILINE | re.DOTALL):
        if kind in kinds:
            yield kind, text.encode()


def objects(text: bytes) -> list[Any]:
    """The objects in a block, found as the broker finds them."""
    return list(JsonSplitter(msgspec.json.decode, limit=1 << 20).feed(text))


def anchors(document: str) -> set[str]:
    """The link targets of its headings."""
    headings = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
    *("protocol/README.md", "clients/javascript/README.md", "k8s/README.md", "bench/README.md"),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_existing_files_and_headings(name: str) -> None:
    document = ROOT / name
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
        there = document.parent / target if target else document
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), anchor


# Channels and patterns

PATTERNS = table(section("Channels and patterns"), "Pattern")


@pytest.mark.parametrize("row", PATTERNS, ids=lambda row: row["Pattern"])
def test_patterns_match_and_cover_as_in_the_table(row: Row) -> None:
    [pattern] = quoted(row["Pattern"])
    for column, relation, expected in [
        ("Matches", channels.matches, True),
        ("Does not match", channels.matches, False),
        ("As a grant, covers", channels.covers, True),
        ("Does not cover", channels.covers, False),
    ]:
        for other in quoted(row[column]):
            (channels.check_channel if "atch" in column else channels.check_pattern)(other)
            assert relation(pattern, other) is expected, f"{pattern} {column} {other}"


def test_texts_listed_as_invalid_are_rejected() -> None:
    text = section("Channels and patterns")
    [neither] = re.findall(r"Neither channels nor patterns: (.*?)\.\n", text, re.DOTALL)
    [patterns] = re.findall(r"Patterns but not channels: (.*?)\.\n", text, re.DOTALL)
    for word in quoted(neither) + quoted(patterns):
        with pytest.raises(PeerError):
            channels.check_channel(word)
    for word in quoted(neither):
        with pytest.raises(PeerError):
            channels.check_pattern(word)
    for word in quoted(patterns):
        channels.check_pattern(word)


# Messages

REQUESTS: dict[str, type[Request]] = {kind.__struct_config__.tag: kind for kind in get_args(wire.ClientMessage)}
REPLIES: dict[str, type[Reply]] = {kind.__struct_config__.tag: kind for kind in get_args(wire.ServerMessage)}

FIRST_VERSION_REQUESTS = {
    "auth": ["token"],
    "subscribe": ["pattern"],
    "unsubscribe": ["pattern"],
    "publish": ["channel", "payload"],
    "ping": ["seq"],
}
"""The required fields of first-version clients. They never change, so they are repeated here."""

TYPES: dict[Any, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    Raw: "JSON",
    Raw | UnsetType: "JSON",
    ErrorCode: "code",
    wire.Number: "count",
    dict[str, int]: "integers by name",
    list[wire.ChannelMessage]: "list of `message`",
    list[wire.ChannelMember]: "list of members",
}


def fields_in_document(title: str, column: str) -> dict[str, list[Row]]:
    """The rows of each message. A row without a name belongs to the message above it."""
    messages: dict[str, list[Row]] = {}
    for row in table(section(title), "Message", "Field", "Type", column):
        if row["Message"]:
            [name] = quoted(row["Message"])
            assert name not in messages
            messages[name] = []
        messages[name].append(row)
    return messages


def type_in_words(field: FieldInfo) -> str:
    kinds = [kind for kind in get_args(field.type) if kind is not NoneType] if is_nullable(field) else [field.type]
    [kind] = kinds
    if kind not in TYPES:
        [constraint] = kind.__metadata__
        assert (kind.__origin__, constraint) == (int, msgspec.Meta(ge=1))
        return "positive"
    return TYPES[kind] + (" or null" if is_nullable(field) and field.required else "")


def is_nullable(field: FieldInfo) -> bool:
    return NoneType in get_args(field.type)


def test_member_has_the_fields_of_the_table() -> None:
    rows = table(section("Publishing"), "Field", "Type", "Sent", "Meaning")
    defined = [
        (field.encode_name, type_in_words(field), "always" if field.required else "optional")
        for field in msgspec.structs.fields(wire.ChannelMember)
    ]
    assert [(*quoted(row["Field"]), row["Type"], row["Sent"]) for row in rows] == defined


def fixed(rows: list[Row]) -> list[str] | None:
    """The fields of a message that are marked as part of the first version, or None if the message is not."""
    marked = [name for row in rows for name in quoted(row["Field"]) if row["Field"].endswith("*")]
    return marked if rows[0]["Message"].endswith("*") else None


def test_table_lists_all_client_messages_and_no_others() -> None:
    assert list(fields_in_document("Client messages", "Default")) == list(REQUESTS)


def test_table_lists_all_broker_messages_and_no_others() -> None:
    assert list(fields_in_document("Broker messages", "Sent")) == list(REPLIES)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_has_the_fields_of_the_table(name: str) -> None:
    rows = fields_in_document("Client messages", "Default")[name]
    listed = [(*quoted(row["Field"]), row["Type"], row["Default"]) for row in rows]
    defined = []
    for field in msgspec.structs.fields(REQUESTS[name]):
        assert is_nullable(field) is (not field.required and field.default is None)
        if field.required:
            value = "required"
        else:
            value = "none" if field.default in (None, UNSET) else f"`{json.dumps(field.default)}`"
        defined.append((field.encode_name, type_in_words(field), value))
    assert listed == defined


@pytest.mark.parametrize("name", REQUESTS)
def test_request_requires_exactly_its_fixed_fields(name: str) -> None:
    marked = fixed(fields_in_document("Client messages", "Default")[name])
    assert marked == FIRST_VERSION_REQUESTS.get(name)
    if marked is not None:
        assert marked == [field.encode_name for field in msgspec.structs.fields(REQUESTS[name]) if field.required]


@pytest.mark.parametrize("name", REPLIES)
def test_reply_has_the_fields_of_the_table(name: str) -> None:
    rows = fields_in_document("Broker messages", "Sent")[name]
    listed = [(*quoted(row["Field"]), row["Type"], row["Sent"]) for row in rows]
    defined = [
        (field.encode_name, type_in_words(field), "always" if field.required else "optional")
        for field in msgspec.structs.fields(REPLIES[name])
    ]
    assert listed == defined


@pytest.mark.parametrize("name", REPLIES)
def test_first_version_client_gets_the_fixed_fields_of_a_reply(name: str) -> None:
    marked = fixed(fields_in_document("Broker messages", "Sent")[name])
    known = REPLIES[name].fixed
    assert marked == (None if known is None else list(known))


# Examples


@pytest.mark.parametrize("kind", ["client", "server"])
def test_examples_decode_and_have_no_unknown_fields(kind: str) -> None:
    decode: Callable[[bytes], Any] = wire.decode_client if kind == "client" else wire.decode_server
    for _, text in blocks(kind):
        for message, plain in zip(JsonSplitter(decode).feed(text), objects(text), strict=True):
            assert not isinstance(message, PeerError), f"{plain}: {message}"
            assert plain.keys() <= {field.encode_name for field in msgspec.structs.fields(message)} | {"type"}


@pytest.mark.parametrize(
    ("kind", "title", "messages"),
    [("client", "Client messages", REQUESTS), ("server", "Broker messages", REPLIES)],
    ids=["client", "server"],
)
def test_every_message_has_an_example(kind: str, title: str, messages: dict[str, Any]) -> None:
    [(_, text)] = blocks(kind, within=section(title))
    assert list(dict.fromkeys(plain["type"] for plain in objects(text))) == list(messages)


def test_examples_for_first_version_clients_have_the_fixed_fields() -> None:
    seen = set()
    for _, text in blocks("first-version"):
        for plain in objects(text):
            assert plain.keys() == {"type", *(REPLIES[plain["type"]].fixed or ())}
            seen.add(plain["type"])
    assert seen == {name for name, kind in REPLIES.items() if kind.fixed is not None}


def test_examples_for_http_decode() -> None:
    [(_, text)] = blocks("publish")
    for item in msgspec.json.decode(text, type=list[Raw]):
        wire.decode_publish(bytes(item))
        assert json.loads(bytes(item)).keys() <= {field.encode_name for field in msgspec.structs.fields(wire.Publish)}


# Codes


def test_error_codes_are_those_of_the_table() -> None:
    listed = [
        (*quoted(row["Code"]), row["Retry?"], row["HTTP"]) for row in table(section("Error codes"), "Code", "Retry?")
    ]
    defined = [
        (code, "yes" if code in RETRYABLE else "no", str(error_responses.ERROR_STATUSES.get(code, 400)))
        for code in ErrorCode
    ]
    assert listed == defined


def test_closing_codes_are_those_of_the_table() -> None:
    listed = [(row["Code"], *quoted(row["Name"])) for row in table(section("Closing codes"), "Code", "Name")]
    assert listed == [(str(int(code)), code.name.lower()) for code in CloseCode]


def test_closing_code_is_in_the_range_of_its_kind() -> None:
    ranges = [(int(row["From"]), int(row["To"])) for row in table(section("Closing codes"), "From", "To")]
    final, new_token, again = ranges
    assert final[1] + 1 == new_token[0]
    assert new_token[1] + 1 == again[0]
    for code in CloseCode:
        [home] = [low for low, high in ranges if low <= code <= high]
        assert code.final is (home == final[0])
        assert (code in (CloseCode.TOKEN_EXPIRED, CloseCode.REVOKED)) is (home == new_token[0])


def test_advice_for_publish_errors_agrees_with_the_retryable_codes() -> None:
    advice: dict[str, set[str]] = {}
    for row in table(section("Publishing"), "Reply"):
        answer, _, codes = row["Reply"].partition(":")
        if answer == "`publish_error`":
            key = re.sub(r"\W", " ", row["What to do"]).split(" id")[0].split()[-1]
            advice.setdefault(key, set()).update(quoted(codes))
    of_auth = {ErrorCode.AUTH_TIMEOUT, ErrorCode.TOKEN_NOT_VALID_YET}
    new = RETRYABLE - of_auth - {ErrorCode.UNKNOWN}
    assert advice == {
        "new": new,
        "same": {ErrorCode.UNKNOWN},
        "message": {ErrorCode.CONFLICT},
        "again": set(),
    }, advice


# Limits


def setting(name: str) -> Any:
    return reduce(getattr, name.split("."), Config())


AUTH_OK_LIMITS = table(section("Limits"), "Name", "Default")
OTHER_LIMITS = table(section("Limits"), "Limit", "Default")

CONNECTION_LIMITS = ConnectionLimits()

CONSTANTS = {
    "`history`": MAX_HISTORY,
    "`ephemeral_size`": EPHEMERAL_SIZE,
    "bytes of a channel or pattern": channels.MAX_LENGTH,
    "segments of a channel or pattern": channels.MAX_SEGMENTS,
    "nesting depth of an object from a client": wire.MAX_DEPTH,
    "bytes of the `info` of a member": MAX_INFO,
    "members in a page, of about 1 MiB together": MAX_MEMBERS,
    "bytes of a token": MAX_TOKEN,
    "seconds for the lookup of a role": role_lookup.LOOKUP_TIMEOUT,
    "seconds without the database during which roles keep their permissions": live_permissions.MAX_STALENESS,
    "size of a WebSocket message, in objects of `message_size`": websocket_connection.MAX_OBJECTS_PER_MESSAGE,
    "bytes of a WebSocket message before the first `auth_ok`": websocket_connection.UNAUTHENTICATED_OBJECT_BYTES,
    "bytes of an object before the first `auth_ok`": unauthenticated.UNAUTHENTICATED_OBJECT_BYTES,
    "bytes held for all unauthenticated peers together": unauthenticated.UNAUTHENTICATED_TOTAL_BYTES,
    "fragments of a WebSocket message, plus one for every 32 bytes of it": inbound_frame_limits.MAX_FRAGMENTS,
    "bytes waiting for a subscription on its own stream, as a fraction of `limits.send_queue`: one part in": (
        webtransport_session.SUBSCRIPTION_QUEUE_DIVISOR
    ),
    "streams that the broker opens in a session": CONNECTION_LIMITS.outgoing_streams,
    "datagrams waiting in a session": CONNECTION_LIMITS.queued_datagrams,
    "seconds without other data until the broker sends `head` unasked (at most twice as many)": HEAD_INTERVAL,
    "seconds during which a client takes none of the waiting data": queue_writer.STALL_TIMEOUT,
    "the same for a subscription's own stream": webtransport_session.STALL_TIMEOUT,
    "seconds for closing": websocket_connection.CLOSE_TIMEOUT,
    "bytes of the head of an HTTP request": http_connection.MAX_HEAD_SIZE,
    "bytes of the body of `POST /publish`": http_connection.MAX_BODY_SIZE,
}
"""The limits that have no setting, by their names in the tables."""


def test_auth_ok_contains_the_limits_of_the_table() -> None:
    limits = {name: int(row["Default"]) for row in AUTH_OK_LIMITS for name in quoted(row["Name"])}
    assert limits == client_limits(Config().limits)


@pytest.mark.parametrize("row", AUTH_OK_LIMITS + OTHER_LIMITS, ids=lambda row: row.get("Name") or row["Limit"])
def test_limit_has_the_default_of_the_table(row: Row) -> None:
    label = row.get("Name") or row["Limit"]
    if row["Set by"] == NOTHING:
        assert float(row["Default"]) == CONSTANTS[label]
    else:
        [name] = quoted(row["Set by"])
        assert float(row["Default"]) == setting(name)
        assert label not in CONSTANTS


def test_tables_contain_every_limit_once() -> None:
    named = [name for row in AUTH_OK_LIMITS + OTHER_LIMITS for name in quoted(row["Set by"])]
    internal = {"recent"}
    assert {name for name in named if name.startswith("limits.")} == {
        f"limits.{name}" for name in LimitSettings.__struct_fields__ if name not in internal
    }
    assert len(set(named)) == len(named)


def test_sizes_in_the_text_are_those_of_the_code() -> None:
    text = prose("Channels and patterns")
    assert f"at most {channels.MAX_LENGTH} bytes and {channels.MAX_SEGMENTS} segments" in text
    assert f"nested at most {wire.MAX_DEPTH} deep" in prose("Framing")


# Epochs, and publishing from SQL


def test_intervals_in_the_text_are_those_of_the_code() -> None:
    assert f"every {polling_interval.NOTIFIED_INTERVAL:g} seconds, they check" in prose("Delivery")
    look, brisk = (f"{pace * 1000:g} ms" for pace in (outbox_relay.POLL_INTERVAL, outbox_relay.BUSY_POLL_INTERVAL))
    assert f"every {look}, and every {brisk} in the {outbox_relay.BUSY_TIME:g} seconds" in prose("Publishing")


async def test_sql_function_rejects_as_in_the_table(database_url: str) -> None:
    text = section("Publishing")
    async with open_sql(database_url) as sql:
        for row in table(text, "Rejected", "SQLSTATE"):
            [state], [statement] = quoted(row["SQLSTATE"]), quoted(row["For example"])
            with pytest.raises(DATABASE_ERRORS) as refused:
                await sql.fetch(statement)
            assert sqlstate(refused.value) == state, row
        assert await sql.fetchrow("SELECT catbus.outbox_pending()") == (False,)
        for too_much, enough in (("65)", "64)"), ("65484", "65483")):
            [statement] = [statement for statement in re.findall(r"`(SELECT .*?)` \|", text) if too_much in statement]
            await sql.fetch(statement.replace(too_much, enough))
        rows = await sql.fetch("SELECT octet_length(channel) + octet_length(payload) FROM catbus.outbox_0 ORDER BY id")
        assert f"nested at most {wire.MAX_DEPTH} deep, counting itself, and has at most {rows[1][0]} bytes" in prose(
            "Publishing"
        )


# Tokens

SECRET = "an example secret, not for use"
NOW = 1_900_000_000.0


def base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def make_token(body: bytes, secret: str = SECRET) -> tuple[str, str, str]:
    """TEXT, MAC and the token, made as the specification describes."""
    text = base64url(body)
    mac = base64url(hmac.digest(secret.encode(), text.encode(), "sha256")[:16])
    return text, mac, f"sub-{text}.{mac}"


def test_token_example_verifies() -> None:
    [(_, block)] = blocks("token")
    listed = dict(line.split(maxsplit=1) for line in block.decode().splitlines())
    assert (listed["text"], listed["mac"], listed["token"]) == make_token(listed["json"].encode(), listed["secret"])
    identity = Authenticator([listed["secret"]]).verify(listed["token"], NOW)
    claims = json.loads(listed["json"])
    read = tuple(grant["pattern"] for grant in claims["grants"]["grants"])
    assert {grant["grant_type"] for grant in claims["grants"]["grants"]} == {"read"}
    assert identity == Identity(claims["client_id"], Grants(read=read), claims["exp"])
    with pytest.raises(PeerError) as caught:
        Authenticator([listed["secret"]]).verify(listed["token"], claims["exp"])
    assert caught.value.code is ErrorCode.TOKEN_EXPIRED


CLAIMS = table(section("Tokens"), "Claim", "Type", "Required")


def test_claims_are_optional_as_in_the_table() -> None:
    values = {"client_id": "alice", "grants": {"grants": []}, "exp": NOW + 1, "nbf": NOW - 1}
    values |= {"publish_rate": 1, "publish_bytes": 1, "iat": NOW}
    assert [quoted(row["Claim"]) for row in CLAIMS] == [[name] for name in values]
    authenticator = Authenticator([SECRET])
    for row in CLAIMS:
        [name] = quoted(row["Claim"])
        without = {key: value for key, value in values.items() if key != name}
        for body, works in [
            (values, True),
            (without, row["Required"] == "no"),
            ({**values, name: None}, row["Type"].endswith("or null")),
            ({**values, name: True}, False),
        ]:
            token = make_token(json.dumps(body).encode())[2]
            if works:
                authenticator.verify(token, NOW)
            else:
                with pytest.raises(PeerError, match="not valid"):
                    authenticator.verify(token, NOW)


def test_grant_types_are_those_of_the_table() -> None:
    [row] = [row for row in CLAIMS if row["Claim"] == "`grants`"]
    names = quoted(row["Meaning"].partition("TYPE:")[2])
    allowed = {"read": (True, False), "write": (False, True), "all": (True, True), "create": (False, False)}
    assert set(names) == set(allowed)
    for name in names:
        body = {"grants": {"grants": [{"grant_type": name, "pattern": "a.*"}]}}
        grants = Authenticator([SECRET]).verify(make_token(json.dumps(body).encode())[2], NOW).grants
        assert (grants.may_read("a.*"), grants.may_write("a.b")) == allowed[name]


def test_role_example_has_its_hash_and_its_handle() -> None:
    [(_, block)] = blocks("role", within=section("Tokens"))
    listed = dict(line.split(maxsplit=1) for line in block.decode().splitlines())
    key = role_key(listed["token"])
    assert key is not None
    assert (key.hex(), role_handle(key)) == (listed["sha256"], listed["handle"])
    assert len(make_role_token()) == len(listed["token"])
    assert f"has not answered within {role_lookup.LOOKUP_TIMEOUT:g} seconds" in prose("Tokens")


def test_jwt_example_verifies() -> None:
    [(_, text)] = blocks("jwt")
    claims = json.loads(text)
    secret = SECRET.ljust(32, ".")
    identity = Authenticator([secret]).verify(jwt.encode(claims, secret, "HS256"), NOW)
    grants = Grants(tuple(claims["catbus"]["read"]), tuple(claims["catbus"]["write"]))
    rate = claims["catbus"]["publish_rate"]
    assert identity == Identity(claims["sub"], grants, claims["exp"], publish_rate=rate)


# HTTP


def test_routes_are_those_of_the_table() -> None:
    listed: dict[str, list[str]] = {}
    for row in table(section("HTTP"), "Request", "Response"):
        [request] = quoted(row["Request"])
        method, path = request.split()
        listed.setdefault(path, []).append(method)
    assert listed == {path: list(methods) for path, methods in routes.ROUTES.items()}


# Sessions, against a broker without a network


class Peer:
    """A client without a network: it reads the send queue of its session."""

    def __init__(self, replica: Replica) -> None:
        self.client = replica.open_session(self, transport="test")

    def flush(self) -> None:
        """Do nothing: the tests empty the send queue themselves."""

    async def send(self, *messages: Any) -> list[dict[str, Any]]:
        """Send messages to the broker, and return what it sends until all tasks wait."""
        data = [message if isinstance(message, bytes) else json.dumps(message).encode() for message in messages]
        await self.client.receive(b"\n".join(data))
        return await self.receive()

    async def receive(self) -> list[dict[str, Any]]:
        """Return what the broker sends until all tasks wait."""
        received: list[dict[str, Any]] = []
        first = self.client.session.protocol is ProtocolVersion.FIRST
        while True:
            await wait_all_tasks_blocked()
            items = self.client.send_queue.take()
            if not items:
                return received
            for item in items:
                lines = item if isinstance(item, bytes) else b"".join(item.first_version_lines) if first else item.lines
                received += objects(lines)


class UnreachableKeySets:
    async def finish(self) -> bool:
        return False

    async def refresh(self) -> bool:
        return False

    def statistics(self) -> KeySetStatistics:
        raise AssertionError


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Replica]:
    """A replica that has revoked the tokens of alice that do not say when they were issued."""
    roles = Roles()
    roles.answer = Unavailable("the database is unreachable")
    roles.let.set()
    replica = Replica(config, MemoryLog(), Authenticator([SECRET]), roles=roles, key_sets=UnreachableKeySets())
    async with trio.open_nursery() as nursery:
        await nursery.start(replica.log.run, replica.delivery)
        nursery.start_soon(replica.delivery.run)
        nursery.start_soon(replica.revocations.run)
        nursery.start_soon(replica.presence.run)
        nursery.start_soon(replica.presence_feeder.run)
        await replica.revoke_client("alice", 1.0)
        yield replica
        nursery.cancel_scope.cancel()


def auth(
    protocol: int = 1,
    *,
    client_id: str = "alice",
    read: str = "project.*",
    expires: float = 1e6,
    starts: float = -1000.0,
    issued: bool = True,
) -> dict[str, Any]:
    grants = Grants(read=(read,), write=("project.*",))
    now = time.time()
    token = sign(
        SECRET,
        client_id=client_id,
        grants=grants,
        expires=now + expires,
        not_before=now + starts,
        issued_at=now if issued else None,
    )
    return {"type": "auth", "token": token, "protocol": protocol}


def publish(**fields: Any) -> dict[str, Any]:
    return {"type": "publish", "channel": "project.a", "payload": 1, "echo": False, **fields}


def subscribe(pattern: str) -> dict[str, Any]:
    return {"type": "subscribe", "pattern": pattern}


# The events, named as in the table. A session in the state "open" has already subscribed to project.*.
EVENTS: dict[str, Any] = {
    "`auth`, accepted": auth(),
    "`auth`, accepted, narrower grants": auth(read="project.a"),
    "`auth`, another `client_id`": auth(client_id="bob"),
    "`auth`, the token is not valid": {**auth(), "token": "sub-x.y"},
    "`auth`, the token has expired": auth(expires=-100),
    "`auth`, the token is not valid yet": auth(starts=1e5),
    "`auth`, the log has never been reachable": auth(),
    "`auth`, a role that cannot be looked up": {**auth(), "token": make_role_token()},
    "`auth`, the token was revoked": auth(issued=False),
    "`auth`, keys that cannot be fetched": {**auth(), "token": signed_jwt({"alg": "RS256", "kid": "new"}, {})},
    "`subscribe`": subscribe("project.*"),
    "`subscribe`, not a pattern": subscribe("project.*.a"),
    "`subscribe`, no grant covers it": subscribe("*"),
    "`subscribe`, too many subscriptions": subscribe("project.b"),
    "`unsubscribe`": {"type": "unsubscribe", "pattern": "project.*"},
    "`unsubscribe`, not subscribed to the pattern": {"type": "unsubscribe", "pattern": "project.b"},
    "`publish`": publish(),
    "`publish`, not a channel": publish(channel="project.*"),
    "`publish`, no grant matches it": publish(channel="projects"),
    "`publish`, `ephemeral`, over `ephemeral_size`": publish(ephemeral=True, payload="x" * EPHEMERAL_SIZE),
    "`publish`, `retry` without `id`, `after` or `epoch`": publish(retry=True, id=1, after=0),
    "`publish`, `expect` without `retain`": publish(expect=0),
    "`publish`, `retain` with `ephemeral`": publish(retain=True, ephemeral=True),
    "`publish`, `expect` is not the retained seq": publish(retain=True, expect=1),
    "`history`": {"type": "history", "pattern": "project.a"},
    "`history`, no grant covers it": {"type": "history", "pattern": "projects"},
    "`join`": {"type": "join", "channel": "project.a"},
    "`join`, not a channel": {"type": "join", "channel": "project.*"},
    "`join`, no grant covers it": {"type": "join", "channel": "projects"},
    "`join`, `info` over 1,024 bytes": {"type": "join", "channel": "project.a", "info": "x" * 1023},
    "`join`, too many channels": {"type": "join", "channel": "project.b"},
    "`leave`": {"type": "leave", "channel": "project.a"},
    "`leave`, not a channel": {"type": "leave", "channel": "project.*"},
    "`members`": {"type": "members", "pattern": "project.a"},
    "`members`, no grant covers it": {"type": "members", "pattern": "projects"},
    "`members`, `after` of another origin": {"type": "members", "pattern": "project.a", "after": "x"},
    "`ping`": {"type": "ping", "seq": 1},
    "an object that does not decode": {"type": "nonsense"},
    "anything else between objects": b"[]",
    "an object over `message_size`": publish(payload="x" * 20_000),
    "anything": {"type": "ping", "seq": 1},
}

TIMEOUTS = ("no `auth` within the time limit", "the token's grace period ends")

TRANSITIONS = [
    (state, row)
    for row in table(section("Sessions"), "State", "Event")
    for state in (["new", "open"] if row["State"] == "any" else [row["State"]])
]


@pytest.mark.parametrize("protocol", [ProtocolVersion.FIRST, ProtocolVersion.V1], ids=lambda protocol: protocol.name)
@pytest.mark.parametrize(("state", "row"), TRANSITIONS, ids=[f"{state}: {row['Event']}" for state, row in TRANSITIONS])
async def test_session_changes_state_as_in_the_table(
    state: str, row: Row, protocol: ProtocolVersion, autojump_clock: MockClock
) -> None:
    event = row["Event"]
    replies, codes = quoted(row["Reply"]), quoted(row["Code"])
    if protocol is ProtocolVersion.FIRST and (state, event) == ("open", "`unsubscribe`, not subscribed to the pattern"):
        replies, codes = ["unsubscribed"], []
    elif protocol is ProtocolVersion.FIRST:
        replies = ["subscribe_error" if name == "revoked" else name for name in replies]
        replies, codes = [name for name in replies if REPLIES[name].fixed is not None], []
    config = Config(limits=LimitSettings(subscriptions=1, joined_channels=1, message_size=10_000))
    async with running(config) as replica:
        if "never been reachable" in event:
            replica = Replica(config, MemoryLog(), Authenticator([SECRET]))
        peer = Peer(replica)
        session = peer.client.session
        if state == "new":
            # A new session counts as a first-version client, which gets no codes. This makes them visible.
            session.protocol = protocol
        else:
            await peer.send(auth(protocol), subscribe("project.*"))
            if "too many channels" in event:
                await peer.send({"type": "join", "channel": "project.a"})
        if state == "closed":
            peer.client.close(CloseCode.INTERNAL, "")
        before = session.state
        if event in TIMEOUTS:
            await trio.sleep_until(session.deadline)
            session.check_deadline(trio.current_time())
            received = await peer.receive()
        elif event == "the role loses permissions":
            peer.client.update_role(Identity("alice", Grants(("project.a",)), None))
            received = await peer.receive()
        elif event.startswith("the role is deleted"):
            peer.client.update_role(None)
            received = await peer.receive()
        elif event == "the token is revoked":
            await replica.revoke_client("alice")
            received = await peer.receive()
        elif event == "the replica begins to stop":
            await replica.drain()
            received = await peer.receive()
        elif event == "the replica stops":
            replica.finish()
            received = await peer.receive()
        else:
            message = EVENTS[event]
            received = await peer.send({**message, "protocol": protocol} if event.startswith("`auth`") else message)
        assert [message["type"] for message in received] == replies
        assert [message["code"] for message in received if "code" in message] == codes
        expected = before.name.lower() if row["Next"] == "same" else row["Next"]
        assert session.state.name.lower() == expected
        if state != "closed":
            assert (NOTHING if session.closing is None else str(int(session.closing[0]))) == row["Closing code"]


def test_session_table_contains_every_event_and_request() -> None:
    described = {row["Event"] for _, row in TRANSITIONS}
    assert set(EVENTS) <= described
    for state in ("new", "open"):
        requests = {name for place, row in TRANSITIONS if place == state for name in quoted(row["Event"])[:1]}
        assert set(REQUESTS) <= requests


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the fields that differ in every run."""
    message = {name: value for name, value in message.items() if name not in ("at", "producer")}
    if "messages" in message:
        message["messages"] = [comparable(each) for each in message["messages"]]
    return message


async def test_other_first_version_messages_are_answered_as_in_the_table() -> None:
    rows = table(section("Compatibility"), "Message", "In the first version")
    assert [quoted(row["Message"]) for row in rows] == [["yjs_update"], ["yjs_awareness"], ["yjs_sync_request"]]
    [(_, text)] = blocks("first-version", within=section("Compatibility"))
    [example] = objects(text)
    async with running(Config()) as replica:
        for before in ([], [auth(0)]):
            peer = Peer(replica)
            await peer.send(*before)
            for row in rows:
                [kind] = quoted(row["Message"])
                answer, pong = (await peer.send({"type": kind, "channel": "project.a"}, {"type": "ping", "seq": 1}))[:2]
                assert [answer["type"]] == quoted(row["Reply"])
                assert pong == {"type": "pong", "seq": 1}
                if kind in example["message"]:
                    assert answer == example


async def test_example_session_runs_as_written() -> None:
    example = section("An example")
    [epoch] = set(re.findall(r'"epoch": ?"(\w+)"', example))
    answered = 0
    async with running(Config()) as replica:
        peer = Peer(replica)
        received: list[dict[str, Any]] = []
        for kind, text in blocks("client", "server", within=example):
            text = text.replace(epoch.encode(), replica.log.epoch.encode())
            if kind == "client":
                assert received == []
                received = await peer.send(text.replace(b'"..."', json.dumps(auth()["token"]).encode()))
                continue
            expected = objects(text)
            assert list(map(comparable, received)) == list(map(comparable, expected))
            assert [message.keys() for message in received] == [message.keys() for message in expected]
            answered += 1
            received = []
    assert answered == 4
