"""Migrations: bring the schema of a database to the version that this release needs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from hashlib import sha256
from importlib import resources

from ...config import DatabaseSettings
from ...errors import ConfigError, Unavailable
from ...observability.loggers import get_logger
from .asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection, open_bridge

logger = get_logger("catbus.postgres")

OLDEST_SERVER = 14
_SCRIPT_TIMEOUT = 120.0
"""Seconds for one file: another replica may be applying it, and a large table takes its time."""
_ADVISORY_LOCK = 0x636174627573
"""The key of the advisory lock: "catbus" in ASCII."""
# to_regclass() would use a cache, which need not contain another replica's new table when its lock is released.
_HAS_SCHEMA = """
SELECT EXISTS (
    SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = 'catbus' AND c.relname = 'schema_version'
)
"""
# Before the first release, the table had no digest.
_APPLIED = "SELECT v.version, to_jsonb(v) ->> 'digest' FROM catbus.schema_version AS v"
_COMMENT = re.compile(r"^\s*(--.*)?\n", re.MULTILINE)
_SCRIPT_SETTINGS = """
SET LOCAL default_table_access_method = heap;
SET LOCAL plpgsql.extra_errors = none;
"""
"""Settings of the files, beside those of every transaction."""


@cache
def schema_files() -> Sequence[tuple[int, str, str]]:
    """The files of the schema, in order: number, name, script."""
    folder = resources.files("catbus.postgres") / "schema"
    found = [(file.name, file.read_text("utf-8")) for file in folder.iterdir() if file.name.endswith(".sql")]
    return sorted((int(name.partition("_")[0]), name, script) for name, script in found)


def schema_digest(version: int) -> str:
    """A digest of the files up to this number, without lines that are only comments, and without empty ones."""
    text = "".join(_COMMENT.sub("", script) for number, _, script in schema_files() if number <= version)
    return sha256(text.encode()).hexdigest()


def version_update(version: int) -> str:
    """The statement that records that the files up to this number were applied."""
    return f"UPDATE catbus.schema_version SET version = {version:d}, digest = '{schema_digest(version)}'"  # noqa: S608


async def init(settings: DatabaseSettings) -> list[str]:
    """Connect, apply the missing files, and return their names.

    Raises `ConfigError` for a database that cannot be used, and `Unavailable` if it cannot be reached or fails.
    """
    async with open_connection(settings) as connection:
        return await migrate(connection)


async def begin_epoch(settings: DatabaseSettings) -> tuple[str, int]:
    """Begin a new epoch of a restored log. Returns the epoch, and the seq after which it begins.

    Repeating it is harmless: the entries up to then belong to both epochs. Raises as `init` does.
    """
    async with open_connection(settings) as connection:
        made = False
        while not made:
            (present,) = await connection.fetchrow("SELECT epoch FROM catbus.head")
            epoch, after, made = await connection.fetchrow(
                "CALL catbus.new_epoch_transaction($1, NULL, NULL, NULL, NULL)", present
            )
        return epoch, after


@asynccontextmanager
async def open_connection(settings: DatabaseSettings) -> AsyncIterator[DatabaseConnection]:
    """A connection for a command. Raises `ConfigError`, and `Unavailable` for any error of the database."""
    try:
        async with open_bridge() as bridge:
            with await bridge.connect(settings.url, settings.connect_timeout) as connection:
                yield connection
    except DATABASE_ERRORS as error:
        raise Unavailable(f"the database cannot be prepared: {type(error).__name__}: {error}") from error


async def migrate(connection: DatabaseConnection) -> list[str]:
    """Apply the missing files, all in one transaction, and return their names.

    Replicas that start together wait for one another. Raises `ConfigError` for a database that cannot be used: the
    server is too old, the encoding is not UTF-8, or a newer release or another build has made the schema.
    """
    if connection.version < OLDEST_SERVER:
        raise ConfigError(f"the database is PostgreSQL {connection.version}; Catbus needs {OLDEST_SERVER} or newer")
    (encoding,) = await connection.fetchrow("SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise ConfigError(f"the database's encoding is {encoding}; create it with ENCODING 'UTF8' TEMPLATE template0")
    files = schema_files()
    if await _version(connection, files[-1][0]) == files[-1][0]:
        return []
    # If anything fails from here on, the caller drops the connection, and the transaction with it.
    await connection.begin()
    await connection.execute(_SCRIPT_SETTINGS)
    await connection.fetchrow("SELECT pg_advisory_xact_lock($1)", _ADVISORY_LOCK, timeout=_SCRIPT_TIMEOUT)
    version = await _version(connection, files[-1][0])
    missing = [(number, name, script) for number, name, script in files if number > version]
    for number, _, script in missing:
        await connection.execute(script, timeout=_SCRIPT_TIMEOUT)
        await connection.execute(version_update(number))
    await connection.execute("COMMIT", timeout=_SCRIPT_TIMEOUT)
    names = [name for _, name, _ in missing]
    if names:
        logger.info("schema applied", files=names)
    return names


async def check_version(connection: DatabaseConnection) -> None:
    """Raise `ConfigError` unless the schema has the version of this release."""
    version = await read_version(connection)
    newest = schema_files()[-1][0]
    if version != newest:
        what = "`catbus init` brings it there" if version < newest else "use a newer release"
        raise ConfigError(f"the schema has version {version}, and this release needs {newest}: {what}")


async def read_version(connection: DatabaseConnection) -> int:
    """The number of the newest file of the schema that was applied.

    Raises `ConfigError` if other files with these numbers were applied than those of this release.
    """
    version, digest = await connection.fetchrow(_APPLIED)
    if version <= schema_files()[-1][0] and digest != schema_digest(version):
        raise ConfigError(
            f"another build of Catbus has made the schema of this database: its version {version} differs from that of "
            "this release, and there is no migration. Start the build that made it, or use another database. "
            "`DROP SCHEMA catbus CASCADE` deletes the schema with all messages; for an embedded database, delete the "
            "directory `postgres` in the state directory"
        )
    return int(version)


async def _version(connection: DatabaseConnection, newest: int) -> int:
    """The number of the newest file that was applied; 0 for none."""
    (prepared,) = await connection.fetchrow(_HAS_SCHEMA)
    if not prepared:
        return 0
    version = await read_version(connection)
    if version > newest:
        raise ConfigError(
            f"the database's schema has version {version} and this release knows {newest}: a newer release made it"
        )
    return version
