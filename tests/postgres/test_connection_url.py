"""Database URLs: each parameter, and the environment variables."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.errors import ConfigError
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, open_bridge
from catbus.postgres.access.connection_url import ENVIRONMENT_VARIABLES, PARAMETERS, ConnectionTarget, find_targets
from catbus.postgres.access.database_checks import CheckResult, check_database
from tests.postgres.proxy import open_proxy
from tests.postgres.server import make_directory
from tests.postgres.sql import open_sql

DOCUMENT = Path(__file__).parents[2] / "docs" / "database-url.md"

LIBPQ = """
host hostaddr port dbname user password passfile require_auth channel_binding connect_timeout client_encoding options
application_name fallback_application_name keepalives keepalives_idle keepalives_interval keepalives_count
tcp_user_timeout replication gssencmode sslmode requiressl sslnegotiation sslcompression sslcert sslkey sslkeylogfile
sslpassword sslcertmode sslrootcert sslcrl sslcrldir sslsni requirepeer ssl_min_protocol_version
ssl_max_protocol_version min_protocol_version max_protocol_version krbsrvname gsslib gssdelegation scram_client_key
scram_server_key service servicefile target_session_attrs load_balance_hosts oauth_issuer oauth_client_id
oauth_client_secret oauth_scope
"""
"""The parameters that PostgreSQL 18 documents in section 34.1.2."""


def targets(url: str, environ: Mapping[str, str] = {}) -> list[ConnectionTarget]:
    return find_targets(url, environ)


def only(url: str, environ: Mapping[str, str] = {}) -> Mapping[str, Any]:
    [target] = targets(url, environ)
    return target.arguments


def complaint(url: str, environ: Mapping[str, str] = {}) -> str:
    with pytest.raises(ConfigError) as caught:
        find_targets(url, environ)
    return str(caught.value)


# Parsing


def test_url_parts_are_parsed() -> None:
    found = only("postgres://me:sesame@db.example.com:6432/bus?application_name=x")
    wanted = {"host": "db.example.com", "port": 6432, "user": "me", "password": "sesame", "database": "bus"}
    assert {name: found[name] for name in wanted} == wanted
    assert found["server_settings"] == {"application_name": "x"}
    assert only("postgresql://me@h")["database"] == "me"
    assert only("postgres://me@h")["server_settings"] == {"application_name": "catbus"}
    assert only("postgres://me@h?fallback_application_name=y")["server_settings"] == {"application_name": "y"}


def test_escapes_are_decoded_as_libpq_decodes_them() -> None:
    found = only("postgres://m%40e:p%2Fa%3F%23%25@%2Frun%2Fdb:6000/b%C3%A9+s")
    assert (found["user"], found["password"], found["host"]) == ("m@e", "p/a?#%", "/run/db")
    assert (found["port"], found["database"]) == (6000, "bé+s")
    assert only("postgres://h?user=a%20b&password=c+d%3De=f")["user"] == "a b"
    assert only("postgres://h?user=a&password=c+d%3De=f")["password"] == "c+d=e=f"
    # Characters that are unambiguous without an escape are accepted.
    assert only("postgres://me:p@ss:w@h/x")["password"] == "p@ss:w"


def test_several_hosts_are_tried_in_order() -> None:
    found = targets("postgres://me@one:1,[::1]:2,three/x")
    assert [(t.arguments["host"], t.arguments["port"]) for t in found] == [("one", 1), ("::1", 2), ("three", 5432)]
    assert {t.arguments["target_session_attrs"] for t in found} == {"primary"}
    found = targets("postgres://me@/x?host=one,two&port=7&target_session_attrs=any")
    assert [(t.arguments["host"], t.arguments["port"]) for t in found] == [("one", 7), ("two", 7)]
    assert {t.arguments["target_session_attrs"] for t in found} == {"any"}
    assert only("postgres://me@h")["target_session_attrs"] == "any"
    assert "2 for 3 hosts" in complaint("postgres://me@/x?host=a,b,c&port=1,2")
    orders = {tuple(t.arguments["host"] for t in targets("postgres://a,b,c?load_balance_hosts=random"))} | {
        tuple(t.arguments["host"] for t in targets("postgres://a,b,c?load_balance_hosts=random")) for _ in range(100)
    }
    assert len(orders) > 1


def test_parameter_replaces_the_part_before_the_query() -> None:
    found = only("postgres://me:a@h:1/x?host=/run&port=2&user=you&password=b&dbname=y")
    assert [found[name] for name in ("host", "port", "user", "password", "database")] == ["/run", 2, "you", "b", "y"]
    assert only("postgres://h/x?database=z")["database"] == "z"


def test_every_libpq_parameter_is_known() -> None:
    assert PARAMETERS.keys() - {"database", "ssl"} == set(LIBPQ.split())


@pytest.mark.parametrize("name", LIBPQ.split())
def test_each_parameter_is_applied_or_rejected_by_name(name: str, tmp_path: Path) -> None:
    parameter = PARAMETERS[name]
    for value in parameter.values or ():
        others = {"sslmode": "require", "sslrootcert": __file__} if value == "direct" else {"sslmode": "disable"}
        extra = "" if name == "sslmode" else f"&sslmode={others['sslmode']}"
        if not value.startswith("verify"):
            targets(f"postgres://me@h/x?{name}={value}{extra}")
    if parameter.values is not None:
        text = complaint(f"postgres://me:sesame@h/x?{name}=hunter2")
        assert text.startswith(f"{name}: ")
        assert "hunter2" not in text
        assert "sesame" not in text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sslmod", "sslmode"),
        ("SSLMODE", "sslmode"),
        ("ssl_root_cert", "sslrootcert"),
        ("channel_bindings", "channel_binding"),
        ("search_path", None),
        ("pgbouncer", None),
    ],
)
def test_unknown_parameter_is_an_error_with_a_suggestion(written: str, meant: str | None) -> None:
    text = complaint(f"postgres://me:sesame@h/x?{written}=require")
    assert written in text
    assert "options=-c%20" in text
    assert ("did you mean" in text) is (meant is not None)
    assert meant is None or f'did you mean "{meant}"?' in text
    assert "sesame" not in text


@pytest.mark.parametrize(
    "url",
    [
        "postgres://me:hunter/2@h/x",
        "postgres://me:12345/hunter2@h/x",
        "postgres://me:12345?hunter2=1@h/x",
        "postgres://me:hunter2?a@h/x",
        "postgres://me:hunter2%@h/x",
        "postgres://me:hunter2%zz@h/x",
        "postgres://me:hunter2%ff@h/x",
        "postgres://me:x@h:hunter2/x",
        "postgres://me:x@h/x?password=hunter2&sslmode",
        "postgres://me:x@h/x?sslpassword=hunter2&port=hunter2",
        "postgres://me:x@h/x?connect_timeout=hunter2",
        "postgres://me:x@h/x?oauth_client_secret=hunter2",
        "postgres://me:hunter2@h:99999/x",
        "postgres://me:x@h/x?sslcert=/no/such&sslpassword=hunter2&sslmode=require",
    ],
)
def test_errors_show_no_password(url: str) -> None:
    text = complaint(url)
    assert "hunter" not in text
    assert "12345" not in text


def test_password_file_supplies_the_password(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("# comment\nother:*:*:*:no\nh:6000:x:me:w\\:rong\\\\\nlocalhost:*:*:me:socket\n*:*:*:me:any\n")
    file.chmod(0o600)
    url = f"postgres://me@h:6000/x?passfile={file}"
    assert only(url)["password"] == "w:rong\\"
    assert only(url.replace("6000", "6001"))["password"] == "any"
    assert only(f"postgres://me@%2Frun/x?passfile={file}")["password"] == "socket"
    assert only(url.replace("me@", "you@"))["password"] == ""
    assert only(url.replace("me@", "me:mine@"))["password"] == "mine"
    file.chmod(0o640)
    assert "chmod 600" in complaint(url)
    assert "No such file" in complaint("postgres://me@h/x?passfile=/no/such")


# The environment


def test_environment_variables_supply_what_the_url_omits(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("*:*:*:*:filed\n")
    file.chmod(0o600)
    environ = {"PGHOST": "h,i", "PGPORT": "7", "PGUSER": "u", "PGDATABASE": "d", "PGPASSWORD": "p"}
    found = [t.arguments for t in targets("postgres://", environ)]
    assert [(a["host"], a["port"], a["user"], a["database"], a["password"]) for a in found] == [
        ("h", 7, "u", "d", "p"),
        ("i", 7, "u", "d", "p"),
    ]
    assert only("postgres://me:mine@g:8/x", environ)["password"] == "mine"
    assert only("postgres://me@g", {"PGPASSFILE": str(file)})["password"] == "filed"
    assert targets("postgres://me@g", {"PGSSLMODE": "disable"})[0].ways == [False]
    assert complaint("postgres://me@g", {"PGSSLMODE": "sometimes"}).startswith("PGSSLMODE: ")
    assert "sslrootcert" in complaint("postgres://me@g?sslmode=verify-ca")


@pytest.fixture
def shared_state() -> Iterator[Path]:
    """A broker's directory that any user can own. The directories of pytest are closed to other users."""
    path = make_directory()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def closed_home() -> Iterator[Path]:
    """A home like root's, which other users cannot read."""
    with tempfile.TemporaryDirectory(prefix="catbus-home-") as home:
        (Path(home) / ".postgresql").mkdir()
        yield Path(home)


