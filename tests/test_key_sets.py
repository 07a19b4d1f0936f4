"""Key sets that are fetched by URL: rotation of keys, issuers that are unreachable, and responses that are wrong."""

from __future__ import annotations

import gzip
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth import key_sets
from catbus.auth.key_sets import REFRESH_INTERVAL, RETRY_INTERVAL, KeySetFetcher, fetch_key_set
from catbus.auth.token_errors import RejectionReason
from catbus.auth.tokens import Authenticator
from catbus.close_codes import CloseCode
from catbus.config import AuthSettings, Config
from catbus.errors import Unavailable
from catbus.log import MemoryLog
from catbus.observability.metrics import export_metrics
from catbus.replica import Replica
from tests.brokers import CONFIG, SECRET, TOKEN, running
from tests.issuer import GRANTED, Issuer, open_issuer
from tests.test_replica import objects, open_client, reply_types
from tests.test_roles import authenticate, post
from tests.test_tokens import signed_jwt
from tests.test_wrong_input import speaker


@pytest.fixture
async def issuer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Issuer]:
    """An issuer whose certificate is trusted, as one of the system's authorities would be."""
    async with open_issuer() as issuer:
        authority = tmp_path / "authority.pem"
        issuer.authority.cert_pem.write_to_path(str(authority))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        yield issuer


def config_for(*sources: str) -> Config:
    return msgspec.structs.replace(CONFIG, auth=AuthSettings(secrets=(SECRET,), jwt=sources))


async def fetch(issuer: Issuer) -> list[Any]:
    return await fetch_key_set(issuer.url, ssl.create_default_context())


# Rotation


async def test_nobody_is_rejected_while_the_issuer_rotates_its_keys(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sets, "RETRY_INTERVAL", 0.2)
    replies: list[str] = []

    async def enter(address: str, token: str) -> None:
        async with speaker(address) as peer:
            replies.append((await authenticate(peer, token))["type"])

    async with running(config_for(issuer.url)) as (broker, address):
        for _ in range(5):
            issuer.rotate()
            tokens = [issuer.token(key) for key in issuer.keys for _ in range(10)]
            async with trio.open_nursery() as nursery:
                for token in tokens:
                    nursery.start_soon(enter, address, token)
                status, _ = await post(address, issuer.token(), b'{"channel":"a","payload":1}')
                assert status == 200
        assert replies == ["auth_ok"] * 100
        # At the start, once for all who come with a new key, and once more for those who come during that fetch.
        assert broker.replica.key_sets is not None
        statistics = broker.replica.key_sets.statistics()
        assert 6 <= statistics.fetches <= 11
        assert statistics.failures == 0


class Clients:
    """Clients of a replica on a virtual clock, which fetches its keys from the issuer."""

    def __init__(self, issuer: Issuer, clock: MockClock, nursery: trio.Nursery) -> None:
        authenticator = Authenticator([SECRET])
        self.fetcher = KeySetFetcher([issuer.url], authenticator.replace_fetched_keys)
        self.replica = Replica(Config(), MemoryLog(), authenticator, key_sets=self.fetcher)
        self._clock = clock
        self._nursery = nursery

    async def start(self) -> None:
        await self._nursery.start(self.fetcher.run)
        await self._nursery.start(self.replica.log.run, self.replica.delivery)

    @property
    def fetches(self) -> int:
        return self.fetcher.statistics().fetches

    async def enter(self, token: str, reply: list[Any]) -> None:
        """Authenticate a new session, whose reply and close code are these."""
        client = open_client(self.replica)
        await client.receive(objects({"type": "auth", "token": token, "protocol": 1}))
        assert reply_types(client) + [code for code, _ in [client.closing or (None, "")] if code] == reply

    def enter_later(self, token: str, reply: list[Any]) -> None:
        """The same, in a task of its own."""
        self._nursery.start_soon(self.enter, token, reply)

    async def pass_time(self, seconds: float, *, fetches: int) -> None:
        """Advance the clock. So many fetches happen then."""
        following, before = self.fetcher._next, self.fetches
        self._clock.jump(seconds)
        for _ in range(1000):
            # The network takes real time, and a fetch that does not come has to fail the test.
            await wait_all_tasks_blocked(0.001 if fetches else 0.01)
            if not fetches or following.done.is_set():
                break
        assert self.fetches == before + fetches


