"""Access to the database for commands that use it directly: finding it, opening it, and its roles."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import trio

from ..config import Config, DatabaseSettings, load, redact_url
from ..errors import ConfigError
from ..postgres.embedded import server as embedded_server
from ..postgres.roles.role_store import Role, RoleStore, open_roles
from ..protocol.wire_messages import to_json
from .shared_options import config_option, database_option, state_option

T = TypeVar("T")


def database_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for `load_database` to a command."""
    return config_option(database_option(state_option(command)))


def load_database(path: Path | None, database: str | None, state: str | None) -> Config:
    """Load a configuration that has a database.

    If none is named and the state directory has an embedded database, which a broker on this machine has created, use
    it. Raises `ConfigError` if there is no database.
    """
    given = {"database.url": database, "state": state}
    config = load(path, os.environ, given)
    if embedded_server.exists_in(embedded_directory(config)):
        config = load(path, os.environ, given, {"database.url": "embedded"})
    if config.database.url == "memory":
        raise ConfigError(
            "there is no database: set DATABASE_URL, or give --database, or --config with the broker's configuration "
            "file"
        )
    return config


def embedded_directory(config: Config) -> Path:
    """Return the directory of the embedded database."""
    return config.state_directory / "postgres"


def describe_database(config: Config) -> str:
    """Describe the database in messages, without secrets."""
    url = config.database.url
    return f"the embedded database in {embedded_directory(config)}" if url == "embedded" else redact_url(url)


@asynccontextmanager
async def open_database(config: Config) -> AsyncIterator[DatabaseSettings]:
    """Yield the settings of a reachable database. Start the embedded one for the time if it is not running."""
    if config.database.url != "embedded":
        yield config.database
        return
    async with embedded_server.open_server(embedded_directory(config)) as url:
        yield msgspec.structs.replace(config.database, url=url)


def with_roles(config: Config, work: Callable[[RoleStore], Awaitable[T]], *, change: bool = True) -> T:
    """Run `work` on the roles in the database and return its result. Only a `change` migrates the schema before."""

    async def go() -> T:
        async with open_database(config) as database, open_roles(database, prepare=change) as roles:
            return await work(roles)

    return trio.run(go)


def show_role(role: Role) -> None:
    """Print a role as JSON in one line."""
    shown: dict[str, Any] = {
        "role": role.handle,
        "client_id": role.client_id,
        "read": role.grants.read,
        "write": role.grants.write,
        "created": f"{role.created:%Y-%m-%dT%H:%M:%SZ}",
    }
    click.echo(to_json(shown).decode())