WRONG = {
    **dict.fromkeys(ENVIRONMENT_VARIABLES.values(), "wrong"),
    "PGPORT": "1",
    "PGSSLMODE": "verify-full",
    "PGCHANNELBINDING": "require",
    "PGREQUIREAUTH": "none",
    "PGOPTIONS": "-c nonsense=1",
    "PGSERVICE": "nobody",
    "PGSERVICEFILE": "/no/such",
    "PGTARGETSESSIONATTRS": "standby",
    "PGSSLNEGOTIATION": "direct",
    "PGSSLMINPROTOCOLVERSION": "TLSv9",
    "PGSSLMAXPROTOCOLVERSION": "TLSv9",
    "PGGSSENCMODE": "require",
    "PGGSSLIB": "wrong",
    "PGKRBSRVNAME": "wrong",
    "PGCLIENTENCODING": "LATIN1",
    "PGTZ": "Nowhere/Nowhere",
    "PGDATESTYLE": "wrong",
    "PGGEQO": "wrong",
    "PGAPPNAME": "wrong",
    "PGCONNECT_TIMEOUT": "wrong",
    "PGHOSTADDR": "192.0.2.1",
    "PGDATA": "/no/such",
    "PGSYSCONFDIR": "/no/such",
    "PGLOCALEDIR": "/no/such",
    "PGSSLCERTMODE": "require",
    "PGREQUIREPEER": "nobody",
    "PGLOADBALANCEHOSTS": "wrong",
    "PGMINPROTOCOLVERSION": "3.2",
    "PGMAXPROTOCOLVERSION": "wrong",
    "PGSSLSNI": "0",
    "PGSSLCRLDIR": "/no/such",
    "PGSSLCOMPRESSION": "1",
    "PGREPLICATION": "true",
    "SSLKEYLOGFILE": "/no/such/file",
}
"""All variables of libpq, each with a wrong value."""

