"""`catbus role`, `catbus grant --to` and `catbus revoke`, on a running database and on an embedded one."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catbus.auth.grants import Grants
from catbus.auth.role_tokens import make_role_token, role_handle, role_key
from catbus.cli.commands.revoke import still_allowed
from catbus.postgres.embedded import server as embedded_server

from .conftest import Command, Start, next_event

CREATED = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database of the environment."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    return database_url


def handle_of(token: str) -> str:
    key = role_key(token)
    assert key is not None
    return role_handle(key)


def make(catbus: Command, *arguments: str) -> str:
    """Create a role and return its token."""
    status, output, _ = catbus("role", "create", *arguments)
    assert status == 0
    return output.strip()


def shown(output: str) -> list[dict[str, Any]]:
    """Return the roles in the lines of the output, without their times of creation."""
    roles = [json.loads(line) for line in output.splitlines()]
    for role in roles:
        assert list(role) == ["role", "client_id", "read", "write", "created"]
        assert CREATED.fullmatch(role.pop("created"))
    return roles


def test_new_token_is_the_only_text_on_stdout(catbus: Command, database: str) -> None:
    status, output, errors = catbus("role", "create", "--client-id", "ci", "-p", "read", "-p", "write", "a.*", "b")
    assert status == 0
    [token] = output.splitlines()
    handle = handle_of(token)
    assert errors.startswith(f"ci may read and write a.*, b; the token of the role {handle} is shown only once: ")
    assert token not in errors and errors.count("\n") == 1
    password = database.partition("catbus:")[2].partition("@")[0]
    assert not password or password not in errors
    expected = {"role": handle, "client_id": "ci", "read": ["a.*", "b"], "write": ["a.*", "b"]}
    for name in (token, handle, handle.upper()):
        status, output, errors = catbus("role", "show", name)
        assert (status, shown(output), errors) == (0, [expected], "")


def test_list_shows_all_roles(catbus: Command, database: str) -> None:
    assert catbus("role", "list") == (0, "", "")
    one = make(catbus, "--client-id", "one", "-p", "read", "a", "a")
    two = make(catbus)
    status, output, errors = catbus("role", "list")
    assert (status, errors) == (0, "")
    assert shown(output) == [
        {"role": handle_of(one), "client_id": "one", "read": ["a"], "write": []},
        {"role": handle_of(two), "client_id": None, "read": [], "write": []},
    ]


def test_role_is_deleted_once(catbus: Command, database: str) -> None:
    token = make(catbus, "-p", "read", "a.*")
    handle = handle_of(token)
    status, output, errors = catbus("role", "delete", token)
    assert (status, output) == (0, "")
    assert errors.startswith(f"deleted the role {handle}, which could read a.*; in ")
    assert catbus("role", "list").output == ""
    assert catbus("role", "delete", token) == (1, "", "catbus: no role has this token\n")
    assert catbus("role", "delete", handle) == (1, "", f"catbus: there is no role {handle}\n")


def test_grants_are_added_and_removed(catbus: Command, database: str) -> None:
    token = make(catbus, "--client-id", "ci", "-p", "read", "a.*")
    handle = handle_of(token)
    role = {"role": handle, "client_id": "ci"}
    status, output, errors = catbus("grant", "-p", "all", "a.b", "--to", handle)
    assert (status, errors) == (0, "")
    assert shown(output) == [{**role, "read": ["a.*", "a.b"], "write": ["a.b"]}]

    status, output, errors = catbus("revoke", "-p", "all", "a.b", "--from", token)
    assert status == 0
    assert shown(output) == [{**role, "read": ["a.*"], "write": []}]
    assert errors == f"the role {handle} may still read a.b, by its grant on a.*\n"

    status, output, errors = catbus("revoke", "-p", "write", "a.*", "--from", handle)
    assert (status, output) == (1, "")
    assert errors == f"catbus: the role {handle} has no such grant: write a.*; what it has: read a.*\n"


@pytest.mark.parametrize("name", ["ci", "0" * 11, make_role_token()[:-1]], ids=["name", "short", "cut token"])
def test_unknown_role_is_an_error(catbus: Command, database: str, name: str) -> None:
    for command in (
        ["role", "show", name],
        ["role", "delete", name],
        ["grant", "-p", "read", "a", "--to", name],
        ["revoke", "-p", "read", "a", "--from", name],
    ):
        status, output, errors = catbus(*command)
        assert (status, output) == (1, "")
        assert errors.startswith("catbus: a role is named by its token or by its handle")
        assert name not in errors.split()


def test_reading_does_not_migrate_the_schema(catbus: Command, empty_database_url: str) -> None:
    status, output, errors = catbus("role", "list", "--database", empty_database_url)
    assert (status, output) == (1, "")
    assert "`catbus init` brings its schema to this version" in errors and errors.count("\n") == 1
    make(catbus, "--database", empty_database_url)
    assert len(shown(catbus("role", "list", "--database", empty_database_url).output)) == 1


@pytest.mark.parametrize(
    ("taken", "left", "lines"),
    [
        (Grants(("a",)), Grants(("b", "a.*"), ("a",)), []),
        (Grants(("a.b.*",)), Grants(("a.*", "*")), ["may still read a.b.*, by its grant on a.*"]),
        (Grants(("a.*",)), Grants(("a.b",)), []),
        (Grants((), ("a", "b")), Grants((), ("*",)), [f"may still write {x}, by its grant on *" for x in "ab"]),
    ],
)
def test_revoke_reports_remaining_permissions(taken: Grants, left: Grants, lines: list[str]) -> None:
    assert still_allowed(taken, left) == lines


# The embedded database


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, postgres_server: str) -> Iterator[Path]:
    """A state directory that the unprivileged user of PostgreSQL can reach."""
    directory = Path(tempfile.mkdtemp(prefix="catbus-state-"))
    directory.chmod(0o711)
    monkeypatch.setenv("CATBUS_STATE", str(directory))
    yield directory
    shutil.rmtree(directory)


def test_role_in_the_embedded_database_works_immediately(
    catbus: Command, state: Path, start: Start, tmp_path: Path
) -> None:
    config = tmp_path / "catbus.toml"
    config.write_text("[drain]\ndelay = 0\nwindow = 0\n")
    options = ("--config", str(config), "--database", "embedded", "--ws-bind", "127.0.0.1:0")
    broker = start("run", *options, state=state)
    [url] = next_event(broker, "serving")["urls"]
    next_event(broker, "database connected")
    status, token, errors = catbus("role", "create", "--client-id", "ci", "-p", "read", "-p", "write", "demo.*")
    assert status == 0
    assert f"the embedded database in {state / 'postgres'}" in errors
    client = ["--url", url, "--token", token.strip()]
    assert catbus("pub", "demo.hello", "1", *client) == (0, '{"channel":"demo.hello","seq":1}\n', "")
    status, output, _ = catbus("sub", "demo.*", "--since", "0", "--count", "1", *client)
    assert (status, json.loads(output)["sender"]) == (0, "ci")
    assert catbus("init", "--database", "embedded") == (0, "embedded: the schema is up to date\n", "")

    assert catbus("revoke", "-p", "write", "demo.*", "--from", token.strip()).status == 0
    assert catbus("pub", "demo.hello", "1", *client).errors.endswith("(unauthorized)\n")
    assert catbus("role", "delete", token.strip()).status == 0
    assert catbus("pub", "demo.hello", "1", *client).errors.endswith("(unauthenticated)\n")
    assert broker.poll() is None
    broker.terminate()
    output, errors = broker.communicate(timeout=30)
    assert token.strip() not in output + errors


def test_embedded_database_is_started_without_a_broker(catbus: Command, state: Path) -> None:
    token = make(catbus, "--database", "embedded", "-p", "read", "a")
    assert embedded_server.running_url(state / "postgres") is None
    assert not (state / "postgres" / "cluster" / "data" / "postmaster.pid").exists()
    # An existing embedded database is found without being named.
    assert [role["role"] for role in shown(catbus("role", "list").output)] == [handle_of(token)]
    status, _, errors = catbus("role", "list", "--database", "memory")
    assert status == 1
    assert "there is no database" in errors


def test_named_database_overrides_the_embedded_one(catbus: Command, state: Path, database: str) -> None:
    (state / "postgres").mkdir()
    (state / "postgres" / "lock").touch()
    assert catbus("role", "list") == (0, "", "")
    assert not (state / "postgres" / "cluster").exists()
