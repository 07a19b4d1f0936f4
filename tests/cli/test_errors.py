"""Errors: one line on stderr, an exit status, and no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import click
import pytest

from catbus.cli import main_command
from catbus.cli.main_command import explain_error
from catbus.error_codes import ErrorCode
from catbus.errors import ConfigError, Disconnected, Refused

from .conftest import Command

TOKEN = ["--token", "sub-e30.AAAAAAAAAAAAAAAAAAAAAA"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "--nonsense"], "No such option"),
        (["run", "extra"], "unexpected extra argument"),
        (["grant", "a", "--client-id", "x"], "Missing option '-p'"),
        (["grant", "-p", "read", "--client-id", "x"], "Missing argument 'PATTERN...'"),
        (["grant", "-p", "read", "a"], "Missing option '--client-id'"),
        (["grant", "-p", "dance", "a", "--client-id", "x"], "'dance' is not one of"),
        (["grant", "-p", "read", "a.*.b", "--client-id", "x", "--secret", "s"], "'a.*.b'"),
        (["grant", "-p", "read", "a", "--client-id", " ", "--secret", "s"], "--client-id is empty"),
        (["grant", "-p", "read", "a", "--client-id", "x", "--secret", "s", "--expires", "soon"], 'found "soon"'),
        (["grant", "-p", "read", "a", "--client-id", "x", "--secret", "s", "--expires", "0s"], 'found "0s"'),
        (["grant", "-p", "read", "a", "--client-id", "x", "--secret", "s", "--expires", "9999999d"], "ten years"),
        (["grant", "-p", "read", "a", "--client-id", "x"], "set CATBUS_SECRET"),
        (["grant", "-p", "read", "a", "--client-id", "x", "--to", "0" * 12], "--client-id has no effect with --to"),
        (["grant", "-p", "read", "a", "--expires", "1h", "--to", "0" * 12], "--expires has no effect with --to"),
        (["grant", "-p", "read", "a", "--secret", "s", "--to", "0" * 12], "--secret has no effect with --to"),
        (["grant", "-p", "read", "a", "--client-id", "x", "--database", "memory"], "--database has no effect without"),
        (["role", "dance"], "No such command 'dance'"),
        (["role", "create", "a"], "give both a PATTERN and a permission"),
        (["role", "create", "-p", "read"], "give both a PATTERN and a permission"),
        (["role", "create", "-p", "read", "a.*.b"], "'a.*.b'"),
        (["role", "create", "--client-id", " "], "--client-id is empty"),
        (["role", "show"], "Missing argument 'ROLE'"),
        (["role", "delete"], "Missing argument 'ROLE'"),
        (["revoke", "-p", "read", "a"], "--from is missing"),
        (["revoke", "a", "--from", "0" * 12], "--permission is missing"),
        (["revoke", "-p", "read", "a..b", "--from", "0" * 12], "'a..b'"),
        (["pub", "a"], "Missing argument 'JSON|-'"),
        (["pub", "a..b", "1"], "a..b"),
        (["pub", "a", "hello"], "the payload is not JSON"),
        (["pub", "a", "1"], "give --token or set CATBUS_TOKEN"),
        (["pub", "a", "1", "--url", "http://127.0.0.1/"], "--url: the URL of a broker begins with ws://"),
        (["sub"], "Missing argument 'PATTERN...'"),
        (["sub", "*.a"], "*.a"),
        (["sub", "a"], "give --token or set CATBUS_TOKEN"),
        (["sub", "a", "--since", "-1"], "'--since'"),
        (["sub", "a", "--count", "0"], "'--count'"),
        (["sub", "a", "--epoch", "e"], "--epoch has no effect without --since"),
        (["status", "--url", "nonsense"], "--url: the URL of a broker begins with ws://"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(catbus: Command, arguments: list[str], part: str) -> None:
    status, output, errors = catbus(*arguments)
    assert status == 2
    assert not output
    [line] = errors.splitlines()
    assert line.startswith("catbus: ") and part in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "--config", "/absent.toml"], "/absent.toml: cannot be read: No such file"),
        (["run", "--ws-bind", "here"], "command line: websocket.bind: expected an address"),
        (["run", "--database", "mysql://me:hunter2@db"], 'command line: database.url: expected "embedded"'),
        (["run", "--log", "loud"], "command line: logging.levels: expected log levels"),
        (["run", "--database", "memory"], "there is no secret to verify tokens"),
        (["init", "--database", "memory"], "there is no database: set"),
        (["role", "list"], "there is no database: set DATABASE_URL"),
        (["role", "create", "--database", "memory"], "there is no database"),
        (["role", "list", "--config", "/absent.toml"], "/absent.toml"),
        (["role", "list", "--database", "postgres://me:hunter2@127.0.0.1:1/x"], "the database cannot be used"),
        (["grant", "-p", "read", "a", "--to", "0" * 12], "there is no database"),
        (["revoke", "-p", "read", "a", "--from", "0" * 12], "there is no database"),
        (["grant", "-p", "read", "a", "--client-id", "x", "--config", "/absent.toml"], "/absent.toml"),
        (["pub", "a", "1", "--url", "ws://127.0.0.1:1/ws", *TOKEN], "127.0.0.1:1"),
        (["sub", "a", "--url", "ws://127.0.0.1:1/ws", *TOKEN], "127.0.0.1:1"),
        (["status", "--url", "ws://127.0.0.1:1/ws"], "cannot reach a broker at ws://127.0.0.1:1/ws"),
    ],
)
def test_failure_exits_with_1_and_one_line(catbus: Command, arguments: list[str], part: str) -> None:
    status, output, errors = catbus(*arguments)
    assert status == 1
    assert not output
    [line] = errors.splitlines()
    assert line.startswith("catbus: ") and part in line
    assert "hunter2" not in line


STRONG = "q7Lw2pT5rYb8nHd1mKc4sJf6g0aEuXzV"


@pytest.mark.parametrize(
    ("variables", "arguments", "parts"),
    [
        ({"SECRET": STRONG}, [], ["no database is set", "DATABASE_URL", "--database memory"]),
        ({"SECRET": STRONG, "CERT": "c", "KEY": "k", "WS_BIND": "127.0.0.1:0"}, [], ["no database is set"]),
        ({"SECRET": "abc"}, ["--database", "memory"], ["the secret has fewer than 32 bytes", "openssl rand -hex 32"]),
        ({"SECRET": f"{STRONG},short-secret-of-before"}, ["--database", "memory"], ["secret 2 has fewer than 32"]),
        ({"SECRET": STRONG, "ADMIN_KEY": "root"}, ["--database", "memory"], ["the admin key has fewer than 32 bytes"]),
        ({"SECRET": "changeme" * 5}, ["--database", "embedded"], ["the secret repeats the same characters"]),
    ],
)
def test_reachable_broker_without_secret_or_database_does_not_start(
    catbus: Command,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: list[str],
    parts: list[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"CATBUS_{name}", value)
    status, output, errors = catbus("run", *arguments)
    assert (status, output) == (1, "")
    [line] = errors.splitlines()
    for part in parts:
        assert part in line
    for value in variables.values():
        assert len(value) < 10 or value not in line


def test_error_in_a_file_names_the_file_and_the_key(catbus: Command, tmp_path: Path) -> None:
    path = tmp_path / "catbus.toml"
    path.write_text("[limits]\nmessage_size = true\n")
    status, _, errors = catbus("run", "--config", str(path))
    assert status == 1
    assert errors == (
        f"catbus: {path}: [limits] message_size: expected a size above 0: bytes, or text like "
        '"64KiB" or "1MiB", found true\n'
    )


def test_address_in_use_is_named(catbus: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, _, errors = catbus("run", "--database", "memory", "--ws-bind", address)
    assert (status, errors) == (1, f"catbus: cannot listen on {address}: Address already in use\n")


def test_debug_option_shows_the_traceback(catbus: Command) -> None:
    status, _, errors = catbus("--debug", "run", "--config", "/absent.toml")
    assert status == 1
    assert "Traceback" in errors and errors.splitlines()[-1].startswith("catbus: /absent.toml")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["run", "--help"], ["sub", "-h"], ["role"], ["role", "create", "-h"], ["--version"]]
)
def test_help_exits_with_0(catbus: Command, arguments: list[str]) -> None:
    status, output, errors = catbus(*arguments)
    assert status == 0
    assert output and not errors


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt()])])
def test_interruption_prints_nothing(catbus: Command, monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    @click.command()
    def command() -> None:
        raise raised

    monkeypatch.setattr(main_command.catbus, "get_command", lambda *_: command)
    status, output, errors = catbus("run")
    # click ends the line with ^C on a terminal.
    assert (status, output, errors.strip()) == (130, "", "")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("wrong\n  in two lines"), 1, "wrong in two lines"),
        (Refused(ErrorCode.UNAUTHORIZED, "no"), 1, "no (unauthorized)"),
        (ExceptionGroup("", [ExceptionGroup("", [OSError(98, "in use"), Disconnected("gone")])]), 1, "gone"),
        (ExceptionGroup("", [ValueError("odd"), FileNotFoundError(2, "absent", "/there")]), 1, "/there: absent"),
        (BaseExceptionGroup("", [ValueError(), KeyboardInterrupt()]), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, "the output was closed by its reader"),
        (KeyError("x"), 1, "internal error: KeyError: 'x' (run it with catbus --debug for the traceback)"),
        (ConfigError("postgres://me:hunter2@db is odd"), 1, "postgres://me:***@db is odd"),
        (click.UsageError("Odd."), 2, "Odd."),
        (click.ClickException("odd"), 1, "odd"),
    ],
)
def test_every_error_becomes_one_line(error: BaseException, status: int, text: str) -> None:
    assert explain_error(error) == (status, text)
