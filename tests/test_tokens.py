"""catbus.auth: grants, tokens, role tokens and producer ids."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import warnings
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from catbus.auth.grants import Grants, Identity, client_of
from catbus.auth.jwt_keys import from_jwks
from catbus.auth.role_tokens import make_role_token, role_digits, role_handle, role_key
from catbus.auth.token_errors import MAX_RETRY_AFTER, RejectionReason, TokenRejected, UnknownKey
from catbus.auth.tokens import CACHE_SIZE, MAX_TOKEN, Authenticator, sign
from catbus.close_codes import CloseCode
from catbus.error_codes import ErrorCode
from catbus.errors import ConfigError, PeerError

SECRET = "correct horse battery staple"
OTHER = "Tr0ub4dor&3"
NOW = 1_700_000_000.0
READER = Grants(read=("project.*",))

# Made with openssl, by the words of the specification.
ALICE = (
    "sub-eyJjbGllbnRfaWQiOiAiYWxpY2UiLCAiZ3JhbnRzIjogeyJncmFudHMiOiBbeyJncmFudF90eXBlIjogInJlYWQiLCAicGF0dGVybiI6"
    "ICJwcm9qZWN0LioifV19fQ.EzPQB2eKscBeglLWEM6eAw"
)
BOB = (
    "sub-eyJjbGllbnRfaWQiOiJib2IiLCJncmFudHMiOnsiZ3JhbnRzIjpbeyJncmFudF90eXBlIjoiYWxsIiwicGF0dGVybiI6IioifSx7Imdy"
    "YW50X3R5cGUiOiJjcmVhdGUiLCJwYXR0ZXJuIjoieC4qIn1dfSwiZXhwIjoyMDAwMDAwMDAwLCJuYmYiOjEwMDAwMDAwMDAsImlhdCI6MTAw"
    "MDAwMDAwMH0.BNT0Z5k_HzhSPUgS9s_BeA"
)
CAROL = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJjYXJvbCIsImV4cCI6MjAwMDAwMDAwMCwiY2F0YnVzIjp7InJlYWQiOlsib3Jk"
    "ZXJzLioiXSwid3JpdGUiOlsib3JkZXJzLjQyIl19fQ.Ly-XyS0XDGdaC93npQP6sbrtDrcoHl8xE0KbZrZZwZQ"
)

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
CLAIMS = {"sub": "dave", "catbus": {"read": ["a.*"], "write": ["a.b"]}}
DAVE = Identity("dave", Grants(("a.*",), ("a.b",)), None)


def pem(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def jwks(*keys: tuple[Any, dict[str, str]]) -> str:
    return json.dumps({"keys": [{**public_jwk(key), **more} for key, more in keys]})


def public_jwk(key: Any) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
    return algorithm.to_jwk(key.public_key(), as_dict=True)


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(body: bytes | str, secret: str = SECRET) -> str:
    """A `sub-` token that holds this, whatever it is."""
    text = base64url(body.encode() if isinstance(body, str) else body)
    return f"sub-{text}.{base64url(hmac.digest(secret.encode(), text.encode(), 'sha256')[:16])}"


def signed_jwt(header: dict[str, Any], claims: Any, secret: str = SECRET) -> str:
    """A JWT with any header, over HMAC-SHA256 whatever the header says."""
    text = f"{base64url(json.dumps(header).encode())}.{base64url(json.dumps(claims).encode())}"
    return f"{text}.{base64url(hmac.digest(secret.encode(), text.encode(), hashlib.sha256))}"


def refusal(authenticator: Authenticator, token: str, now: float = NOW) -> PeerError:
    """The error to a token that is refused; nothing of the token stands in it."""
    with pytest.raises(PeerError) as caught:
        authenticator.verify(token, now)
    error = caught.value
    assert isinstance(error, TokenRejected)
    for part in token.split("."):
        assert len(part) < 8 or part not in error.message
        assert len(part) < 8 or part not in error.detail
    assert SECRET not in error.message + error.detail
    if error.reason in (
        RejectionReason.MALFORMED,
        RejectionReason.ALGORITHM,
        RejectionReason.KEY,
        RejectionReason.SIGNATURE,
    ):
        assert error.subject is None
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def assert_unauthenticated(authenticator: Authenticator, token: str, now: float = NOW) -> None:
    error = refusal(authenticator, token, now)
    assert (error.code, error.close) == (ErrorCode.UNAUTHENTICATED, CloseCode.UNAUTHENTICATED)


def assert_expired(authenticator: Authenticator, token: str, now: float = NOW) -> None:
    error = refusal(authenticator, token, now)
    assert (error.code, error.close) == (ErrorCode.TOKEN_EXPIRED, CloseCode.TOKEN_EXPIRED)


def assert_not_valid_yet(authenticator: Authenticator, token: str, now: float = NOW) -> PeerError:
    error = refusal(authenticator, token, now)
    assert (error.code, error.close) == (ErrorCode.TOKEN_NOT_VALID_YET, CloseCode.TOKEN_NOT_VALID_YET)
    assert error.close is not None
    assert not error.close.final
    return error


# Grants


def test_subscription_needs_one_grant_that_covers_its_pattern() -> None:
    grants = Grants(read=("a.b", "c.*"), write=("d.*",))
    assert [grants.may_read(pattern) for pattern in ("a.b", "c.*", "c.d", "c.d.*")] == [True] * 4
    assert [grants.may_read(pattern) for pattern in ("a.*", "a", "c", "*", "d.e")] == [False] * 5


def test_publish_needs_a_grant_that_matches_its_channel() -> None:
    grants = Grants(read=("d.*",), write=("a.b", "c.*"))
    assert [grants.may_write(channel) for channel in ("a.b", "c.d", "c.d.e")] == [True] * 3
    assert [grants.may_write(channel) for channel in ("a", "a.b.c", "c", "d.e")] == [False] * 4


def test_wildcard_grant_and_admin_key_allow_everything() -> None:
    assert Grants.ALL.may_read("*")
    assert Grants.ALL.may_write("a.b")
    assert Grants(read=("*",)).may_read("*")
    assert not Grants(read=("*",)).may_write("a")
    assert not Grants().may_read("a")


def test_reserved_channels_need_a_grant_of_their_own_to_read_and_nobody_writes_them() -> None:
    named = Grants(read=("_catbus.sessions.*",), write=("*", "_catbus.*", "_catbus.sessions.alice"))
    assert [named.may_read(pattern) for pattern in ("_catbus.sessions.*", "_catbus.sessions.alice")] == [True] * 2
    assert [named.may_read(pattern) for pattern in ("_catbus.*", "_catbus", "_a", "*")] == [False] * 4
    for grants in (named, Grants.ALL, Grants.ADMIN):
        assert not any(map(grants.may_write, ("_catbus.sessions.alice", "_catbus", "_", "_a.b")))
    assert [Grants.ALL.may_read(pattern) for pattern in ("_catbus.*", "_erased", "_")] == [False] * 3
    assert Grants.ADMIN.may_read("_catbus.*")


@pytest.mark.parametrize(
    ("grants", "text"),
    [
        (Grants(), "nothing"),
        (Grants(("a.*", "b")), "read a.*, b"),
        (Grants((), ("a",)), "write a"),
        (Grants(("a",), ("a",)), "read and write a"),
        (Grants(("a", "b.*"), ("c",)), "read a, b.* and write c"),
    ],
)
def test_grants_have_a_text_for_people(grants: Grants, text: str) -> None:
    assert str(grants) == text


# Tokens of the form that has always been


def test_tokens_of_existing_issuers_verify() -> None:
    authenticator = Authenticator([SECRET])
    assert authenticator.verify(ALICE, NOW) == Identity("alice", READER, None)
    assert authenticator.verify(BOB, NOW) == Identity("bob", Grants.ALL, 2e9, issued=1e9)
    assert authenticator.verify(CAROL, NOW) == Identity("carol", Grants(("orders.*",), ("orders.42",)), 2e9)


def test_signed_token_verifies() -> None:
    grants = Grants(read=("a.*", "b"), write=("*",))
    token = sign(SECRET, client_id="é", grants=grants, expires=NOW + 60.9, not_before=NOW - 60.5, issued_at=NOW)
    assert Authenticator([SECRET]).verify(token, NOW) == Identity("é", grants, NOW + 60, issued=NOW)
    assert Authenticator([SECRET]).verify(sign(SECRET, client_id=None, grants=Grants()), NOW).client_id is None


def test_signed_token_has_the_form_of_existing_tokens() -> None:
    token = sign(SECRET, client_id="alice", grants=READER)
    text, mac = token.removeprefix("sub-").split(".")
    assert json.loads(base64.urlsafe_b64decode(text + "==")) == json.loads(
        '{"client_id": "alice", "grants": {"grants": [{"grant_type": "read", "pattern": "project.*"}]}}'
    )
    assert len(base64.urlsafe_b64decode(mac + "==")) == 16
    assert "=" not in token


@given(
    client_id=st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    read=st.lists(st.sampled_from(["a", "a.*", "*", "b.c.d"])),
    write=st.lists(st.sampled_from(["a", "a.*", "*", "b.c.d"])),
    expires=st.none() | st.integers(int(NOW) + 1, 2**40),
)
def test_verified_identity_is_the_signed_one(
    client_id: str | None, read: list[str], write: list[str], expires: int | None
) -> None:
    grants = Grants(tuple(read), tuple(write))
    token = sign(SECRET, client_id=client_id, grants=grants, expires=expires)
    assert Authenticator([SECRET]).verify(token, NOW) == Identity(client_id, grants, expires)


@pytest.mark.parametrize("form", ["sub", "jwt"])
def test_repeated_token_is_decoded_once_and_its_times_are_checked_each_time(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    authenticator = Authenticator((SECRET,))
    claims = {"sub": "alice", "exp": NOW + 10, "nbf": NOW - 10, "catbus": {"read": ["a"], "write": []}}
    token = sign(SECRET, client_id="alice", grants=Grants(("a",)), expires=NOW + 10, not_before=NOW - 10)
    if form == "jwt":
        token = signed_jwt({"alg": "HS256"}, claims)
    identity = authenticator.verify(token, NOW)
    with monkeypatch.context() as patch:
        patch.setattr("catbus.auth.tokens.decode_claims", None)
        assert authenticator.verify(token, NOW + 1) == identity
        assert_expired(authenticator, token, NOW + 10)
        assert_not_valid_yet(authenticator, token, NOW - 11)
    assert authenticator.verify(token, NOW) == identity
    for place in (len(token) // 2, len(token) - 3):
        other = "A" if token[place] != "A" else "B"
        assert_unauthenticated(authenticator, token[:place] + other + token[place + 1 :])
    assert_unauthenticated(Authenticator((OTHER,)), token)
    assert token not in repr(authenticator._cache)


def test_cache_of_tokens_is_bounded() -> None:
    authenticator = Authenticator((SECRET,))
    tokens = [sign(SECRET, client_id=f"c{n}", grants=Grants((f"a{n}." + "x" * 200,) * 20)) for n in range(200)]
    for token in tokens:
        authenticator.verify(token, NOW)
        authenticator.verify(tokens[0], NOW)
        assert authenticator._cache_size == sum(size for size, _, _ in authenticator._cache.values()) <= CACHE_SIZE
    assert hashlib.sha256(tokens[0].encode()).digest() in authenticator._cache
    assert 1 < len(authenticator._cache) < 200
    assert authenticator.verify(tokens[1], NOW).client_id == "c1"


def test_each_of_several_secrets_verifies() -> None:
    token = sign(SECRET, client_id="a", grants=READER)
    assert Authenticator([OTHER, SECRET]).verify(token, NOW) == Authenticator([SECRET, OTHER]).verify(token, NOW)
    assert Authenticator([OTHER, SECRET]).verify(CAROL, NOW).client_id == "carol"
    assert_unauthenticated(Authenticator([OTHER]), token)
    assert_unauthenticated(Authenticator([OTHER]), CAROL)
    assert_unauthenticated(Authenticator([]), token)


def test_token_is_valid_from_nbf_until_just_before_exp() -> None:
    authenticator = Authenticator([SECRET])
    token = sign(SECRET, client_id="a", grants=READER, not_before=NOW - 0.5, expires=NOW + 10.5)
    assert_not_valid_yet(authenticator, token, NOW - 0.1)
    assert authenticator.verify(token, NOW).expires == NOW + 10
    authenticator.verify(token, NOW + 9.9)
    assert_expired(authenticator, token, NOW + 10)
    web = jwt.encode({**CLAIMS, "nbf": NOW, "exp": NOW + 10}, SECRET * 2, algorithm="HS256")
    authenticator = Authenticator([SECRET * 2])
    assert_not_valid_yet(authenticator, web, NOW - 0.1)
    assert authenticator.verify(web, NOW).expires == NOW + 10
    assert_expired(authenticator, web, NOW + 10)


def test_leeway_allows_clocks_that_differ() -> None:
    authenticator = Authenticator([SECRET], leeway=30)
    token = sign(SECRET, client_id="a", grants=READER, not_before=NOW, expires=NOW + 10)
    web = signed_jwt({"alg": "HS256"}, {**CLAIMS, "nbf": NOW, "exp": NOW + 10})
    for each in (token, web):
        assert assert_not_valid_yet(authenticator, each, NOW - 31).retry_after == 1
        for now in (NOW - 30, NOW, NOW + 39.9):
            assert authenticator.verify(each, now).expires == NOW + 10
        assert_expired(authenticator, each, NOW + 40)


@pytest.mark.parametrize("nbf", ["1e300", "1e18", "99999999999999"])
def test_retry_after_of_a_token_in_the_far_future_is_one_day(nbf: str) -> None:
    token = signed(f'{{"client_id":"a","grants":{{"grants":[]}},"nbf":{nbf}}}')
    assert assert_not_valid_yet(Authenticator([SECRET]), token).retry_after == MAX_RETRY_AFTER


def jwt_of(header: dict[str, Any], claims: Any = CLAIMS, secret: str = SECRET) -> str:
    return signed_jwt(header, claims, secret)


GRANTED = {"client_id": "a", "grants": {"grants": []}}


@pytest.mark.parametrize(
    ("token", "reason", "detail", "subject"),
    [
        ("hello", RejectionReason.MALFORMED, "not a token", None),
        ("x" * 9000, RejectionReason.MALFORMED, "the token has more than 8192 bytes", None),
        (
            signed(json.dumps(GRANTED), OTHER),
            RejectionReason.SIGNATURE,
            "signed with none of the configured secrets (1)",
            None,
        ),
        (signed('{"client_id":"a"}'), RejectionReason.CLAIMS, "Object missing required field `grants`", "a"),
        (signed("{"), RejectionReason.CLAIMS, "Input data was truncated", None),
        (
            signed(json.dumps({**GRANTED, "exp": NOW - 90})),
            RejectionReason.EXPIRED,
            "expired since 2023-11-14 22:11:50 UTC, 90 s ago",
            "a",
        ),
        (
            signed(json.dumps({**GRANTED, "nbf": NOW + 90})),
            RejectionReason.NOT_VALID_YET,
            "not valid until 2023-11-14 22:14:50 UTC, in 90 s",
            "a",
        ),
        (jwt_of({"alg": "HS512"}), RejectionReason.ALGORITHM, "the algorithm 'HS512' is not supported", None),
        (jwt_of({"alg": "none"}), RejectionReason.ALGORITHM, "the algorithm 'none' is not supported", None),
        (jwt_of({"alg": ["x"]}), RejectionReason.ALGORITHM, "the algorithm ['x'] is not supported", None),
        (jwt_of({"typ": "JWT"}), RejectionReason.ALGORITHM, "the algorithm None is not supported", None),
        (
            jwt_of({"alg": "HS256"}, secret=OTHER),
            RejectionReason.SIGNATURE,
            "signed with none of 1 configured keys for HS256",
            None,
        ),
        (jwt_of({"alg": "ES256"}), RejectionReason.KEY, "none of 0 configured keys for ES256 matches", None),
        (
            jwt_of({"alg": "RS256", "kid": "other"}),
            RejectionReason.KEY,
            "none of 1 configured keys for RS256 matches with the kid 'other'",
            None,
        ),
        (
            jwt_of({"alg": "RS256", "kid": "mine"}),
            RejectionReason.SIGNATURE,
            "signed with none of 1 configured keys for RS256 with the kid 'mine'",
            None,
        ),
        (
            jwt_of({"alg": "HS256"}, {"sub": "eve"}),
            RejectionReason.CLAIMS,
            "Object missing required field `catbus`",
            "eve",
        ),
        (
            jwt_of({"alg": "HS256"}, {"sub": "eve", "catbus": {"read": "a.*"}}),
            RejectionReason.CLAIMS,
            "Expected `array`, got `str` - at `$.catbus.read`",
            "eve",
        ),
        (
            jwt_of({"alg": "HS256"}, {"sub": 7, "catbus": {}}),
            RejectionReason.CLAIMS,
            "Expected `str | null`, got `int` - at `$.sub`",
            None,
        ),
        (
            "role-AAECAwQFBgcICQoLDA0ODw",
            RejectionReason.ROLE,
            "role tokens need a database, and this broker has none",
            None,
        ),
    ],
    ids=lambda value: value.value if isinstance(value, RejectionReason) else None,
)
def test_rejection_has_a_reason_and_details_for_the_operator(
    token: str, reason: RejectionReason, detail: str, subject: str | None
) -> None:
    error = refusal(Authenticator([SECRET], jwt_keys=[jwks((RSA_KEY, {"kid": "mine"}))]), token)
    assert isinstance(error, TokenRejected)
    assert (error.reason, error.detail, error.subject) == (reason, detail, subject)


def test_unsigned_header_is_clipped_in_the_details() -> None:
    error = refusal(Authenticator([SECRET]), jwt_of({"alg": "HS256\n" * 500}))
    assert isinstance(error, TokenRejected)
    assert len(error.detail) < 300
    assert "\n" not in error.detail


def test_token_issued_in_the_future_is_not_valid_yet() -> None:
    authenticator = Authenticator([SECRET], leeway=30)
    tokens = [
        sign(SECRET, client_id="a", grants=READER, issued_at=NOW + 60, not_before=NOW),
        signed_jwt({"alg": "HS256"}, {**CLAIMS, "iat": NOW + 60}),
    ]
    for token in tokens:
        assert assert_not_valid_yet(authenticator, token, NOW + 20).retry_after == 10
        # It counts as issued when it was seen: an issuer's clock may be ahead.
        assert authenticator.verify(token, NOW + 30).issued == NOW + 30
        assert authenticator.verify(token, NOW + 70).issued == NOW + 60


def test_time_of_issue_has_microseconds_and_is_not_rounded_up() -> None:
    issued = NOW + 0.123_456_7
    token = sign(SECRET, client_id="a", grants=READER, issued_at=issued)
    assert Authenticator([SECRET]).verify(token, NOW + 1).issued == NOW + 0.123_456
    assert Authenticator([SECRET]).verify(ALICE, NOW).issued == 0


PARTIES = [
    ({"iss": "https://a", "aud": "catbus"}, True),
    ({"iss": "https://b", "aud": ["x", "catbus"]}, True),
    ({"iss": "https://a/", "aud": "catbus"}, False),
    ({"aud": "catbus"}, False),
    ({"iss": ["https://a"], "aud": "catbus"}, False),
    ({"iss": "https://a"}, False),
    ({"iss": "https://a", "aud": "Catbus"}, False),
    ({"iss": "https://a", "aud": []}, False),
    ({"iss": "https://a", "aud": {"catbus": 1}}, False),
    ({"iss": "https://a", "aud": [["catbus"]]}, False),
]


@pytest.mark.parametrize(("parties", "accepted"), PARTIES, ids=str)
def test_issuer_and_audience_of_a_jwt_are_checked(parties: dict[str, Any], accepted: bool) -> None:
    token = signed_jwt({"alg": "HS256"}, {**CLAIMS, **parties})
    authenticator = Authenticator([SECRET], issuers=("https://a", "https://b"), audiences=("catbus",))
    for _ in range(2):  # The second time, claims may be cached.
        if accepted:
            assert authenticator.verify(token, NOW) == DAVE
        else:
            error = refusal(authenticator, token)
            assert isinstance(error, TokenRejected)
            assert (error.code, error.reason, error.subject) == ("unauthenticated", RejectionReason.CLAIMS, "dave")
    # Without the settings, the claims are ignored. `sub-` tokens have none.
    assert Authenticator([SECRET]).verify(token, NOW) == DAVE
    assert authenticator.verify(ALICE, NOW).client_id == "alice"


def test_replaced_keys_verify_nothing_more() -> None:
    token = jwt.encode(CLAIMS, EC_KEY, "ES256", {"kid": "1"})
    authenticator = Authenticator([SECRET])
    assert isinstance(refusal(authenticator, token), UnknownKey)
    keys = list(from_jwks(jwks((EC_KEY, {"kid": "1"}), (RSA_KEY, {"kid": "2"}))))
    authenticator.replace_fetched_keys(keys)
    assert authenticator.verify(token, NOW) == DAVE
    authenticator.replace_fetched_keys(keys)
    assert authenticator._cache
    authenticator.replace_fetched_keys(keys[1:])
    assert isinstance(refusal(authenticator, token), UnknownKey)
    # A fetch cannot help where the secret or the signature is wrong.
    for other in (signed_jwt({"alg": "HS256"}, CLAIMS, OTHER), signed_jwt({"alg": "RS256", "kid": "2"}, CLAIMS)):
        assert not isinstance(refusal(authenticator, other), UnknownKey)


def test_expired_token_with_another_signature_is_not_reported_as_expired() -> None:
    assert_unauthenticated(Authenticator([OTHER]), sign(SECRET, client_id="a", grants=READER, expires=1))


@pytest.mark.parametrize("token", [ALICE, BOB, CAROL], ids=["alice", "bob", "carol"])
def test_token_with_one_character_changed_or_missing_is_rejected(token: str) -> None:
    authenticator = Authenticator([SECRET])
    for place, character in enumerate(token):
        assert_unauthenticated(authenticator, token[:place])
        assert_unauthenticated(authenticator, token[:place] + token[place + 1 :])
        assert_unauthenticated(authenticator, token[:place] + chr(ord(character) ^ 1) + token[place + 1 :])


@pytest.mark.parametrize("more", ["==", "A", ".", " ", "\n", "\0", ".AAAA", "é", "\ud800"])
@pytest.mark.parametrize("token", [ALICE, CAROL], ids=["alice", "carol"])
def test_token_with_a_suffix_is_rejected(token: str, more: str) -> None:
    assert_unauthenticated(Authenticator([SECRET]), token + more)


def test_padded_token_is_rejected() -> None:
    assert_unauthenticated(Authenticator([SECRET]), ALICE + "=")
    assert_unauthenticated(Authenticator([SECRET]), ALICE.replace(".", "=."))


def test_untruncated_mac_is_rejected() -> None:
    text = ALICE.removeprefix("sub-").split(".")[0]
    mac = hmac.digest(SECRET.encode(), text.encode(), "sha256")
    for size in (0, 1, 8, 15, 17, 32):
        assert_unauthenticated(Authenticator([SECRET]), f"sub-{text}.{base64url(mac[:size])}")


GRANTS = '{"grants":[{"grant_type":"read","pattern":"a"}]}'

UNUSABLE = {
    "nothing": "",
    "not JSON": "{",
    "not UTF-8": b'{"client_id":"\xff","grants":{"grants":[]}}',
    "not an object": "[]",
    "no grants": '{"client_id":"a"}',
    "grants of another form": '{"client_id":"a","grants":[]}',
    "null for grants": '{"client_id":"a","grants":null}',
    "an unknown grant": '{"client_id":"a","grants":{"grants":[{"grant_type":"admin","pattern":"a"}]}}',
    "a grant in capitals": '{"client_id":"a","grants":{"grants":[{"grant_type":"Read","pattern":"a"}]}}',
    "a grant of nothing": '{"client_id":"a","grants":{"grants":[{"grant_type":"read"}]}}',
    "a grant on no pattern": '{"client_id":"a","grants":{"grants":[{"grant_type":"read","pattern":"a.*.b"}]}}',
    "a grant on a line": '{"client_id":"a","grants":{"grants":[{"grant_type":"read","pattern":"a\\n"}]}}',
    "create on no pattern": '{"client_id":"a","grants":{"grants":[{"grant_type":"create","pattern":"a b"}]}}',
    "a client_id that is a number": f'{{"client_id":1,"grants":{GRANTS}}}',
    "a client_id no database holds": f'{{"client_id":"a\\u0000","grants":{GRANTS}}}',
    "an expiry that is a string": f'{{"client_id":"a","grants":{GRANTS},"exp":"2000000000"}}',
    "an expiry that is true": f'{{"client_id":"a","grants":{GRANTS},"exp":true}}',
    "an expiry out of range": f'{{"client_id":"a","grants":{GRANTS},"exp":1e999}}',
    "an expiry that is no number": f'{{"client_id":"a","grants":{GRANTS},"exp":NaN}}',
    "a start that is a string": f'{{"client_id":"a","grants":{GRANTS},"nbf":"0"}}',
    "a bomb": '{"client_id":"a","x":' + "[" * 3000 + "]" * 3000 + f',"grants":{GRANTS}}}',
}


@pytest.mark.parametrize("body", UNUSABLE.values(), ids=UNUSABLE)
def test_signed_token_with_invalid_claims_is_rejected(body: bytes | str) -> None:
    assert_unauthenticated(Authenticator([SECRET]), signed(body))


def test_unknown_claims_are_ignored() -> None:
    token = signed('{"client_id":"a","grants":{"grants":[{"grant_type":"read","pattern":"a","x":1}],"y":2},"z":3}')
    assert Authenticator([SECRET]).verify(token, NOW) == Identity("a", Grants(read=("a",)), None)


def test_create_grants_nothing_and_all_grants_read_and_write() -> None:
    token = signed(
        '{"client_id":"a","grants":{"grants":[{"grant_type":"create","pattern":"a"},{"grant_type":"all","pattern":"b"},'
        '{"grant_type":"write","pattern":"c"}]}}'
    )
    assert Authenticator([SECRET]).verify(token, NOW).grants == Grants(("b",), ("b", "c"))


def test_long_token_is_rejected_without_decoding() -> None:
    def filled(size: int) -> str:
        return signed(json.dumps({"client_id": "x" * size, "grants": {"grants": []}}))

    authenticator = Authenticator([SECRET])
    token = filled(6000)
    assert len(token) <= MAX_TOKEN
    authenticator.verify(token, NOW)
    token = filled(6200)
    assert len(token) > MAX_TOKEN
    assert str(MAX_TOKEN) in refusal(authenticator, token).message


def test_sign_rejects_arguments_of_a_token_that_would_not_verify() -> None:
    with pytest.raises(PeerError) as caught:
        sign(SECRET, client_id="a", grants=Grants(read=("a.*.b",)))
    assert caught.value.code == ErrorCode.INVALID_PATTERN
    with pytest.raises(ConfigError, match="fewer"):
        sign(SECRET, client_id="a", grants=Grants(read=("a" * 200,) * 40))
    with pytest.raises(ConfigError):
        sign("", client_id="a", grants=READER)


# Tokens of roles

# Made with openssl, by the words of the specification.
ROLE = "role-AAECAwQFBgcICQoLDA0ODw"
ROLE_KEY = bytes.fromhex("002eb3649d7ec0bd3fdb6b7312cffcf3d5f3d27b8558209486fdcbcd7bb07f48")


def test_role_key_is_the_hash_of_its_token() -> None:
    assert role_key(ROLE) == ROLE_KEY
    assert role_handle(ROLE_KEY) == ROLE_KEY.hex()[:12]


def test_new_role_tokens_have_the_form_and_are_unique() -> None:
    tokens = {make_role_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        assert len(token) == len(ROLE)
        assert role_key(token) == hashlib.sha256(token.encode()).digest()


@given(st.binary(max_size=40))
def test_role_token_has_exactly_16_bytes(data: bytes) -> None:
    assert (role_key(f"role-{base64url(data)}") is not None) is (len(data) == 16)


def test_malformed_role_token_has_no_key() -> None:
    for place in range(len(ROLE)):
        assert role_key(ROLE[:place]) is None
        assert role_key(ROLE[:place] + ROLE[place + 1 :]) is None
        assert role_key(ROLE[:place] + "=" + ROLE[place + 1 :]) is None
    # The last character has bits to spare, and only one spelling counts.
    for near in (
        f"{ROLE}=",
        f"{ROLE}==",
        f"{ROLE} ",
        f"{ROLE}\n",
        f" {ROLE}",
        f"{ROLE[:-1]}x",
        f"{ROLE}A",
        ROLE.upper(),
    ):
        assert role_key(near) is None
        assert_unauthenticated(Authenticator([SECRET]), near)


@given(st.text().map("role-".__add__) | st.text())
def test_role_key_accepts_any_text(text: str) -> None:
    assert role_key(text) is None
    assert role_digits(text) is None or len(text) >= 12


def test_role_is_named_by_its_token_or_its_handle() -> None:
    digits = ROLE_KEY.hex()
    assert role_digits(ROLE) == digits
    for length in (12, 13, 40, 64):
        assert role_digits(digits[:length].upper()) == digits[:length]
    for name in (
        "",
        digits[:11],
        digits + "0",
        digits[:11] + "g",
        f"{digits[:12]} ",
        f"{digits[:12]}\n",
        "\uff10" * 12,
    ):
        assert role_digits(name) is None


def test_role_token_is_rejected_without_a_database() -> None:
    assert_unauthenticated(Authenticator([SECRET], admin_key="an admin key"), ROLE)
    assert "need a database, and this broker has none" in refusal(Authenticator([SECRET]), ROLE).message


def test_admin_key_in_the_form_of_a_role_token_is_rejected() -> None:
    with pytest.raises(ConfigError, match="the form of a role token") as caught:
        Authenticator([SECRET], admin_key=ROLE)
    assert ROLE not in str(caught.value)
    assert Authenticator([SECRET], admin_key="role-model").verify("role-model", NOW).admin


@given(st.text() | st.text(alphabet="sub-ey.AQ_=", max_size=30) | st.lists(st.binary().map(base64url)).map(".".join))
def test_other_texts_are_rejected(token: str) -> None:
    authenticator = Authenticator([SECRET], admin_key="an admin key", jwt_keys=[pem(RSA_KEY)])
    for text in (token, "sub-" + token, "role-" + token, "eyJhbGciOiJIUzI1NiJ9." + token):
        assert_unauthenticated(authenticator, text)


# The admin key


def test_admin_key_allows_everything() -> None:
    authenticator = Authenticator([SECRET], admin_key="Schlüssel")
    assert authenticator.verify("Schlüssel", NOW) == Identity(None, Grants.ADMIN, None, admin=True)
    for token in ("Schlüsse", "Schlüssell", "schlüssel", ""):
        assert_unauthenticated(authenticator, token)


@pytest.mark.parametrize("admin_key", [None, ""])
def test_no_token_is_admin_without_an_admin_key(admin_key: str | None) -> None:
    authenticator = Authenticator([SECRET], admin_key=admin_key)
    for token in ("", "None"):
        assert_unauthenticated(authenticator, token)
    assert not authenticator.verify(BOB, NOW).admin


# JWTs


@pytest.mark.parametrize(("key", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256")], ids=["RS256", "ES256"])
def test_jwt_verifies_with_a_public_key(key: Any, algorithm: str) -> None:
    token = jwt.encode(CLAIMS, key, algorithm=algorithm)
    for texts in ([pem(key)], [jwks((key, {}))], [pem(RSA_KEY) + pem(EC_KEY)], [pem(EC_KEY), jwks((RSA_KEY, {}))]):
        assert Authenticator([], jwt_keys=texts).verify(token, NOW) == DAVE
    stranger = (
        rsa.generate_private_key(65537, 2048) if algorithm == "RS256" else ec.generate_private_key(ec.SECP256R1())
    )
    assert_unauthenticated(Authenticator([SECRET], jwt_keys=[pem(stranger)]), token)
    assert_unauthenticated(Authenticator([SECRET]), token)


def test_jwt_with_a_short_secret_verifies_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Authenticator(["s"]).verify(signed_jwt({"alg": "HS256"}, CLAIMS, "s"), NOW) == DAVE


def test_public_key_is_not_used_as_an_hmac_secret() -> None:
    for key in (RSA_KEY, EC_KEY):
        authenticator = Authenticator([SECRET], jwt_keys=[pem(key), jwks((key, {"kid": "k"}))])
        for text in (pem(key), pem(key).strip(), jwks((key, {"kid": "k"}))):
            for header in ({"alg": "HS256"}, {"alg": "HS256", "kid": "k"}, {"alg": "RS256"}, {"alg": "ES256"}):
                assert_unauthenticated(authenticator, signed_jwt(header, CLAIMS, text))


@pytest.mark.parametrize("algorithm", ["none", "None", "", "HS384", "HS512", "hs256", "RS512", "PS256", "EdDSA"])
def test_other_algorithms_are_rejected(algorithm: str) -> None:
    authenticator = Authenticator([SECRET], jwt_keys=[pem(RSA_KEY), pem(EC_KEY)])
    assert_unauthenticated(authenticator, signed_jwt({"alg": algorithm}, CLAIMS))
    unsigned = signed_jwt({"alg": algorithm}, CLAIMS).rpartition(".")[0] + "."
    assert_unauthenticated(authenticator, unsigned)


def test_valid_signature_of_another_algorithm_is_rejected() -> None:
    authenticator = Authenticator([SECRET * 4], jwt_keys=[pem(RSA_KEY), pem(EC_KEY)])
    assert_unauthenticated(authenticator, jwt.encode(CLAIMS, RSA_KEY, algorithm="RS512"))
    assert_unauthenticated(authenticator, jwt.encode(CLAIMS, RSA_KEY, algorithm="PS256"))
    assert_unauthenticated(authenticator, jwt.encode(CLAIMS, SECRET * 4, algorithm="HS512"))


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"alg": None},
        {"alg": ["HS256"]},
        {"alg": {"HS256": 1}},
        {"alg": "HS256", "kid": 7},
        {"alg": "HS256", "crit": ["exp"], "exp": 1},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
    ],
)
def test_jwt_with_an_invalid_header_is_rejected(header: dict[str, Any]) -> None:
    assert_unauthenticated(Authenticator([SECRET]), signed_jwt(header, CLAIMS))


@pytest.mark.parametrize(
    "claims",
    [
        [],
        "a",
        {"sub": "dave"},
        {"sub": "dave", "catbus": None},
        {"sub": "dave", "catbus": {"read": "a.*"}},
        {"sub": "dave", "catbus": {"read": ["a.*.b"]}},
        {"sub": "dave", "catbus": {"write": [7]}},
        {"sub": 7, "catbus": {}},
        {**CLAIMS, "exp": "2000000000"},
        {**CLAIMS, "exp": float("nan")},
        {**CLAIMS, "exp": float("inf")},
        {**CLAIMS, "nbf": []},
    ],
)
def test_jwt_with_invalid_claims_is_rejected(claims: Any) -> None:
    assert_unauthenticated(Authenticator([SECRET]), signed_jwt({"alg": "HS256"}, claims))


def test_jwt_allows_only_its_patterns() -> None:
    claims = {"sub": "dave", "catbus": {"read": ["a"], "admin": True}, "grants": {"grants": []}, "scope": "all"}
    identity = Authenticator([SECRET]).verify(signed_jwt({"alg": "HS256"}, claims), NOW)
    assert identity == Identity("dave", Grants(read=("a",)), None, admin=False)


def test_kid_of_a_jwt_selects_the_key() -> None:
    other = rsa.generate_private_key(65537, 2048)
    authenticator = Authenticator([], jwt_keys=[jwks((RSA_KEY, {"kid": "one"}), (other, {"kid": "two"}))])
    for key, kid in ((RSA_KEY, "one"), (other, "two"), (RSA_KEY, None), (other, None)):
        token = jwt.encode(CLAIMS, key, algorithm="RS256", headers={"kid": kid} if kid else None)
        assert authenticator.verify(token, NOW) == DAVE
    for key, kid in ((RSA_KEY, "two"), (other, "one"), (RSA_KEY, "three")):
        assert_unauthenticated(authenticator, jwt.encode(CLAIMS, key, algorithm="RS256", headers={"kid": kid}))
    unnamed = Authenticator([], jwt_keys=[pem(RSA_KEY)])
    assert unnamed.verify(jwt.encode(CLAIMS, RSA_KEY, algorithm="RS256", headers={"kid": "any"}), NOW) == DAVE


def test_unusable_keys_of_a_jwks_are_skipped() -> None:
    oct_key = {"kty": "oct", "k": base64url(b"0" * 32), "kid": "oct"}
    mixed = json.loads(jwks((EC_KEY, {"kid": "good"}), (RSA_KEY, {"alg": "RS512"}), (RSA_KEY, {"use": "enc"})))
    mixed["keys"] += [oct_key, {"kty": "what"}, 7]
    authenticator = Authenticator([], jwt_keys=[json.dumps(mixed)])
    assert authenticator.verify(jwt.encode(CLAIMS, EC_KEY, algorithm="ES256"), NOW) == DAVE
    assert_unauthenticated(authenticator, jwt.encode(CLAIMS, RSA_KEY, algorithm="RS256"))
    assert_unauthenticated(authenticator, signed_jwt({"alg": "HS256"}, CLAIMS, "0" * 32))


USELESS = {
    "nothing": "",
    "no key": "hello",
    "a broken PEM": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    "a short RSA key": pem(rsa.generate_private_key(65537, 1024)),
    "another curve": pem(ec.generate_private_key(ec.SECP384R1())),
    "another kind": pem(ed25519.Ed25519PrivateKey.generate()),
    "a good key and a bad one": pem(EC_KEY) + pem(ec.generate_private_key(ec.SECP384R1())),
    "broken JSON": "{",
    "no keys": "{}",
    "an empty set": '{"keys": []}',
    "keys that are no list": '{"keys": {"a": 1}}',
    "a set for another curve": jwks((ec.generate_private_key(ec.SECP384R1()), {})),
    "a set of secrets": json.dumps({"keys": [{"kty": "oct", "k": base64url(b"0" * 32)}]}),
    "a set of private keys": json.dumps({"keys": [jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True)]}),
}


@pytest.mark.parametrize("text", USELESS.values(), ids=USELESS)
def test_unusable_key_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Authenticator([SECRET], jwt_keys=[text])


@pytest.mark.parametrize("secrets", [[""], [SECRET, ""], SECRET])
def test_empty_secret_is_a_config_error(secrets: list[str] | str) -> None:
    with pytest.raises(ConfigError):
        Authenticator(secrets)


# Producers


@given(st.none() | st.text())
def test_producer_id_verifies_at_every_replica_with_the_secret(subject: str | None) -> None:
    text = Authenticator([SECRET]).make_producer_id(subject, NOW)
    name = Authenticator([SECRET]).verify_producer_id(text, subject)
    assert name is not None
    assert len(name) == 16
    assert base64url(name + base64.urlsafe_b64decode(text + "==")[16:]) == text
    assert Authenticator([OTHER, SECRET]).verify_producer_id(text, subject) == name
    assert Authenticator([OTHER]).verify_producer_id(text, subject) is None


@given(st.none() | st.text(), st.none() | st.text())
def test_producer_id_of_another_client_id_is_rejected(subject: str | None, other: str | None) -> None:
    authenticator = Authenticator([SECRET])
    fits = authenticator.verify_producer_id(authenticator.make_producer_id(subject, NOW), other) is not None
    assert fits == (subject == other)


def test_producer_ids_are_unique() -> None:
    authenticator = Authenticator([SECRET])
    assert authenticator.make_producer_id("a", NOW) != authenticator.make_producer_id("a", NOW)


def test_changed_producer_id_is_rejected() -> None:
    authenticator = Authenticator([SECRET])
    text = authenticator.make_producer_id("a", NOW)
    for place, character in enumerate(text):
        for changed in (chr(ord(character) ^ 1), ""):
            assert authenticator.verify_producer_id(text[:place] + changed + text[place + 1 :], "a") is None
    for changed in ("", text + "=", text + "A", text + "\n", text + text, "é", "\ud800"):
        assert authenticator.verify_producer_id(changed, "a") is None


def test_producer_id_cannot_be_made_from_a_token() -> None:
    """The MAC of a token must be of no help: its holder would choose whose publisher to be."""
    name = b"0123456789abcdef"
    forged = name + hmac.digest(SECRET.encode(), name + b"=a", "sha256")[:16]
    assert Authenticator([SECRET]).verify_producer_id(base64url(forged), "a") is None


def test_producer_id_without_secrets_is_valid_for_its_authenticator_only() -> None:
    authenticator = Authenticator([])
    text = authenticator.make_producer_id("a", NOW)
    assert authenticator.verify_producer_id(text, "a") is not None
    assert Authenticator([]).verify_producer_id(text, "a") is None


def test_client_is_the_client_id_or_the_token_in_one_network() -> None:
    named, nobody = Identity("alice", Grants.ALL, None), Identity(None, Grants.ALL, None)
    assert client_of(named, "sub-abc.c2ln", "a") == client_of(named, "another", "b") == "alice"
    here = client_of(nobody, "sub-abc.c2ln", "a")
    assert client_of(nobody, "sub-abc.c2lm", "a") == here, "another spelling of its signature"
    assert here not in {client_of(nobody, "sub-abc.c2ln", "b"), client_of(nobody, "sub-abd.c2ln", "a"), "sub-abc.c2ln"}
    assert client_of(Identity("", Grants.ALL, None), "sub-abc.c2ln", "a") == here


@pytest.mark.parametrize("rate", [0, -1, 1.5, "many", 2**60, True])
def test_invalid_rate_is_rejected(rate: object) -> None:
    authenticator = Authenticator([SECRET * 2])
    good = {"sub": "a", "catbus": {"write": ["*"], "publish_rate": 7, "publish_bytes": None}}
    identity = authenticator.verify(jwt.encode(good, SECRET * 2, algorithm="HS256"), NOW)
    assert (identity.publish_rate, identity.publish_bytes) == (7, None)
    for name in ("publish_rate", "publish_bytes"):
        claims = {"sub": "a", "catbus": {"write": ["*"], name: rate}}
        with pytest.raises(TokenRejected) as caught:
            authenticator.verify(jwt.encode(claims, SECRET * 2, algorithm="HS256"), NOW)
        assert caught.value.reason is RejectionReason.CLAIMS
