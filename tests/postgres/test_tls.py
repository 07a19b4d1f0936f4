"""TLS to PostgreSQL with libpq's parameters in the URL.

The wheel's PostgreSQL is built without TLS, so PgBouncer terminates TLS here; for a client both are the same.
"""

from __future__ import annotations

import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
import trustme

from catbus.config import DatabaseSettings
from catbus.errors import ConfigError
from catbus.log import Committed
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, open_bridge
from tests.log.harness import running
from tests.postgres.bouncer import open_bouncer


class Server:
    """A TLS server on 127.0.0.1. `authority` has signed its certificate, and `stranger` has not."""

    def __init__(self, directory: Path) -> None:
        authority, stranger = trustme.CA(), trustme.CA()
        self.authority, self.stranger = directory / "authority.crt", directory / "stranger.crt"
        authority.cert_pem.write_to_path(self.authority)
        stranger.cert_pem.write_to_path(self.stranger)
        self.certificate = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes()
        self.address = ""

    def url(self, host: str = "127.0.0.1", **parameters: object) -> str:
        parts = urlsplit(self.address)
        login = f"{parts.username}:{parts.password}"
        return parts._replace(netloc=f"{login}@{host}:{parts.port}", query=urlencode(parameters)).geturl()


@pytest.fixture
async def server(database_url: str, tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    async with open_bouncer(database_url, certificate=server.certificate) as bouncer:
        server.address = bouncer.url
        yield server


async def is_encrypted(url: str) -> bool:
    async with open_bridge() as bridge:
        with await bridge.connect(url) as connection:
            assert tuple(await connection.fetchrow("SELECT 1")) == (1,)
            return connection.encrypted


async def test_connection_has_the_encryption_that_sslmode_requires(server: Server) -> None:
    with pytest.raises(DATABASE_ERRORS, match="SSL required"):
        await is_encrypted(server.url(sslmode="disable"))
    assert await is_encrypted(server.url(sslmode="require"))
    assert await is_encrypted(server.url(sslmode="verify-ca", sslrootcert=server.authority))
    assert await is_encrypted(server.url(sslmode="verify-full", sslrootcert=server.authority))


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_server_certified_by_another_authority_is_rejected(server: Server, mode: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await is_encrypted(server.url(sslmode=mode, sslrootcert=server.stranger))


async def test_only_verify_full_checks_the_name(server: Server) -> None:
    assert await is_encrypted(server.url("localhost", sslmode="verify-ca", sslrootcert=server.authority))
    with pytest.raises(ssl.SSLCertVerificationError, match="localhost"):
        await is_encrypted(server.url("localhost", sslmode="verify-full", sslrootcert=server.authority))


async def test_server_without_tls_is_rejected_where_it_is_required(database_url: str) -> None:
    async with open_bouncer(database_url) as bouncer:
        assert not await is_encrypted(bouncer.url)
        with pytest.raises(ConnectionError, match="SSL"):
            await is_encrypted(bouncer.url.replace("disable", "require"))


async def test_log_works_over_tls(server: Server) -> None:
    url = server.url(sslmode="verify-full", sslrootcert=server.authority)
    async with running(PostgresLog(DatabaseSettings(url=url))) as (follower, publisher):
        assert await publisher.publish("a", b"1") == Committed(1)
        await follower.wait_for(1)


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey"])
async def test_error_names_a_missing_file(server: Server, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[database\] url: {name}: /no/such/file: No such file"):
        await is_encrypted(server.url(sslmode="verify-full", **{name: "/no/such/file"}))


async def test_file_that_disappears_at_run_time_is_an_outage(server: Server, tmp_path: Path) -> None:
    url = server.url(sslmode="verify-full", sslrootcert=shutil.copy(server.authority, tmp_path / "copy"))
    async with open_bridge() as bridge:
        (await bridge.connect(url)).terminate()
        (tmp_path / "copy").unlink()
        with pytest.raises(OSError, match="sslrootcert"):
            await bridge.connect(url)
        shutil.copy(server.authority, tmp_path / "copy")
        (await bridge.connect(url)).terminate()


async def test_unknown_mode_is_an_error(server: Server) -> None:
    with pytest.raises(ConfigError, match="sslmode"):
        await is_encrypted(server.url(sslmode="certainly"))


async def test_authorities_of_the_system_are_trusted(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.crt"
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    shutil.copy(server.authority, bundle)
    assert await is_encrypted(server.url(sslrootcert="system"))
    shutil.copy(server.stranger, bundle)
    with pytest.raises(ssl.SSLCertVerificationError):
        await is_encrypted(server.url(sslrootcert="system"))
    bundle.unlink()
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with pytest.raises(ConfigError, match="no certificates of authorities"):
        await is_encrypted(server.url(sslrootcert="system"))
    with pytest.raises(ConfigError, match="verify-full only"):
        await is_encrypted(server.url(sslrootcert="system", sslmode="require"))


async def test_prefer_connects_without_tls_and_allow_with_it_where_necessary(server: Server, database_url: str) -> None:
    assert await is_encrypted(server.url(sslmode="prefer"))
    assert await is_encrypted(server.url())
    assert await is_encrypted(server.url(sslmode="allow"))
    async with open_bouncer(database_url) as plain:
        for mode in ("prefer", "allow"):
            assert not await is_encrypted(plain.url.replace("disable", mode))


async def test_tls_version_limits_are_applied(server: Server) -> None:
    assert await is_encrypted(server.url(sslmode="require", ssl_min_protocol_version="TLSv1.3"))
    assert await is_encrypted(server.url(sslmode="require", ssl_max_protocol_version="TLSv1.2"))


async def test_error_names_a_file_without_a_certificate(server: Server, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no certificate")
    for name in ("sslrootcert", "sslcert", "sslcrl"):
        others = {} if name == "sslrootcert" else {"sslrootcert": server.authority}
        with pytest.raises(ConfigError, match=f"{name}: .*/notes"):
            await is_encrypted(server.url(sslmode="verify-ca", **{name: tmp_path / "notes"}, **others))


async def test_missing_directory_of_revoked_certificates_is_an_error(server: Server) -> None:
    with pytest.raises(ConfigError, match="sslcrldir: /no/such: not a directory"):
        await is_encrypted(server.url(sslmode="verify-ca", sslrootcert=server.authority, sslcrldir="/no/such"))


async def test_tls_secrets_are_written_to_the_configured_file(server: Server, tmp_path: Path) -> None:
    assert await is_encrypted(server.url(sslmode="require", sslkeylogfile=tmp_path / "secrets"))
    assert "CLIENT" in (tmp_path / "secrets").read_text()
