"""POST /publish: catbus.endpoints.http.publish_request"""

from __future__ import annotations

import json
from typing import Any

import pytest

from catbus.config import Config, LimitSettings
from catbus.endpoints.http.error_responses import ERROR_STATUSES
from catbus.endpoints.http.http_request import HttpRequest
from catbus.endpoints.http.http_response import HttpResponse
from catbus.endpoints.http.publish_request import publish
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError, Unavailable
from catbus.log import KEY_REUSED, Committed, Rejected
from tests.endpoints.fake_replica import FakeReplica

GOOD = (b"authorization", b"Bearer good")


async def post(replica: FakeReplica, body: bytes, *headers: tuple[bytes, bytes]) -> tuple[int, Any, HttpResponse]:
    async def read() -> bytes:
        return body

    answer = await publish(replica, HttpRequest("POST", "/publish", headers or (GOOD,), read=read))
    assert answer.body.endswith(b"\n")
    assert answer.type == b"application/json"
    return answer.status, json.loads(answer.body), answer


async def test_single_message_is_published() -> None:
    replica = FakeReplica()
    status, result, _ = await post(replica, b' \n{"channel": "a.b", "payload": {"n": 1}} \n')
    assert (status, result) == (200, {"seq": 1, "channel": "a.b"})
    assert bytes(replica.published[0].payload) == b'{"n": 1}'


async def test_several_messages_are_answered_in_order() -> None:
    replica = FakeReplica()
    status, result, _ = await post(
        replica, b'[{"channel":"a","payload":1},{"type":"publish","channel":"b","payload":2}]'
    )
    assert (status, result) == (200, [{"seq": 1, "channel": "a"}, {"seq": 2, "channel": "b"}])
    assert await post(replica, b"[]") == (200, [], HttpResponse(200, b"[]\n", (), b"application/json"))


async def test_duplicate_is_marked_and_ephemeral_message_has_no_seq() -> None:
    replica = FakeReplica()
    replica.on_publish = lambda request: None if request.ephemeral else Committed(7, duplicate=True)
    _, result, _ = await post(replica, b'[{"channel":"a","payload":1,"ephemeral":true},{"channel":"b","payload":1}]')
    assert result == [{"channel": "a"}, {"seq": 7, "channel": "b", "duplicate": True}]


async def test_rejected_message_has_an_error_and_the_others_are_published() -> None:
    replica = FakeReplica()
    replica.on_publish = lambda request: (
        Rejected(ErrorCode.UNAUTHORIZED, "no") if request.channel == "x" else Committed(1)
    )
    items = b'[{"channel":"a","payload":1},{"channel":"x","payload":1},{"channel":1},{"channel":"b","payload":1}]'
    status, result, _ = await post(replica, items)
    assert status == 403
    assert result[0] == {"seq": 1, "channel": "a"}
    assert result[1] == {"error": "no", "code": "unauthorized"}
    assert result[2]["code"] == "bad_message"
    assert result[3] == {"seq": 1, "channel": "b"}
    assert [request.channel for request in replica.published] == ["a", "x", "b"]


async def test_key_of_another_message_is_a_conflict() -> None:
    replica = FakeReplica()
    replica.on_publish = lambda request: KEY_REUSED
    status, result, _ = await post(replica, b'{"channel":"a","payload":1}')
    assert (status, result) == (409, {"error": "this id was used for another message", "code": "bad_message"})


@pytest.mark.parametrize("code", ErrorCode)
async def test_every_error_code_has_a_status(code: ErrorCode) -> None:
    replica = FakeReplica()
    replica.on_publish = lambda request: Rejected(code, "because")
    status, result, answer = await post(replica, b'{"channel":"a","payload":1}')
    assert status == ERROR_STATUSES.get(code, 400)
    assert result == {"error": "because", "code": code}
    names = [name for name, _ in answer.headers]
    assert names == {401: [b"www-authenticate"], 429: [b"retry-after"], 503: [b"retry-after"]}.get(status, [])


@pytest.mark.parametrize("value", [b"", b"good", b"Bearer", b"Bearer  ", b"Basic good", b"Bearer bad", b"Bearer \xff"])
async def test_invalid_token_publishes_nothing(value: bytes) -> None:
    replica = FakeReplica()
    status, result, answer = await post(replica, b'{"channel":"a","payload":1}', (b"authorization", value))
    assert (status, result["code"]) == (401, "unauthenticated")
    assert answer.headers == [(b"www-authenticate", b'Bearer realm="catbus"')]
    assert replica.published == []


@pytest.mark.parametrize("value", [b"Bearer good", b"bearer good", b"BEARER   good "])
async def test_authorization_scheme_is_case_insensitive(value: bytes) -> None:
    assert (await post(FakeReplica(), b'{"channel":"a","payload":1}', (b"authorization", value)))[0] == 200


async def test_token_lookup_failure_is_reported_as_unavailable() -> None:
    for error in [PeerError(ErrorCode.UNAVAILABLE, "later"), Unavailable("later")]:
        replica = FakeReplica()

        async def fail(token: str, network: str = "", error: Exception = error) -> Any:
            raise error

        replica.authenticate = fail  # type: ignore[method-assign]
        assert (await post(replica, b'{"channel":"a","payload":1}'))[:2] == (
            503,
            {"error": "later", "code": "unavailable"},
        )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'"x"',
        b"{",
        b"[",
        b"[1]x",
        b"[" * 1_000_000,
        b'{"channel":' * 90_000,
        b'{"channel":"a"}',
        b'{"channel":"a","payload":"\xff"}',
        b'{"channel":"a\xff","payload":1}',
        b'{"channel":"a","payload":' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"type":"subscribe","channel":"a","payload":1}',
        b'{"channel":"a","payload":1}{"channel":"a","payload":2}',
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_invalid_publish_is_rejected(body: bytes) -> None:
    replica = FakeReplica(Config(limits=LimitSettings(message_size=2_000_000)))
    status, result, _ = await post(replica, body)
    assert (status, result["code"]) == (400, "bad_message")
    assert replica.published == []


async def test_publish_request_is_limited() -> None:
    replica = FakeReplica(Config(limits=LimitSettings(message_size=30, pending_publishes=3)))
    assert (await post(replica, b'{"channel":"a","payload":1234}'))[0] == 200
    assert (await post(replica, b'{"channel":"a","payload":12345}'))[:2] == (
        413,
        {"error": "a message may have at most 30 bytes", "code": "too_large"},
    )
    assert (await post(replica, b'[{"channel":"a","payload":12345},{"channel":"a","payload":1}]'))[0] == 413
    assert (await post(replica, b"[" + b",".join([b'{"channel":"a","payload":1}'] * 4) + b"]"))[0] == 413
    assert len(replica.published) == 2


async def test_requests_with_the_same_token_count_for_one_client() -> None:
    replica = FakeReplica()
    for text in ("good", "sub-abc.c2ln", "sub-abc.c2lm", "sub-abd.c2ln"):
        await post(replica, b'{"channel":"a","payload":1}', (b"authorization", f"Bearer {text}".encode()))
    assert [replica.clients_of_requests.index(each) for each in replica.clients_of_requests] == [0, 1, 1, 3]