BECOME = """
import os, sys, encodings.idna, trio
from catbus import Config
from catbus.broker import open_broker
from catbus.config import DatabaseSettings
from catbus.postgres.access.asyncpg_bridge import open_bridge
from catbus.postgres.access.migrations import schema_files

async def serve(state):
    async with open_broker(Config(state=state, database=DatabaseSettings(url="embedded"))) as broker:
        print(await broker.publish("a", 1))

async def connect(url):
    async with open_bridge() as bridge:
        with await bridge.connect(url) as connection:
            print(*await connection.fetchrow("SELECT 1"))

# The interpreter itself may be where only root can get, so that it becomes another user when all is loaded.
schema_files()
if sys.argv[1] == "another":
    os.setgroups([])
    os.setgid(65_534)
    os.setuid(65_534)
trio.run(*{"serve": [serve], "connect": [connect]}[sys.argv[2]], sys.argv[3])
"""


async def play(user: str, work: str, argument: object, environ: Mapping[str, str]) -> str:
    """The output of a process that serves an embedded database in a directory, or connects to a URL."""
    with trio.fail_after(60):
        done = await trio.run_process(
            [sys.executable, "-c", BECOME, user, work, str(argument)],
            env={**environ, "PATH": os.environ["PATH"]},
            cwd="/",
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return (done.stdout or done.stderr).decode().strip()


async def test_environment_variables_do_not_reach_the_embedded_server(shared_state: Path) -> None:
    assert await play("same", "serve", shared_state, WRONG) == "1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
async def test_embedded_server_works_with_the_home_of_another_user(shared_state: Path, closed_home: Path) -> None:
    os.chown(shared_state, 65_534, 65_534)
    assert await play("another", "serve", shared_state, {"HOME": str(closed_home)}) == "1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("mode", ["disable", "prefer"])
async def test_tcp_server_works_with_the_home_of_another_user(database_url: str, closed_home: Path, mode: str) -> None:
    async with open_proxy(database_url) as proxy:
        url = proxy.url.replace("sslmode=disable", f"sslmode={mode}")
        assert await play("another", "connect", url, {"HOME": str(closed_home)}) == "1"


# Connecting


async def test_next_host_is_tried_when_one_is_unreachable(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:
        parts = urlsplit(proxy.url)
        login, _, place = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{login}@127.0.0.1:1,{place}").geturl()
        async with open_sql(url) as connection:
            assert await connection.fetchrow("SELECT 1") == (1,)


async def test_silent_host_takes_only_its_share_of_the_timeout(database_url: str) -> None:
    async with open_proxy(database_url) as silent, open_proxy(database_url) as proxy, open_bridge() as bridge:
        silent.block()
        parts = urlsplit(proxy.url)
        login, _, place = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{login}@{urlsplit(silent.url).netloc.rpartition('@')[2]},{place}").geturl()
        with await bridge.connect(url, 4.0) as connection:
            assert await connection.fetchrow("SELECT 1") == (1,)
        silent_alone = f"{silent.url}&connect_timeout=1"
        with pytest.raises(TimeoutError, match="within 1 s"):
            await bridge.connect(silent_alone, 30.0)


async def test_wrong_password_is_not_tried_on_other_hosts(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        parts = urlsplit(proxy.url)
        user, place = parts.username, parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=f"{user}:wrong@{place},{place}").geturl().replace("=disable", "=prefer")
        with pytest.raises(DATABASE_ERRORS, match="password authentication failed"):
            await bridge.connect(url)


async def test_error_names_the_wrong_setting(database_url: str) -> None:
    async with open_bridge() as bridge:
        with pytest.raises(ConfigError, match=r"^\[database\] listen_url: channel_binding: leave it out"):
            await bridge.connect("postgres://h?channel_binding=require", setting="listen_url")
    found: list[CheckResult] = []
    await check_database(DatabaseSettings(url="postgres://me:sesame@h/x?sslmod=require"), found.append)
    assert 'did you mean "sslmode"' in found[0].text
    assert "sesame" not in str(found)
    found.clear()
    await check_database(
        DatabaseSettings(url=database_url, listen_url="postgres://me:sesame@h/x?channel_binding=require"), found.append
    )
    assert "cannot be reached: channel_binding: leave it out" in found[-1].text
    assert "sesame" not in str(found)


async def test_options_and_client_encoding_reach_the_server(database_url: str) -> None:
    async with open_sql(f"{database_url}&options=-c%20maintenance_work_mem%3D9MB&client_encoding=auto") as connection:
        assert await connection.fetchrow("SHOW maintenance_work_mem") == ("9MB",)


def test_document_lists_all_parameters_and_variables() -> None:
    text = DOCUMENT.read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    for name, parameter in PARAMETERS.items():
        values = "any" if parameter.values is None else ", ".join(f"`{v}`" for v in parameter.values) or "none"
        assert rows.get(name) == f"{values} | {parameter.text}", name
    assert set(re.findall(r"`(PG\w+)`", text)) >= set(ENVIRONMENT_VARIABLES.values())
