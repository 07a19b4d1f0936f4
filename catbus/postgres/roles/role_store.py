"""The administration of roles: create, list, show, grant, revoke, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from ...auth.grants import Grants
from ...auth.role_tokens import make_role_token, role_digits, role_handle, role_key
from ...config import DatabaseSettings
from ...errors import CatbusError, ConfigError, Unavailable
from ..access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection, Row, open_bridge, sqlstate
from ..access.migrations import migrate

# One statement, so that a role and its grants are of the same moment.
SELECT = """
SELECT r.key, r.client_id, r.created,
       ARRAY(SELECT g.pattern FROM catbus.role_grants AS g
             WHERE g.role = r.key AND g.permission = 'read' ORDER BY g.pattern) AS read,
       ARRAY(SELECT g.pattern FROM catbus.role_grants AS g
             WHERE g.role = r.key AND g.permission = 'write' ORDER BY g.pattern) AS write
FROM catbus.roles AS r
"""
_LIST = f"{SELECT} ORDER BY r.created, r.key"
_SHOW = f"{SELECT} WHERE r.key = $1"
_NAMED = "SELECT r.key FROM catbus.roles AS r WHERE starts_with(encode(r.key, 'hex'), $1) ORDER BY r.key"
_LOCK = f"{_NAMED} FOR UPDATE"
_CREATE = "INSERT INTO catbus.roles (key, client_id) VALUES ($1, $2)"
# The grants are deleted explicitly, as session_replication_role may disable the foreign key.
_DELETE = "WITH grants AS (DELETE FROM catbus.role_grants WHERE role = $1) DELETE FROM catbus.roles WHERE key = $1"
_GRANT = """
INSERT INTO catbus.role_grants (role, permission, pattern)
SELECT $1, g.permission, g.pattern FROM unnest($2::text[], $3::text[]) AS g (permission, pattern)
ON CONFLICT DO NOTHING
"""
_REVOKE = """
DELETE FROM catbus.role_grants AS held USING unnest($2::text[], $3::text[]) AS g (permission, pattern)
WHERE held.role = $1 AND held.permission = g.permission AND held.pattern = g.pattern
"""

_NO_SUCH_TABLE = "42P01"


class RoleError(CatbusError):
    """A role does not exist, is ambiguous, or lacks a grant that is to be revoked."""


@dataclass(frozen=True, slots=True)
class Role:
    """A role: what the bearer of a role token is and may do."""

    key: bytes
    client_id: str | None
    created: datetime
    grants: Grants

    @property
    def handle(self) -> str:
        return role_handle(self.key)


def role_from_row(row: Row) -> Role:
    """The role in a row of `SELECT`."""
    key, client_id, created, read, write = row
    return Role(key, client_id, created, Grants(tuple(read), tuple(write)))


@asynccontextmanager
async def open_roles(settings: DatabaseSettings, *, prepare: bool = True) -> AsyncIterator[RoleStore]:
    """Connect to the database, and with `prepare` bring its schema to this version.

    Raises `ConfigError` for a database that cannot be used, and `Unavailable` if it cannot be reached or fails, also
    within the block.
    """
    try:
        async with open_bridge() as bridge:
            with await bridge.connect(settings.url, settings.connect_timeout) as connection:
                if prepare:
                    await migrate(connection)
                yield RoleStore(connection)
    except DATABASE_ERRORS as error:
        if sqlstate(error) == _NO_SUCH_TABLE:
            raise ConfigError("the database has no roles: `catbus init` brings its schema to this version") from error
        raise Unavailable(f"the database cannot be used: {type(error).__name__}: {error}") from error


class RoleStore:
    """The roles of a database, through a connection of its own.

    A role is named by its token or its handle. Each method raises one of `DATABASE_ERRORS`, and `RoleError` for a role
    that is not found; then nothing has changed.
    """

    def __init__(self, connection: DatabaseConnection) -> None:
        self._connection = connection

    async def create(self, client_id: str | None, grants: Grants) -> tuple[str, Role]:
        """Create a role. The token is stored nowhere: if it gets lost, create another role."""
        token = make_role_token()
        key = role_key(token)
        assert key is not None
        async with self._transaction():
            await self._connection.fetch(_CREATE, key, client_id)
            await self._connection.fetch(_GRANT, key, *_columns(grants))
            return token, await self._show(key)

    async def list(self) -> Sequence[Role]:
        """All roles, oldest first."""
        return [role_from_row(row) for row in await self._connection.fetch(_LIST)]

    async def show(self, name: str) -> Role:
        return await self._show(await self._find(_NAMED, name))

    async def delete(self, name: str) -> Role:
        """Delete a role and return it. Its token is invalid from then on."""
        async with self._transaction():
            role = await self._show(await self._find(_LOCK, name))
            await self._connection.fetch(_DELETE, role.key)
            return role

    async def grant(self, name: str, grants: Grants) -> Role:
        """Add grants to a role, and return the role. Its other grants stay."""
        async with self._transaction():
            key = await self._find(_LOCK, name)
            await self._connection.fetch(_GRANT, key, *_columns(grants))
            return await self._show(key)

    async def revoke(self, name: str, grants: Grants) -> Role:
        """Remove exactly these grants from a role, and return the role.

        Raises `RoleError` if it lacks one of them. The other grants of the role still apply.
        """
        async with self._transaction():
            role = await self._show(await self._find(_LOCK, name))
            lacking = _without(grants, role.grants)
            if any(lacking):
                raise RoleError(
                    f"the role {role.handle} has no such grant: {Grants(*lacking)}; what it has: {role.grants}"
                )
            await self._connection.fetch(_REVOKE, role.key, *_columns(grants))
            return await self._show(role.key)

    async def _find(self, query: str, name: str) -> bytes:
        digits = role_digits(name)
        if digits is None:
            raise RoleError("a role is named by its token or by its handle, which has 12 hexadecimal digits or more")
        found = [key for (key,) in await self._connection.fetch(query, digits)]
        if len(found) > 1:
            raise RoleError(f"{digits} fits several roles, say more of it: {', '.join(key.hex() for key in found)}")
        if not found:
            raise RoleError(f"there is no role {digits[:12]}" if digits == name.lower() else "no role has this token")
        key: bytes = found[0]
        return key

    async def _show(self, key: bytes) -> Role:
        found = await self._connection.fetch(_SHOW, key)
        if not found:
            raise RoleError(f"there is no role {role_handle(key)} any more")
        return role_from_row(found[0])

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        await self._connection.begin()
        try:
            yield
        except RoleError:
            await self._connection.execute("ROLLBACK")
            raise
        except BaseException:
            # The state of the transaction is unknown. It ends with the connection.
            self._connection.terminate()
            raise
        await self._connection.execute("COMMIT")


def _without(grants: Grants, held: Grants) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The patterns of `grants` that `held` lacks, to read and to write."""
    return (
        tuple(pattern for pattern in grants.read if pattern not in held.read),
        tuple(pattern for pattern in grants.write if pattern not in held.write),
    )


def _columns(grants: Grants) -> tuple[list[str], list[str]]:
    """Grants as two columns: permissions and patterns."""
    return ["read"] * len(grants.read) + ["write"] * len(grants.write), [*grants.read, *grants.write]
