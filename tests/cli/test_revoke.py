"""`catbus revoke --client-id`, on a running database."""

from __future__ import annotations

import json
import time

import pytest

from catbus.auth.base64url import decode_base64url
from catbus.auth.claims import SubTokenClaims, decode_claims

from .conftest import Command

CLIENT = ("revoke", "--client-id", "alice")


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database of the environment."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    return database_url


def test_command_revokes_what_was_issued_until_now(catbus: Command, database: str) -> None:
    status, output, errors = catbus(*CLIENT)
    assert status == 0
    shown = json.loads(output)
    assert shown == {"client_id": "alice", "issued_before": pytest.approx(time.time(), abs=600)}
    assert errors.startswith("tokens of alice that were issued before 20")
    status, output, _ = catbus(*CLIENT, "--issued-before", "1000.5", "--max-lifetime", "7d")
    assert (status, json.loads(output)) == (0, shown), "the later time stays"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1000.5", 1000.5),
        ("1970-01-01T00:20:00Z", 1200),
        ("1970-01-01T02:00:00.25+01:00", 3600.25),
        ("1970-01-01 00:20Z", 1200),
    ],
)
def test_command_takes_a_time(catbus: Command, database: str, text: str, seconds: float) -> None:
    status, output, _ = catbus(*CLIENT, "--issued-before", text)
    assert (status, json.loads(output)) == (0, {"client_id": "alice", "issued_before": seconds})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "PATTERN is missing"),
        (("a.*",), "--permission is missing"),
        (("a.*", "-p", "read"), "--from is missing"),
        (("--issued-before", "1"), "--issued-before has no effect without --client-id"),
        (("--max-lifetime", "1d"), "--max-lifetime has no effect without --client-id"),
        (("--client-id", "a", "b.*"), "PATTERN has no effect with --client-id"),
        (("--client-id", "a", "-p", "read"), "--permission has no effect with --client-id"),
        (("--client-id", "a", "--from", "0123456789ab"), "--from has no effect with --client-id"),
        (("--client-id", ""), "a client_id has 1 to 2000 bytes"),
        (("--client-id", "a", "--issued-before", "yesterday"), "--issued-before: expected seconds since 1970"),
        (("--client-id", "a", "--issued-before", "2026-01-31T12:00:00"), "--issued-before: expected"),
        (("--client-id", "a", "--issued-before", "nan"), "a time is in seconds since 1970"),
        (("--client-id", "a", "--issued-before", "1764521234123"), "a time is in seconds since 1970"),
        (("--client-id", "a", "--max-lifetime", "0s"), "--max-lifetime: expected a duration"),
    ],
)
def test_wrong_usage_is_explained(
    catbus: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://127.0.0.1:1/nowhere")
    status, output, errors = catbus("revoke", *arguments)
    assert (status, output) == (2, "")
    assert complaint in errors


def test_revocation_needs_a_database(catbus: Command) -> None:
    status, _, errors = catbus(*CLIENT)
    assert status == 1
    assert "there is no database" in errors


def test_granted_token_says_when_it_was_issued(catbus: Command) -> None:
    before = time.time()
    _, output, _ = catbus("grant", "-p", "read", "a", "--client-id", "alice", "--secret", "s" * 32)
    data = decode_base64url(output.strip().removeprefix("sub-").partition(".")[0].encode())
    assert data is not None
    issued = decode_claims(data, SubTokenClaims, "client_id").iat
    assert issued is not None
    assert before - 1e-6 <= issued <= time.time()
    assert issued % 1, "with fractions of seconds"