@pytest.fixture
async def clients(issuer: Issuer, nursery: trio.Nursery) -> Clients:
    """The test has to ask for `mock_clock` itself, or it runs on another clock."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    clients = Clients(issuer, clock, nursery)
    await clients.start()
    return clients


ACCEPTED = ["auth_ok"]
FINAL = ["auth_error", CloseCode.UNAUTHENTICATED]
TEMPORARY = ["auth_error", CloseCode.UNAVAILABLE]


def stranger() -> str:
    """A token of nobody whose key could be fetched."""
    return signed_jwt({"alg": "ES256", "kid": "no such key"}, {"sub": "eve", "catbus": GRANTED})


async def test_key_sets_are_fetched_at_the_start_and_every_hour(
    clients: Clients, issuer: Issuer, mock_clock: MockClock
) -> None:
    assert clients.fetches == 1
    await clients.pass_time(REFRESH_INTERVAL - 1, fetches=0)
    issuer.rotate()
    old = issuer.keys[1]
    issuer.publish(issuer.keys[0])
    await clients.enter(issuer.token(old), ACCEPTED)
    # A key that the issuer has removed is used for an hour at most, also for a token that was accepted before.
    await clients.pass_time(1, fetches=1)
    clients.enter_later(issuer.token(old), FINAL)
    await clients.enter(issuer.token(), ACCEPTED)


async def test_nobody_accepted_before_is_rejected_while_the_issuer_is_down_for_an_hour(
    clients: Clients, issuer: Issuer, mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    known = issuer.token(exp=2e9)
    await clients.enter(known, ACCEPTED)
    issuer.stop()
    await clients.pass_time(REFRESH_INTERVAL, fetches=1)
    for _ in range(int(REFRESH_INTERVAL / RETRY_INTERVAL)):
        await clients.enter(known, ACCEPTED)
        await clients.enter(issuer.token(), ACCEPTED)
        await clients.pass_time(RETRY_INTERVAL, fetches=1)
    assert clients.fetcher.statistics().age == 2 * REFRESH_INTERVAL
    assert clients.fetcher.statistics().failures == clients.fetches - 1
    # A new key may be right, so its token is not rejected for good.
    issuer.rotate()
    await clients.enter(issuer.token(), TEMPORARY)
    # One line a minute.
    lines = [record for record in caplog.records if record.message == "the keys of an issuer cannot be fetched"]
    assert REFRESH_INTERVAL / 60 - 1 <= len(lines) <= REFRESH_INTERVAL / 60 + 2
    last = vars(lines[-1])
    assert last["url"] == issuer.url
    assert "ConnectError" in last["error"]


async def test_issuer_that_is_back_is_asked_within_seconds(
    clients: Clients, issuer: Issuer, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    port = int(issuer.url.partition("127.0.0.1:")[2].partition("/")[0])
    issuer.stop()
    await clients.pass_time(REFRESH_INTERVAL, fetches=1)
    issuer.rotate()
    await nursery.start(issuer.serve, port)
    await clients.pass_time(RETRY_INTERVAL, fetches=1)
    await clients.enter(issuer.token(), ACCEPTED)
    assert clients.fetcher.statistics().age == 0
    await clients.pass_time(REFRESH_INTERVAL - 1, fetches=0)


async def test_unknown_keys_cause_one_fetch_in_ten_seconds_and_no_wrong_rejection(
    clients: Clients, issuer: Issuer, mock_clock: MockClock
) -> None:
    for _ in range(50):
        clients.enter_later(stranger(), FINAL)
    await wait_all_tasks_blocked(0.05)
    assert clients.fetches == 2
    # Now nothing is fetched for a while: tokens with new keys, right or wrong, wait for the next fetch.
    issuer.rotate()
    for _ in range(50):
        clients.enter_later(stranger(), FINAL)
        clients.enter_later(issuer.token(), ACCEPTED)
    await clients.enter(issuer.token(issuer.keys[1]), ACCEPTED)
    await clients.pass_time(RETRY_INTERVAL - 1, fetches=0)
    await clients.pass_time(1, fetches=1)
    rejected = clients.replica.runtime_statistics.rejected_tokens
    assert rejected == {RejectionReason.KEY: 100}


async def test_token_that_arrives_during_a_fetch_waits_for_that_and_the_next(
    clients: Clients, issuer: Issuer, mock_clock: MockClock
) -> None:
    """The issuer may have answered before it had the key."""
    issuer.answering = trio.Event()
    clients.enter_later(stranger(), FINAL)
    await wait_all_tasks_blocked(0.05)
    answered, issuer.body = issuer.body, b""
    issuer.rotate()
    rotated, issuer.body = issuer.body, answered
    clients.enter_later(issuer.token(), ACCEPTED)
    await wait_all_tasks_blocked(0.01)
    issuer.answering.set()
    await wait_all_tasks_blocked(0.05)
    assert clients.fetches == 2
    issuer.body = rotated
    await clients.pass_time(RETRY_INTERVAL, fetches=1)


async def test_one_issuer_that_is_down_makes_unknown_keys_temporary(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sets, "RETRY_INTERVAL", 0.05)
    async with running(config_for(issuer.url, "https://127.0.0.1:1/keys")) as (broker, address):
        for token, code in ((issuer.token(), "auth_ok"), (stranger(), "unavailable"), (TOKEN, "auth_ok")):
            async with speaker(address) as peer:
                reply = await authenticate(peer, token)
                assert reply.get("code", reply["type"]) == code
        status, reply = await post(address, stranger(), b'{"channel":"a","payload":1}')
        assert (status, reply["code"]) == (503, "unavailable")
        statistics = broker.replica.key_sets.statistics()  # type: ignore[union-attr]
        assert 0 < statistics.failures < statistics.fetches
        body, _ = export_metrics(broker.replica)
        assert b"catbus_key_set_fetches_total %d.0\n" % statistics.fetches in body
        assert b"catbus_key_set_fetch_failures_total %d.0\n" % statistics.failures in body


async def test_broker_starts_without_its_issuer_and_keeps_sessions_that_renew_their_token(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(key_sets, "RETRY_INTERVAL", 0.05)
    port = int(issuer.url.partition("127.0.0.1:")[2].partition("/")[0])
    issuer.stop()
    async with running(config_for(issuer.url)) as (_, address):
        async with speaker(address) as peer:
            reply = await authenticate(peer, issuer.token())
            assert (reply["code"], await peer.close_code()) == ("unavailable", 4503)
        async with speaker(address) as peer:
            assert (await authenticate(peer, TOKEN))["type"] == "auth_ok"
            assert (await authenticate(peer, issuer.token()))["code"] == "unavailable"
            await nursery.start(issuer.serve, port)
            while (reply := await authenticate(peer, issuer.token())).get("code") == "unavailable":
                pass
            assert reply["type"] == "auth_ok"


# Responses


async def test_keys_of_every_usable_kind_are_fetched(issuer: Issuer) -> None:
    usable = [ECKey.generate_key("P-256", {"kid": "1"}), RSAKey.generate_key(2048, {"kid": "2"})]
    issuer.publish(*usable, ECKey.generate_key("P-384", {"kid": "3"}), OKPKey.generate_key("Ed25519", {"kid": "4"}))
    assert [key.kid for key in await fetch(issuer)] == ["1", "2"]


def answer(status: int = 200, body: Any = b"", *headers: str) -> Callable[[Issuer], None]:
    def prepare(issuer: Issuer) -> None:
        issuer.status, issuer.headers = status, list(headers)
        if body is not None:
            issuer.body = body

    return prepare


def spaces() -> Iterator[bytes]:
    return repeat(b" " * 10_000)


WRONG = {
    "an error": (answer(500, None), "status"),
    "a redirect": (answer(302, None, "Location: http://127.0.0.1:1/"), "status of the response is 302"),
    "nothing": (answer(), "not a key set"),
    "not JSON": (answer(body=b"{"), "not a key set"),
    "not UTF-8": (answer(body=b"\xff" * 100), "not a key set"),
    "brackets": (answer(body=b"[" * 200_000), "not a key set"),
    "an array": (answer(body=b"[]"), "not a key set"),
    "no array of keys": (answer(body=b'{"keys": 1}'), "not a key set"),
    "strings as keys": (answer(body=b'{"keys": ["a"]}'), "not a key set"),
    "numbers in a key": (answer(body=b'{"keys": [{"kty": "RSA", "n": 1, "e": 1}]}'), "not a key set"),
    "no keys": (answer(body=b'{"keys": []}'), "not a key set"),
    "a secret": (answer(body=json.dumps({"keys": [OctKey.generate_key(256).as_dict()]}).encode()), "not a key set"),
    "compressed": (answer(200, gzip.compress(b"{}" * 1000), "Content-Encoding: gzip"), "not a key set"),
    "without an end": (answer(200, spaces()), "more than 262144 bytes"),
    "too long": (answer(200, b" " * (256 * 1024 + 1)), "more than 262144 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_response_is_an_error(issuer: Issuer, name: str) -> None:
    prepare, text = WRONG[name]
    prepare(issuer)
    with pytest.raises(Unavailable, match=text):
        await fetch(issuer)
    assert len(issuer.requests) == 1
    # What is read of a body without an end, and what sockets buffer.
    assert issuer.sent < 16 << 20


async def test_last_keys_stay_in_use_after_a_wrong_response(
    clients: Clients, issuer: Issuer, mock_clock: MockClock
) -> None:
    issuer.body = b'{"keys": []}'
    await clients.pass_time(REFRESH_INTERVAL, fetches=1)
    await clients.enter(issuer.token(), ACCEPTED)


async def test_issuer_that_does_not_answer_delays_a_token_for_seconds_only(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sets, "FETCH_TIMEOUT", 0.05)
    issuer.answering = trio.Event()
    with pytest.raises(Unavailable, match=r"no response within 0\.05 s"):
        await fetch(issuer)
    issuer.answering.set()
    monkeypatch.setattr(key_sets, "FETCH_TIMEOUT", 0.5)
    issuer.body = stall(issuer)
    with pytest.raises(Unavailable, match="no response"):
        await fetch(issuer)


def stall(issuer: Issuer) -> Iterator[bytes]:
    yield b'{"keys": '
    issuer.answering = trio.Event()
    yield b"[]}"


async def test_certificate_of_the_issuer_is_verified(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await fetch(issuer)
    issuer.url = issuer.url.replace("127.0.0.1", "localhost")
    with pytest.raises(Unavailable, match="ConnectError"):
        await fetch(issuer)
    issuer.url = issuer.url.replace("localhost", "127.0.0.1")
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(Unavailable, match="certificate verify failed"):
        await fetch(issuer)


async def test_environment_and_earlier_responses_do_not_change_a_request(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    issuer.headers = ["Set-Cookie: a=b"]
    for _ in range(2):
        await fetch(issuer)
    one, other = (head.lower() for head in issuer.requests)
    assert one == other
    assert "cookie" not in one and "authorization" not in one
    assert "accept-encoding: identity" in one


async def test_query_of_a_url_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(config_for("https://127.0.0.1:1/keys?key=hidden")):
        pass
    [line] = [record for record in caplog.records if record.message == "the keys of an issuer cannot be fetched"]
    assert vars(line)["url"] == "https://127.0.0.1:1/keys"
    assert "hidden" not in caplog.text + str(vars(line))
