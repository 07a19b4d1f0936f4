"""`catbus token`."""

from __future__ import annotations

import io
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import joserfc.jwt
import pytest
from joserfc.jwk import ECKey, KeySet

from catbus.auth.grants import Grants
from catbus.auth.role_tokens import make_role_token, role_handle, role_key
from catbus.auth.tokens import sign
from catbus.cli.commands.token import describe_time_difference
from tests.test_tokens import EC_KEY, jwks, pem, signed_jwt

from .conftest import Command

SECRET = "a secret of the tests"
OTHER = "another secret of the tests"
GRANTS = Grants(("a.*",), ("a.b",))


def parts(output: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in output.splitlines()}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CATBUS_STATE", str(tmp_path))


def test_token_is_described(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_SECRET", SECRET)
    token = sign(SECRET, client_id="alice", grants=GRANTS, expires=time.time() + 7230)
    status, output, _ = catbus("token", "show", token)
    assert status == 0
    shown = parts(output)
    assert shown["token"] == "sub- token"
    assert shown["client_id"] == "alice"
    assert shown["exp"].endswith(" UTC, in 2 hours")
    assert (shown["allows"], shown["signature"], shown["verdict"]) == ("read a.* and write a.b", "valid", "accepted")


def test_token_is_read_from_stdin(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    token = sign(SECRET, client_id="alice", grants=GRANTS)
    for arguments in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{token}\n"))
        status, output, _ = catbus("token", "show", *arguments, "--secret", SECRET, "--json")
        found = json.loads(output)
        assert status == 0
        assert (found["kind"], found["accepted"], found["signature"]) == ("sub", True, "valid")
        assert (found["read"], found["write"]) == (["a.*"], ["a.b"])


CLAIMS: dict[str, Any] = {"sub": "eve", "catbus": {"read": ["a"]}}


@pytest.mark.parametrize(
    ("token", "reason", "signature", "allows"),
    [
        (sign(OTHER, client_id="a", grants=GRANTS), "signature", "invalid", "read a.* and write a.b"),
        (sign(SECRET, client_id="a", grants=GRANTS, expires=1), "expired", "valid", "read a.* and write a.b"),
        (
            sign(SECRET, client_id="a", grants=GRANTS, not_before=4e9),
            "not_valid_yet",
            "valid",
            "read a.* and write a.b",
        ),
        (signed_jwt({"alg": "HS512"}, CLAIMS, SECRET), "algorithm", "invalid", "read a"),
        (signed_jwt({"alg": "none"}, CLAIMS, SECRET), "algorithm", "invalid", "read a"),
        (signed_jwt({"alg": "RS256", "kid": "k"}, CLAIMS, SECRET), "key", "invalid", "read a"),
        (signed_jwt({"alg": "HS256"}, {"sub": "eve"}, SECRET), "claims", "valid", None),
        (signed_jwt({"alg": "HS256"}, {"catbus": {"read": "a"}}, SECRET), "claims", "valid", None),
        ("hello", "malformed", "invalid", None),
        ("a.b.c", "malformed", "invalid", None),
        ("sub-e30", "signature", "invalid", None),
        ("x" * 9000, "malformed", "invalid", None),
    ],
)
def test_reason_of_a_rejected_token_is_shown(
    catbus: Command, monkeypatch: pytest.MonkeyPatch, token: str, reason: str, signature: str, allows: str | None
) -> None:
    monkeypatch.setenv("CATBUS_SECRET", SECRET)
    status, output, errors = catbus("token", "show", token, "--json")
    found = json.loads(output)
    assert (status, found["accepted"], found["reason"], found["signature"]) == (1, False, reason, signature)
    status, output, more = catbus("token", "show", token)
    shown = parts(output)
    assert status == 1
    assert f"({reason}): {found['detail']}" in shown["verdict"]
    assert shown.get("allows") == allows
    for secret in (SECRET, OTHER):
        assert secret not in output + errors + more


def test_secrets_are_those_of_the_broker(catbus: Command, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(pem(EC_KEY))
    (tmp_path / "catbus.toml").write_text(
        f'[auth]\nsecret = ["new {OTHER}", "{SECRET}"]\njwt = ["key.pem"]\nleeway = 0\n'
    )
    config = ("--config", str(tmp_path / "catbus.toml"))
    assert catbus("token", "show", *config, sign(SECRET, client_id="a", grants=GRANTS)).status == 0
    late = sign(SECRET, client_id="a", grants=GRANTS, expires=time.time() - 10)
    assert catbus("token", "show", *config, late).status == 1
    assert catbus("token", "show", "--secret", SECRET, late).status == 0
    status, output, _ = catbus("token", "show", *config, signed_jwt({"alg": "ES256"}, CLAIMS, SECRET), "--json")
    assert (status, json.loads(output)["reason"]) == (1, "signature")


def test_claims_are_shown_without_a_secret(catbus: Command) -> None:
    status, output, _ = catbus("token", "show", sign(SECRET, client_id="alice", grants=GRANTS))
    shown = parts(output)
    assert (status, shown["client_id"], shown["signature"]) == (0, "alice", "unchecked")
    assert shown["verdict"].startswith("undecided: no secret and no key is configured")


def test_role_token_is_shown_by_its_handle(catbus: Command) -> None:
    token = make_role_token()
    key = role_key(token)
    assert key is not None
    status, output, _ = catbus("token", "show", token)
    assert status == 0
    assert parts(output)["role"] == role_handle(key)
    assert token not in output


def test_admin_key_is_recognised_and_not_shown(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_ADMIN_KEY", OTHER)
    status, output, errors = catbus("token", "show", OTHER)
    assert (status, parts(output)["allows"]) == (0, "read and write *")
    assert OTHER not in output + errors


def test_claim_is_one_line(catbus: Command) -> None:
    token = sign(SECRET, client_id="a\nverdict     accepted\x1b[2J", grants=GRANTS)
    status, output, _ = catbus("token", "show", token, "--secret", OTHER)
    assert status == 1
    assert "\x1b" not in output
    assert output.count("\nverdict") == 1


def test_empty_input_is_an_error(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert catbus("token", "show").status == 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "in 0 seconds"),
        (-90, "90 seconds ago"),
        (150, "in 2 minutes"),
        (-86_400, "24 hours ago"),
        (1e9, "in 11574 days"),
    ],
)
def test_time_differences_are_described(seconds: float, words: str) -> None:
    assert describe_time_difference(seconds) == words


def test_key_sets_are_read_as_by_the_broker(catbus: Command, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(jwks((EC_KEY, {"kid": "mine"})))
    (tmp_path / "catbus.toml").write_text('[auth]\njwt = ["keys.json"]\n')
    token = signed_jwt({"alg": "ES256", "kid": "other"}, CLAIMS, SECRET)
    _, output, _ = catbus("token", "show", "--config", str(tmp_path / "catbus.toml"), token)
    assert "(key): none of 1 configured keys for ES256 matches with the kid 'other'" in parts(output)["verdict"]


def test_keys_are_fetched_from_a_url(catbus: Command, tmp_path: Path) -> None:
    key = ECKey.generate_key("P-256", {"kid": "1"})
    body = json.dumps(KeySet([key]).as_dict(private=False)).encode()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    config = tmp_path / "catbus.toml"
    token = joserfc.jwt.encode({"alg": "ES256", "kid": "1"}, {"sub": "a", "catbus": {"read": ["a"]}}, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        url = f"http://127.0.0.1:{server.server_port}/keys"
        config.write_text(f'[auth]\njwt = ["{url}?x=hidden"]\n')
        thread = Thread(target=server.serve_forever)
        thread.start()
        status, output, _ = catbus("token", "show", token, "--config", str(config))
        assert (status, "signature   valid" in output) == (0, True)
        status, output, _ = catbus("token", "show", f"{token[:-4]}AAAA", "--config", str(config))
        assert (status, "signature   invalid" in output) == (1, True)
        server.shutdown()
        thread.join()
    status, _, errors = catbus("token", "show", token, "--config", str(config))
    assert status == 1
    assert f"auth.jwt: {url}?*** cannot be fetched: ConnectError" in errors
