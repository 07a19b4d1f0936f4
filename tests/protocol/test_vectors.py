"""`protocol/vectors` and `protocol/schema` agree with the broker and the Python client."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgspec
import pytest
from hypothesis import given

from catbus import Config
from catbus.auth.tokens import Authenticator
from catbus.client import server_messages as decoded_messages
from catbus.client.server_messages import encode_payload
from catbus.client.token_renewal import find_expiry
from catbus.errors import PeerError
from catbus.in_process import LocalMessage
from catbus.protocol import channels
from catbus.protocol import wire_messages as wire
from catbus.protocol.event_stream_parser import EventStreamParser
from catbus.protocol.json_splitter import JsonSplitter
from catbus.protocol.server_sent_events import COMMENT, encode_message_event, encode_reply, retry_block
from catbus.protocol.server_sent_events import event as encode_event
from catbus.testing import client_messages, server_messages
from catbus.testing.event_stream import parse_block
from tests.protocol import diagram, schema
from tests.protocol.scripted_sessions import SESSIONS
from tests.server_sent_events import EventParser
from tests.test_specification import DOCUMENT, blocks, objects

DIRECTORY = Path(__file__).parents[2] / "protocol" / "vectors"
PATTERNS, TOKENS, FRAMING, PAYLOADS, EVENTS = (
    json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("patterns", "tokens", "framing", "payloads", "events")
)


# Schemas


@pytest.mark.parametrize("side", schema.SIDES)
def test_schemas_are_those_of_the_code(side: str) -> None:
    kept = json.loads((schema.DIRECTORY / f"{side}.json").read_text(encoding="utf-8"))
    assert kept == schema.make(side), "python -m tests.protocol.schema"
    jsonschema.Draft202012Validator.check_schema(kept)


VALIDATORS = {side: jsonschema.Draft202012Validator(schema.make(side)) for side in schema.SIDES}


@pytest.mark.parametrize("side", schema.SIDES)
def test_examples_of_the_specification_are_valid(side: str) -> None:
    found = [each for _, text in blocks(side) for each in objects(text)]
    assert len(found) > 8
    for each in found:
        VALIDATORS[side].validate(each)


@given(client_messages())
def test_client_messages_are_valid(message: wire.ClientMessage) -> None:
    VALIDATORS["client"].validate(json.loads(msgspec.json.encode(message)))


@given(server_messages())
def test_broker_messages_are_valid(message: wire.Reply) -> None:
    line = wire.encode(message, wire.ProtocolVersion.V1)
    assert line is not None
    VALIDATORS["server"].validate(json.loads(line))


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("client", {"type": "subscribe"}),
    ("client", {"type": "subscribe", "pattern": 1}),
    ("client", {"type": "publish", "channel": "a"}),
    ("client", {"type": "subscribe", "pattern": "a", "since": -1}),
    ("client", {"type": "shout"}),
    ("server", {"type": "live", "pattern": "a"}),
    ("server", {"type": "error", "message": "x", "code": "nonsense"}),
    ("server", {"type": "published", "channel": "a", "seq": None}),
]


@pytest.mark.parametrize(("side", "message"), WRONG)
def test_wrong_messages_are_invalid(side: str, message: dict[str, Any]) -> None:
    assert not VALIDATORS[side].is_valid(message)


# Session states


def test_diagram_is_that_of_the_table() -> None:
    assert diagram.PLACE.findall(DOCUMENT) == [diagram.make()], "python -m tests.protocol.diagram"


# Channels and patterns


def is_valid(check: Any, text: str) -> bool:
    try:
        check(text)
    except PeerError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "check"),
    [("channels", channels.check_channel), ("patterns", channels.check_pattern)],
    ids=["channel", "pattern"],
)
def test_texts_are_channels_and_patterns_as_in_the_vectors(kind: str, check: Any) -> None:
    for expected, texts in (("valid", PATTERNS[kind]["valid"]), ("invalid", PATTERNS[kind]["invalid"])):
        for text in texts:
            assert is_valid(check, text) == (expected == "valid"), text


@pytest.mark.parametrize("relation", ["matches", "covers"])
def test_patterns_match_and_cover_as_in_the_vectors(relation: str) -> None:
    for one, other, expected in PATTERNS[relation]:
        assert getattr(channels, relation)(one, other) == expected, (one, other)


# Tokens


def verdict(token: str) -> dict[str, Any]:
    """The claims or the error code that the broker finds in a token, in the format of the vectors."""
    try:
        found = Authenticator((TOKENS["secret"],), leeway=TOKENS["leeway"]).verify(token, TOKENS["now"])
    except PeerError as error:
        return {"valid": False, "code": error.code.value}
    read, write = list(found.grants.read), list(found.grants.write)
    return {"valid": True, "client_id": found.client_id, "read": read, "write": write, "expires": found.expires}


@pytest.mark.parametrize("case", TOKENS["cases"], ids=lambda case: case["name"])
def test_token_has_the_claims_of_the_vectors(case: dict[str, Any]) -> None:
    expected = {name: value for name, value in case.items() if name not in ("name", "token")}
    assert verdict(case["token"]) == expected


def test_leeway_of_the_vectors_is_the_default() -> None:
    assert Config().auth.leeway == TOKENS["leeway"]


def test_client_finds_the_expiry_of_its_token() -> None:
    valid = [case for case in TOKENS["cases"] if case["valid"]]
    assert len(valid) > 5
    for case in valid:
        assert find_expiry(case["token"]) == case["expires"], case["name"]


def test_specification_states_the_number_of_cases() -> None:
    listed = re.findall(r"^\| `(\w+)\.json` \| (\d+) \|", DOCUMENT, re.MULTILINE)
    patterns = sum(len(texts) for kind in ("channels", "patterns") for texts in PATTERNS[kind].values())
    assert {name: int(number) for name, number in listed} == {
        "patterns": patterns + len(PATTERNS["matches"]) + len(PATTERNS["covers"]),
        "tokens": len(TOKENS["cases"]),
        "framing": len(FRAMING["cases"]),
        "payloads": len(PAYLOADS["cases"]),
        "events": len(EVENTS["replies"]) + len(EVENTS["streams"]),
        "sessions": len(SESSIONS),
    }


# Framing

decode = msgspec.json.Decoder(dict[str, Any]).decode


@pytest.mark.parametrize("case", FRAMING["cases"], ids=lambda case: case["name"])
def test_framing_finds_the_objects_wherever_the_stream_is_cut(case: dict[str, Any]) -> None:
    data = case["text"].encode()
    for cut in range(len(data) + 1):
        for other in (cut, min(cut + 1, len(data)), len(data)):
            framer = JsonSplitter(decode, limit=1 << 16)
            found: list[Any] = []
            error = None
            try:
                for piece in (data[:cut], data[cut:other], data[other:]):
                    found += framer.feed(piece)
            except PeerError as raised:
                error = raised.code.value
            assert (found, error) == (case["objects"], case.get("error")), cut


# Server-sent events


def block(reply: dict[str, Any], epoch: str) -> str | None:
    """Encode a reply for an event stream, as the broker does."""
    if reply["type"] == "message":
        payload = json.dumps(reply["payload"], ensure_ascii=False, separators=(",", ":")).encode()
        seq, sender, retain = reply.get("seq", 0), reply.get("sender"), reply.get("retain", False)
        made = encode_message_event(reply["channel"], payload, seq, reply["at"], sender, epoch.encode(), retain)
        return made.decode()
    text = json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()
    found = encode_reply(wire.decode_server(text), wire.ProtocolVersion.EVENTS, epoch)
    return None if found is None else found.decode()


@pytest.mark.parametrize("case", EVENTS["replies"], ids=lambda case: case["name"])
def test_block_of_a_reply_is_that_of_the_vectors(case: dict[str, Any]) -> None:
    assert block(case["reply"], case["epoch"]) == case["block"]


@pytest.mark.parametrize("case", EVENTS["replies"], ids=lambda case: case["name"])
def test_parser_finds_the_event_of_a_reply(case: dict[str, Any]) -> None:
    parser = EventParser(last_id=case["before"])
    found = [{"type": each.type, "data": each.data} for each in parser.feed((case["block"] or "").encode())]
    assert found == ([] if case["event"] is None else [case["event"]])
    assert parser.last_id == case["id"]


@pytest.mark.parametrize("case", EVENTS["streams"], ids=lambda case: case["name"])
def test_parser_finds_the_events_wherever_the_stream_is_cut(case: dict[str, Any]) -> None:
    data = case["blocks"].encode()
    for cut in range(len(data) + 1):
        parser = EventParser()
        found = [each for piece in (data[:cut], data[cut:]) for each in parser.feed(piece)]
        assert [{"type": each.type, "data": each.data, "id": each.last_id} for each in found] == case["events"], cut
        assert (parser.last_id, parser.retry) == (case["id"], case["retry"]), cut


@pytest.mark.parametrize("case", EVENTS["streams"], ids=lambda case: case["name"])
def test_http_client_finds_the_events_wherever_the_stream_is_cut(case: dict[str, Any]) -> None:
    data = case["blocks"].encode()
    for cut in range(len(data) + 1):
        parser = EventStreamParser()
        found = [each for piece in (data[:cut], data[cut:]) for each in parser.feed(piece)]
        assert [{"type": each.name, "data": json.loads(each.data), "id": each.id} for each in found] == case["events"]
        assert (parser.last_id, parser.retry) == (case["id"], case["retry"]), cut


@pytest.mark.parametrize("case", EVENTS["replies"], ids=lambda case: case["name"])
def test_other_parsers_find_the_event_of_a_reply(case: dict[str, Any]) -> None:
    if case["block"] is None:
        return
    data, event = case["block"].encode(), case["event"]
    parser = EventStreamParser()
    parser.last_id = case["before"]
    found = [{"type": each.name, "data": json.loads(each.data)} for each in parser.feed(data)]
    assert found == ([] if event is None else [event])
    block = parse_block(data.removesuffix(b"\n\n"))
    assert (block.event, block.data) == (("", None) if event is None else (event["type"], event["data"]))
    assert (block.id or case["before"]) == case["id"]


def test_vectors_have_every_reply_and_the_blocks_that_are_no_reply() -> None:
    tags = {kind.__struct_config__.tag for kind in get_args(wire.ServerMessage)}
    assert {case["reply"]["type"] for case in EVENTS["replies"]} == tags
    blocks = "".join(case["blocks"] for case in EVENTS["streams"])
    for made in (retry_block(1.5), COMMENT, encode_event("close", {"code": 4504, "reason": "the replica is stopping"})):
        assert made.decode() in blocks


# Payloads


def accepts(decode: Callable[[bytes], object], text: str) -> bool:
    """Whether this way to publish accepts the payload."""
    try:
        decode(text.encode())
    except (*wire.UNDECODABLE, PeerError, TypeError):
        return False
    return True


def publish(start: bytes, decode: Callable[[bytes], wire.ClientMessage]) -> Callable[[bytes], object]:
    return lambda payload: decode(start + b'"channel":"a","payload":' + payload + b"}")


WAYS_TO_PUBLISH: dict[str, Callable[[bytes], object]] = {
    "a session": publish(b'{"type":"publish",', wire.decode_client),
    "a session, the payload twice": publish(b'{"type":"publish","payload":1,', wire.decode_client),
    "HTTP": publish(b"{", wire.decode_publish),
    "the client": lambda payload: encode_payload(msgspec.Raw(payload)),
    "another way": wire.check_payload,
}


@pytest.mark.parametrize("way", WAYS_TO_PUBLISH)
def test_payloads_are_accepted_as_in_the_vectors(way: str) -> None:
    for case in PAYLOADS["cases"]:
        assert accepts(WAYS_TO_PUBLISH[way], case["json"]) == case["valid"], case["name"]


@pytest.mark.parametrize("case", [case for case in PAYLOADS["cases"] if case["valid"]], ids=lambda case: case["name"])
def test_receivers_accept_every_payload(case: dict[str, Any]) -> None:
    text: bytes = case["json"].encode()
    line = b'{"type":"message","channel":"a","payload":' + text + b',"pattern":"a"}'
    message = decoded_messages.decode(line)
    assert isinstance(message, decoded_messages.Message)
    assert message.data == text
    local = LocalMessage("a", text, 1, 0, None, "a")
    for found in (message.payload, local.payload):
        if "double" in case:
            assert nearest(found) == float(case["double"])
        else:
            assert found == json.loads(text, parse_int=lambda digits: wire.decode_payload(digits.encode()))


def nearest(number: object) -> float:
    assert isinstance(number, int | float)
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def test_integer_is_exact_up_to_the_limit_of_python() -> None:
    assert wire.decode_payload(b"9" * 4300) == 10**4300 - 1
    assert wire.decode_payload(b"9" * 4301) == math.inf


def test_token_vectors_do_not_depend_on_the_present_time() -> None:
    """The vectors hold at the time that they name, whatever the time of the test run is."""
    assert TOKENS["now"] != pytest.approx(time.time(), abs=86_400)
