"""Rejected tokens: what the log reports to the operator, and what the client receives."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

import catbus
from catbus.auth.grants import Grants, Identity
from catbus.auth.role_tokens import make_role_token, role_handle, role_key
from catbus.auth.token_errors import RejectionReason
from catbus.auth.tokens import Authenticator, sign
from catbus.client import Backoff
from catbus.close_codes import CloseCode
from catbus.config import AuthSettings, Config
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.log import MemoryLog
from catbus.observability.metrics import export_metrics
from catbus.replica import Replica
from tests.brokers import CONFIG, SECRET, running
from tests.endpoints.raw_peer import Peer
from tests.test_live_permissions import Roles
from tests.test_tokens import signed_jwt
from tests.test_wrong_input import speaker

OTHER = "another secret of the tests"


def lines(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.message == "a token was rejected"]


def make_replica(roles: Roles | None = None) -> Replica:
    return Replica(Config(), MemoryLog(), Authenticator([SECRET], leeway=30), roles=roles)


async def refuse(replica: Replica, token: str) -> PeerError:
    with pytest.raises(PeerError) as caught:
        await replica.authenticate(token)
    return caught.value


async def test_rejection_is_logged_in_detail_and_the_client_receives_less(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tokens = {
        RejectionReason.CLAIMS: signed_jwt({"alg": "HS256"}, {"sub": "eve", "catbus": {"read": "a.*"}}, SECRET),
        RejectionReason.ALGORITHM: signed_jwt({"alg": "HS512"}, {"sub": "eve", "catbus": {}}, SECRET),
        RejectionReason.SIGNATURE: sign(OTHER, client_id="eve", grants=Grants.ALL),
    }
    async with running() as (broker, address):
        for token in tokens.values():
            async with speaker(address) as peer:
                await peer.say({"type": "auth", "token": token, "protocol": 1})
                answer = {"type": "auth_error", "message": "the token is not valid", "code": "unauthenticated"}
                assert await peer.reply() == answer
                assert await peer.close_code() == CloseCode.UNAUTHENTICATED
        told = {record.reason: (record.detail, getattr(record, "client_id", None)) for record in lines(caplog)}
        assert told == {
            "claims": ("Expected `array`, got `str` - at `$.catbus.read`", "eve"),
            "algorithm": ("the algorithm 'HS512' is not supported", None),
            "signature": ("signed with none of the configured secrets (1)", None),
        }
        everything = " ".join(str(vars(record)) for record in caplog.records)
        for secret in (SECRET, OTHER, *(token.rpartition(".")[2] for token in tokens.values())):
            assert secret not in everything
        body, _ = export_metrics(broker.replica)
        for reason in RejectionReason:
            counted = b'catbus_tokens_rejected_total{reason="%b"} %d.0' % (reason.encode(), reason in tokens)
            assert counted in body


async def test_rejected_tokens_do_not_flood_the_log(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO)
    replica = make_replica()
    for number in range(1000):
        await refuse(replica, signed_jwt({"alg": "HS256", "kid": f"kid{number}"}, {"sub": number}, OTHER))
        await refuse(replica, f"not a token {number}")
    assert [record.reason for record in lines(caplog)] == ["signature", "malformed"]
    assert replica.runtime_statistics.rejected_tokens == {
        RejectionReason.SIGNATURE: 1000,
        RejectionReason.MALFORMED: 1000,
    }
    await trio.sleep(61)
    await refuse(replica, "not a token")
    assert lines(caplog)[-1].repeated == 999
    assert len(lines(caplog)) == 3


async def test_missing_role_is_logged_by_its_handle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    roles, token = Roles(), make_role_token()
    roles.answer = None
    roles.let.set()
    error = await refuse(make_replica(roles), token)
    assert (error.code, error.message) == (ErrorCode.UNAUTHENTICATED, "no role has this token")
    [line] = lines(caplog)
    key = role_key(token)
    assert key is not None
    assert (line.reason, line.detail) == ("role", f"no role {role_handle(key)}: it was deleted, or never was")
    assert token not in str(vars(line))


@pytest.mark.parametrize("claims", [{"nbf": 20.0}, {"exp": -20.0}], ids=str)
async def test_leeway_accepts_tokens_of_a_clock_ahead(claims: dict[str, float]) -> None:
    now = time.time()
    granted = {"sub": "a", "catbus": {"read": ["a"], "write": ["a"]}}
    times = {name: now + value for name, value in claims.items()}
    token = signed_jwt({"alg": "HS256"}, granted | times, SECRET)
    async with running() as (_, address), catbus.connect(f"ws://{address}/ws", token=token) as bus:
        assert await bus.publish("a", 1) == 1


async def test_session_lasts_until_the_leeway_of_its_token_ends() -> None:
    limits = msgspec.structs.replace(CONFIG.limits, token_grace=0)
    config = msgspec.structs.replace(CONFIG, limits=limits, auth=AuthSettings(secrets=(SECRET,), leeway=3600))
    token = sign(SECRET, client_id="a", grants=Grants.ALL, expires=time.time() - 10)
    async with running(config) as (_, address), speaker(address) as peer:
        await peer.say({"type": "auth", "token": token, "protocol": 1})
        await peer.say({"type": "ping", "seq": 1})
        assert [(await peer.reply())["type"] for _ in range(2)] == ["auth_ok", "pong"]


async def test_http_reply_to_a_token_not_valid_yet_has_retry_after() -> None:
    token = sign(SECRET, client_id="a", grants=Grants.ALL, not_before=time.time() + 1000)
    async with running() as (_, address):
        host, _, port = address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            peer = Peer(stream)
            head = (
                f"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 2\r\n\r\n{{}}"
            )
            await peer.send(head.encode())
            response = await peer.response()
    assert response.status == 503, response.body
    assert json.loads(response.body)["code"] == "token_not_valid_yet"
    assert 900 <= int(response.headers["retry-after"]) <= 973


async def test_client_reconnects_with_a_token_that_was_not_valid_yet() -> None:
    token = sign(SECRET, client_id="a", grants=Grants.ALL, not_before=time.time() + 2)
    config = msgspec.structs.replace(CONFIG, auth=AuthSettings(secrets=(SECRET,), leeway=0))
    reconnect = Backoff(first=0.1, jitter=0)
    async with running(config) as (broker, address):
        async with catbus.connect(f"ws://{address}/ws", token=token, persist=True, reconnect=reconnect) as bus:
            assert await bus.publish("a", 1) == 1
        # It was told when to come, and came no earlier.
        assert 1 <= broker.replica.runtime_statistics.rejected_tokens[RejectionReason.NOT_VALID_YET] <= 2


async def test_open_session_survives_a_newer_token_that_is_not_valid_yet() -> None:
    token, newer = (
        sign(SECRET, client_id="a", grants=Grants.ALL, not_before=time.time() + wait) for wait in (-1000, 1000)
    )
    async with running() as (_, address), speaker(address) as peer:
        await peer.say({"type": "auth", "token": token, "protocol": 1})
        await peer.say({"type": "auth", "token": newer})
        assert (await peer.reply())["type"] == "auth_ok"
        error = await peer.reply()
        assert 900 <= error.pop("retry_after") <= 971
        assert error == {"type": "auth_error", "message": "the token is not valid yet", "code": "token_not_valid_yet"}
        await peer.say({"type": "publish", "channel": "a", "payload": 1})
        assert (await peer.reply())["type"] == "published"


async def test_first_version_client_receives_no_new_fields_in_auth_error() -> None:
    token = sign(SECRET, client_id="a", grants=Grants.ALL, not_before=time.time() + 1000)
    async with running() as (_, address), speaker(address) as peer:
        await peer.say({"type": "auth", "token": token})
        assert await peer.reply() == {"type": "auth_error", "message": "the token is not valid yet"}
        assert await peer.close_code() == CloseCode.TOKEN_NOT_VALID_YET


def test_leeway_does_not_change_the_expiry_of_an_identity() -> None:
    token = sign(SECRET, client_id="a", grants=Grants.ALL, expires=1000)
    assert Authenticator([SECRET], leeway=30).verify(token, 1020) == Identity("a", Grants.ALL, 1000)
