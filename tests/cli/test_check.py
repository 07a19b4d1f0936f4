"""`catbus check`: each check, with a good and a bad value."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio
import trustme

from catbus.cli.commands import check
from catbus.config import DatabaseSettings
from catbus.postgres.access import database_checks
from catbus.postgres.access.database_checks import CheckResult, check_database
from catbus.postgres.access.migrations import init
from tests.cli.conftest import Command, Start, next_event
from tests.postgres.bouncer import open_bouncer
from tests.postgres.server import execute, to_database
from tests.postgres.sql import open_sql

SECRET = "a secret that is long enough and has words of its own"

Found = dict[str, tuple[str, str, str]]
"""The results by name: level, text, advice."""


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_SECRET", SECRET)
    monkeypatch.setenv("CATBUS_WS_BIND", "127.0.0.1:0")
    monkeypatch.setenv("CATBUS_BIND", "127.0.0.1:0")


def run(catbus: Command, *options: str) -> tuple[object, Found]:
    status, output, errors = catbus("check", "--json", *options)
    assert errors == ""
    found = [json.loads(line) for line in output.splitlines()]
    return status, {each["name"]: (each["level"], each["text"], each["advice"]) for each in found}


def test_good_database_has_no_errors(catbus: Command, database_url: str) -> None:
    status, found = run(catbus, "--database", database_url)
    assert {name: level for name, (level, _, _) in found.items() if level != "ok"} == {"durability": "warning"}
    assert status == 0
    assert {"configuration", "secret", "certificate", "port", "database", "encryption", "schema"} <= set(found)
    assert "an address: 5,000 of 10,000 connections; trusted proxies: none" in found["limits"][1]
    assert found["notifications"][1].startswith("they come through database.url (0.")
    assert "fsync is off" in found["durability"][1]  # the tests' own server
    assert run(catbus, "--database", database_url, "--strict")[0] == 1


def test_text_output_has_a_line_per_result_and_the_advice_below(catbus: Command) -> None:
    status, output, _ = catbus("check")
    assert status == 0
    assert output.startswith("ok       configuration  no file, and the environment\n")
    assert output.endswith(
        "warning  database       in memory: the log ends with the process, and replicas cannot share it\n"
        "                        set DATABASE_URL to keep the log\n"
    )


def test_unreadable_configuration_is_an_error(catbus: Command, tmp_path: Path) -> None:
    file = tmp_path / "catbus.toml"
    file.write_text("[database]\nulr = 'memory'\n")
    status, found = run(catbus, "--config", str(file))
    assert (status, set(found)) == (1, {"configuration"})
    assert 'did you mean "url"?' in found["configuration"][1]


def test_settings_have_sources_and_misspelt_variables_are_reported(
    catbus: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATBUS_LIMITS_CONECTIONS", "5")
    status, output, _ = catbus("check", "--database", "memory", "--strict")
    assert status == 1
    assert 'ok       setting        database.url = "memory" (command line)\n' in output
    assert 'ok       setting        websocket.bind = ["127.0.0.1:0"] (CATBUS_WS_BIND)\n' in output
    assert 'ok       setting        auth.secret = "***" (CATBUS_SECRET)\n' in output
    assert "warning  environment    CATBUS_LIMITS_CONECTIONS is not a known variable" in output
    assert "(did you mean CATBUS_LIMITS_CONNECTIONS?)" in output
    assert SECRET not in output


def test_log_in_memory_must_be_chosen_for_a_reachable_broker(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(catbus)[1]["database"][0] == "warning"
    monkeypatch.setenv("CATBUS_WS_BIND", "0.0.0.0:0")
    status, found = run(catbus)
    assert (status, found["database"][0]) == (1, "error")
    assert "or to memory if that is intended" in found["database"][2]
    status, found = run(catbus, "--database", "memory")
    assert (status, found["database"][0]) == (0, "warning")


def test_missing_and_weak_secrets_are_reported(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_SECRET", "short")
    level, text, advice = run(catbus)[1]["secret"]
    assert (level, text) == ("warning", "the secret has fewer than 32 bytes")
    assert "openssl rand -hex 32" in advice
    monkeypatch.setenv("CATBUS_WS_BIND", "0.0.0.0:0")
    assert run(catbus, "--database", "memory")[0] == 1
    monkeypatch.setenv("CATBUS_AUTH_ALLOW_WEAK_SECRETS", "true")
    assert run(catbus, "--database", "memory")[0] == 0
    monkeypatch.setenv("CATBUS_SECRET", SECRET)
    monkeypatch.setenv("CATBUS_ADMIN_KEY", "short")
    assert run(catbus)[1]["secret"][:2] == ("warning", "the admin key has fewer than 32 bytes")
    for name in ("CATBUS_ADMIN_KEY", "CATBUS_AUTH_ALLOW_WEAK_SECRETS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("CATBUS_WS_BIND", "127.0.0.1:0")
    monkeypatch.delenv("CATBUS_SECRET")
    assert run(catbus)[1]["secret"][:2] == ("ok", "the broker creates one, because only this machine can reach it")
    monkeypatch.setenv("CATBUS_WS_BIND", "0.0.0.0:0")
    status, found = run(catbus)
    assert (status, found["secret"][0]) == (1, "error")
    assert "openssl rand -hex 32" in found["secret"][2]


NOW = datetime.now(UTC)
CERTIFICATES = {
    "good": (
        (NOW - timedelta(days=1), NOW + timedelta(days=90)),
        ("a.example.com",),
        "ok",
        "for a.example.com, valid until",
    ),
    "old": ((NOW - timedelta(days=9), NOW - timedelta(days=1)), ("a.example.com",), "error", "expired"),
    "young": ((NOW + timedelta(days=1), NOW + timedelta(days=9)), ("a.example.com",), "error", "not valid yet"),
    "due": ((NOW - timedelta(days=1), NOW + timedelta(days=9)), ("a.example.com",), "warning", "until"),
}


@pytest.mark.parametrize("kind", CERTIFICATES)
def test_certificate_results_depend_on_dates_and_names(
    catbus: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    (begins, ends), names, level, text = CERTIFICATES[kind]
    issued = trustme.CA().issue_cert(*names, not_before=begins, not_after=ends)
    issued.private_key_pem.write_to_path(tmp_path / "key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    monkeypatch.setenv("CATBUS_CERT", str(tmp_path / "cert"))
    monkeypatch.setenv("CATBUS_KEY", str(tmp_path / "key"))
    found = run(catbus)[1]["certificate"]
    assert found[0] == level
    assert text in found[1]


def test_unusable_certificate_files_are_errors(
    catbus: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CATBUS_CERT", str(tmp_path / "cert"))
    monkeypatch.setenv("CATBUS_KEY", str(tmp_path / "key"))
    status, found = run(catbus)
    assert (status, found["certificate"][0]) == (1, "error")
    assert "No such file" in found["certificate"][1]
    for name in ("CATBUS_CERT", "CATBUS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("CATBUS_BIND", "0.0.0.0:0")
    assert run(catbus)[1]["certificate"][0] == "warning"


def test_port_in_use_is_reported(
    catbus: Command, monkeypatch: pytest.MonkeyPatch, start: Start, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("CATBUS_WS_BIND", f"127.0.0.1:{other.getsockname()[1]}")
        monkeypatch.setattr(check, "HEALTH_REQUEST_TIMEOUT", 0.1)
        status, output, _ = catbus("check")
    assert status == 1
    assert "is in use by another program" in output
    config = tmp_path / "catbus.toml"
    config.write_text("[webtransport]\nbind = []\n")
    process = start("run", "--config", str(config), "--database", "memory", "--ws-bind", "127.0.0.1:0")
    [url] = next_event(process, "serving")["urls"]
    monkeypatch.setenv("CATBUS_WS_BIND", urlsplit(url).netloc)
    monkeypatch.delenv("CATBUS_BIND")
    status, found = run(catbus, "--config", str(config))
    assert (status, found["port"][0]) == (0, "ok")
    assert found["port"][1].endswith("a broker is already running there")


def test_port_of_a_running_broker_with_tls_is_no_error(
    catbus: Command, monkeypatch: pytest.MonkeyPatch, start: Start, tmp_path: Path
) -> None:
    config = tmp_path / "catbus.toml"
    config.write_text("[websocket]\ntls = true\n[webtransport]\nbind = []\n")
    process = start("run", "--config", str(config), "--database", "memory", "--ws-bind", "127.0.0.1:0")
    [url] = next_event(process, "serving")["urls"]
    monkeypatch.setenv("CATBUS_WS_BIND", urlsplit(url).netloc)
    monkeypatch.delenv("CATBUS_BIND")
    status, found = run(catbus, "--config", str(config))
    assert (status, found["port"][0]) == (0, "ok")
    assert found["port"][1].endswith("a broker is already running there")


UNREACHABLE = {
    "postgres://u:hidden-password@127.0.0.1:1/d": ("Connect call failed", "is PostgreSQL running there"),
    "postgres://u:hidden-password@nowhere.invalid/d": ("", "check the host in the URL"),
    "postgres://u:hidden-password@127.0.0.1:1/d?sslmode=perhaps": ("sslmode", ""),
}


@pytest.mark.parametrize("url", UNREACHABLE)
def test_unreachable_database_is_an_error(catbus: Command, url: str) -> None:
    said, advice = UNREACHABLE[url]
    status, found = run(catbus, "--database", url)
    level, text, told = found["database"]
    assert (status, level) == (1, "error")
    assert said in text
    assert advice in told
    assert "hidden-password" not in str(found)


def test_wrong_password_is_an_error(catbus: Command, database_url: str) -> None:
    parts = urlsplit(database_url)
    assert parts.password
    status, found = run(catbus, "--database", database_url.replace(parts.password, "wrong"))
    assert (status, found["database"][2]) == (1, "check user and password in the URL")


def test_schema_version_is_reported(catbus: Command, database_url: str) -> None:
    execute(database_url, "DROP SCHEMA catbus CASCADE")
    assert "none yet" in run(catbus, "--database", database_url)[1]["schema"][1]
    trio.run(init, DatabaseSettings(url=database_url))
    assert run(catbus, "--database", database_url)[1]["schema"][1].startswith("version ")
    execute(database_url, "UPDATE catbus.schema_version SET version = 999")
    status, found = run(catbus, "--database", database_url)
    assert (status, found["schema"][0], found["schema"][2]) == (1, "error", "upgrade Catbus")


def test_weaker_durability_settings_are_reported(catbus: Command, database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "catbus.toml"
    file.write_text(f'[database]\nurl = "{database_url}"\nfailover = "lossless"\n')
    status, found = run(catbus, "--config", str(file))
    assert (status, found["failover"][0]) == (1, "error")


SETTINGS = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "standard_conforming_strings": "off",
    "statement_timeout": "20",
}


@pytest.fixture
def altered_database_url(database_url: str) -> str:
    name = urlsplit(database_url).path[1:]
    execute(
        to_database(database_url, "postgres"),
        *[f"ALTER DATABASE \"{name}\" SET {setting} = '{value}'" for setting, value in SETTINGS.items()],
    )
    return database_url


def test_settings_of_the_database_are_overridden(catbus: Command, altered_database_url: str) -> None:
    status, found = run(catbus, "--database", altered_database_url)
    assert status == 0
    assert not {"settings", "writing"} & set(found)


async def test_settings_that_a_pooler_cannot_override_are_reported(altered_database_url: str) -> None:
    async def find() -> dict[str, CheckResult]:
        findings: list[CheckResult] = []
        async with open_bouncer(altered_database_url) as bouncer:
            await check_database(DatabaseSettings(url=bouncer.url), findings.append)
        return {finding.name: finding for finding in findings}

    found = (await find())["settings"]
    assert (found.level, found.text.partition(",")[0]) == ("error", "statement_timeout is 20 ms")
    async with open_sql(altered_database_url) as sql:
        await sql.execute(found.advice)
    assert "settings" not in await find()


@pytest.fixture
def outsider(database_url: str) -> Iterator[str]:
    """The URL of a user who may only connect."""
    execute(database_url, "DROP ROLE IF EXISTS outsider", "CREATE ROLE outsider LOGIN PASSWORD 'outsider'")
    parts = urlsplit(database_url)
    yield database_url.replace(f"{parts.username}:{parts.password}@", "outsider:outsider@")
    execute(database_url, "DROP ROLE outsider")


def test_user_without_privileges_is_an_error(catbus: Command, database_url: str, outsider: str) -> None:
    status, found = run(catbus, "--database", outsider)
    assert (status, found["schema"][:2]) == (1, ("error", "the schema catbus belongs to another user"))
    execute(database_url, "DROP SCHEMA catbus CASCADE")
    status, found = run(catbus, "--database", outsider)
    assert (status, found["schema"][0]) == (1, "error")
    assert "GRANT CREATE" in found["schema"][2]


async def test_notifications_through_a_pooler_are_checked(database_url: str, tmp_path: Path) -> None:
    async def look(listen_url: str | None) -> database_checks.CheckResult:
        found: list[database_checks.CheckResult] = []
        await database_checks.check_database(DatabaseSettings(url=bouncer.url, listen_url=listen_url), found.append)
        return {finding.name: finding for finding in found}["notifications"]

    async with open_bouncer(database_url) as bouncer:
        assert (await look(None)).level == "warning"
        assert "CATBUS_LISTEN_URL" in (await look(None)).advice
        assert (await look(database_url)).level == "ok"
        assert "leads to a pooler too" in (await look(bouncer.url)).text
        elsewhere = await look(to_database(database_url, "postgres"))
        assert (elsewhere.level, elsewhere.text.endswith("another database than database.url")) == ("error", True)
        gone = await look("postgres://u:p@127.0.0.1:1/d")
        assert (gone.level, "cannot be reached" in gone.text) == ("error", True)
