"""The time at which the client requests the next token."""

from __future__ import annotations

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client.token_renewal import find_expiry, renewal_delay

SECRET = "a secret that is long enough for a JWT"


def test_token_with_an_expiry() -> None:
    assert find_expiry(sign(SECRET, client_id="alice", grants=Grants.ALL, expires=2_000_000_000)) == 2_000_000_000
    claims = {"sub": "alice", "exp": 2_000_000_000, "catbus": {}}
    assert find_expiry(jwt.encode(claims, SECRET, "HS256")) == 2_000_000_000


@pytest.mark.parametrize(
    "token",
    [
        sign(SECRET, client_id="alice", grants=Grants.ALL),
        jwt.encode({"sub": "alice"}, SECRET, "HS256"),
        "role-AAECAwQFBgcICQoLDA0ODw",
        "an-admin-key",
        "a.b.c",
        "sub-.",
        "sub-bnVsbA.x",
        "sub-eyJleHAiOiJzb29uIn0.x",
    ],
)
def test_token_without_an_expiry(token: str) -> None:
    assert find_expiry(token) is None
    assert renewal_delay(token, 0) is None


@given(st.text())
def test_any_text_is_accepted_as_a_token(token: str) -> None:
    find_expiry(token)
    find_expiry("sub-" + token)


@pytest.mark.parametrize(
    ("left", "pause"), [(3600, 3570), (61, 31), (60, 30), (10, 5), (1, 1), (0, 1), (-60, 1), (-100, 30)]
)
def test_next_token_is_requested_before_the_expiry(left: float, pause: float) -> None:
    token = sign(SECRET, client_id="alice", grants=Grants.ALL, expires=2_000_000_000)
    assert renewal_delay(token, 2_000_000_000 - left) == pause


LASTS = 300.0


@pytest.mark.parametrize("offset", [-86_400, -600, -31, 0, 200, 301, 600, 86_400])
def test_wrong_clock_causes_no_early_or_late_renewal(offset: float) -> None:
    """A token that was just made, on a device whose clock differs by so much."""
    made = 2_000_000_000
    token = sign(SECRET, client_id="alice", grants=Grants.ALL, expires=made + LASTS, issued_at=made)
    pause = renewal_delay(token, made + offset)
    assert pause is not None
    assert 10 < pause <= LASTS - 30
    if not 0 <= offset < LASTS:
        assert pause == LASTS - 30
