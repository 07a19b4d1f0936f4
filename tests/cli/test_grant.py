"""`catbus grant`."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator
from catbus.cli.development_credentials import (
    SECRET_FILE,
    development_token,
    find_token,
    read_or_create_secret,
    read_secret,
)
from catbus.error_codes import ErrorCode
from catbus.errors import ConfigError, PeerError

from .conftest import Command

SECRET = "not a very good secret"


def test_token_is_the_only_text_on_stdout(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_SECRET", SECRET)
    status, output, errors = catbus("grant", "-p", "read", "-p", "write", "project.*", "--client-id", "alice")
    assert status == 0
    [token] = output.splitlines()
    identity = Authenticator([SECRET]).verify(token, time.time())
    assert identity.client_id == "alice"
    assert identity.grants == Grants(("project.*",), ("project.*",))
    assert identity.expires is None and not identity.admin
    assert errors == (
        "alice may read and write project.*, and does not expire; signed with the secret of CATBUS_SECRET\n"
    )


@pytest.mark.parametrize(
    ("permissions", "grants"),
    [
        (["read"], Grants(("a", "b.*"), ())),
        (["write"], Grants((), ("a", "b.*"))),
        (["all"], Grants(("a", "b.*"), ("a", "b.*"))),
    ],
)
def test_several_patterns_are_granted(catbus: Command, permissions: list[str], grants: Grants) -> None:
    flags = [flag for permission in permissions for flag in ("-p", permission)]
    token = catbus("grant", *flags, "a", "b.*", "--client-id", "x", "--secret", SECRET).output.strip()
    assert Authenticator([SECRET]).verify(token, time.time()).grants == grants


def test_token_contains_publish_rates(catbus: Command) -> None:
    options = "-p", "all", "*", "--client-id", "x", "--secret", SECRET
    token = catbus("grant", *options, "--publish-rate", "500", "--publish-bytes", "1MiB").output.strip()
    identity = Authenticator([SECRET]).verify(token, time.time())
    assert (identity.publish_rate, identity.publish_bytes) == (500, 1 << 20)
    identity = Authenticator([SECRET]).verify(
        catbus("grant", *options, "--publish-bytes", "17").output.strip(), time.time()
    )
    assert (identity.publish_rate, identity.publish_bytes) == (None, 17)
    for wrong in ("0", "much", "1e9B", "-1", "9" * 30):
        assert catbus("grant", *options, "--publish-bytes", wrong).status == 2
    assert catbus("grant", *options, "--publish-rate", "0").status == 2
    assert catbus("grant", "-p", "all", "*", "--to", "0" * 12, "--publish-rate", "1").status == 2


def test_token_expires(catbus: Command) -> None:
    began = time.time()
    _, output, errors = catbus(
        "grant", "-p", "all", "*", "--client-id", "x", "--expires", "1h", "--secret", SECRET
    )  # fmt: skip
    identity = Authenticator([SECRET]).verify(output.strip(), time.time())
    assert identity.expires == pytest.approx(began + 3600, abs=60)
    assert " until 2" in errors
    with pytest.raises(PeerError) as caught:
        Authenticator([SECRET]).verify(output.strip(), began + 7200)
    assert caught.value.code == ErrorCode.TOKEN_EXPIRED


def test_secret_can_come_from_a_file(catbus: Command, tmp_path: Path) -> None:
    path = tmp_path / "catbus.toml"
    path.write_text(f'[auth]\nsecret = ["{SECRET}", "an older one"]\n')
    _, output, errors = catbus("grant", "-p", "read", "a", "--client-id", "x", "--config", str(path))
    assert Authenticator([SECRET]).verify(output.strip(), time.time()).client_id == "x"
    assert f"signed with the secret of {path}" in errors
    assert SECRET not in errors


def test_development_secret_is_the_default(catbus: Command, tmp_path: Path) -> None:
    secret = read_or_create_secret(tmp_path / "state")
    _, output, errors = catbus("grant", "-p", "read", "a", "--client-id", "x")
    assert Authenticator([secret]).verify(output.strip(), time.time()).client_id == "x"
    assert "the development secret in" in errors


def test_development_secret_is_created_once_and_readable_by_one_user(tmp_path: Path) -> None:
    directory = tmp_path / "some" / "where"
    assert read_secret(directory) is None
    secret = read_or_create_secret(directory)
    assert len(secret) >= 32
    assert read_or_create_secret(directory) == read_secret(directory) == secret
    assert [path.name for path in directory.iterdir()] == [SECRET_FILE]
    assert stat.S_IMODE((directory / SECRET_FILE).stat().st_mode) == 0o600


def test_impossible_state_directory_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="CATBUS_STATE"):
        read_or_create_secret(tmp_path / "file" / "state")
    (tmp_path / SECRET_FILE).touch()
    with pytest.raises(ConfigError, match="is empty: delete it"):
        read_or_create_secret(tmp_path)


def test_development_token_is_only_for_this_machine(tmp_path: Path) -> None:
    token = development_token(read_or_create_secret(tmp_path / "state"))
    for url in ("ws://127.0.0.1:8080/ws", "ws://localhost/ws", "ws://[::1]:1/ws"):
        assert find_token(url) == token
    for url in ("wss://bus.example.com/ws", "ws://10.0.0.1:8080/ws", "ws://127.0.0.1.example.com/ws"):
        assert find_token(url) is None
