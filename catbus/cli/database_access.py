"""What the commands share that speak to the database itself: which one, and the roles in it."""

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
    """Give a command the options by which `load_database` finds the database."""
    return config_option(database_option(state_option(command)))


def load_database(path: Path | None, database: str | None, state: str | None) -> Config:
    """The configuration, with a database in it.

    Where nothing names one and the state directory holds an embedded database, that is meant: a broker on this machine
    has made it. Raises `ConfigError` where there is none.
    """
    given = {"database.url": database, "state": state}
    config = load(path, os.environ, given)
    if embedded_server.is_kept_in(embedded_directory(config)):
        config = load(path, os.environ, given, {"database.url": "embedded"})
    if config.database.url == "memory":
        raise ConfigError(
            "there is no database that could keep roles: set DATABASE_URL, or give --database, or --config with the "
            "file that the broker has"
        )
    return config


def embedded_directory(config: Config) -> Path:
    """Where the embedded database is."""
    return config.state_directory / "postgres"


def describe_database(config: Config) -> str:
    """Which database it is, for people."""
    url = config.database.url
    return f"the embedded database in {embedded_directory(config)}" if url == "embedded" else redact_url(url)


@asynccontextmanager
async def open_database(config: Config) -> AsyncIterator[DatabaseSettings]:
    """The settings of a database that can be connected to: an embedded one is served for the moment, if nobody does."""
    if config.database.url != "embedded":
        yield config.database
        return
    async with embedded_server.reach(embedded_directory(config)) as url:
        yield msgspec.structs.replace(config.database, url=url)


def with_roles(config: Config, work: Callable[[RoleStore], Awaitable[T]], *, change: bool = True) -> T:
    """What `work` makes of the roles in the database. Only what changes them brings the schema to this version."""

    async def go() -> T:
        async with open_database(config) as database, open_roles(database, prepare=change) as roles:
            return await work(roles)

    return trio.run(go)


def show_role(role: Role) -> None:
    """Write a role to stdout, as JSON on one line."""
    shown: dict[str, Any] = {
        "role": role.handle,
        "client_id": role.client_id,
        "read": role.grants.read,
        "write": role.grants.write,
        "created": f"{role.created:%Y-%m-%dT%H:%M:%SZ}",
    }
    click.echo(to_json(shown).decode())
