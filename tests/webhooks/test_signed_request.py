"""The requests of deliveries: signatures that a library of others verifies, and bodies."""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from catbus.webhooks.signed_request import DeliveredMessage, SignedRequest, encode_messages, encode_test, sign

MADE = datetime(2026, 12, 1, 0, 4, 2, 793640, UTC)
SECRETS = ["whsec_" + base64.b64encode(bytes([n]) * size).decode() for n, size in ((1, 24), (2, 32), (3, 64))]


def request(body: bytes, *secrets: str) -> SignedRequest:
    return SignedRequest("msg_1", "https://example.com", body, secrets)


@pytest.mark.parametrize("secret", SECRETS, ids=["24", "32", "64"])
def test_library_verifies_the_signature(secret: str) -> None:
    body = encode_test("c", MADE)
    found = standardwebhooks.Webhook(secret).verify(body, request(body, secret).headers(time.time()))
    assert found == {"type": "catbus.test", "timestamp": "2026-12-01T00:04:02.793640Z", "data": {"consumer": "c"}}


def test_both_secrets_of_a_rotation_verify_and_no_other() -> None:
    body = encode_test("c", MADE)
    headers = request(body, SECRETS[0], SECRETS[1]).headers(time.time())
    for secret in SECRETS[:2]:
        standardwebhooks.Webhook(secret).verify(body, headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRETS[2]).verify(body, headers)


def test_signature_is_that_of_the_specification() -> None:
    """The example of the reference libraries."""
    found = sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@given(st.lists(st.tuples(st.integers(1, 2**53), st.text(), st.none() | st.text())), st.text(max_size=9))
def test_body_has_the_messages_as_they_were_published(found: list[tuple[int, str, str | None]], name: str) -> None:
    messages = [
        DeliveredMessage(seq, f"a.{text}", json.dumps({"text": text}), 5, sender) for seq, text, sender in found
    ]
    event = json.loads(encode_messages(name, 3, MADE, messages))
    assert event["type"] == "catbus.messages"
    assert (event["data"]["consumer"], event["data"]["partition"]) == (name, 3)
    assert event["data"]["messages"] == [
        {"seq": seq, "channel": f"a.{text}", "payload": {"text": text}, "at": 5}
        | ({} if sender is None else {"sender": sender})
        for seq, text, sender in found
    ]


def test_secret_is_not_in_the_text_of_a_request() -> None:
    assert SECRETS[0] not in repr(request(b"", SECRETS[0]))
