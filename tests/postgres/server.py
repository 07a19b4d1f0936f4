"""A real PostgreSQL for the tests: one server per run, and one database for each test that needs one.

CATBUS_TEST_POSTGRES   the URL of a superuser: use that server instead of starting one
CATBUS_TEST_FSYNC=on   wait for the disk as in production; the server that is started does not otherwise
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]
import pytest

from catbus.errors import ConfigError
from catbus.postgres.access.migrations import schema_files, version_update
from catbus.postgres.embedded import server as embedded_server
from catbus.postgres.embedded.installations import find_installation

TEMPLATE = "catbus_test_template"
MEMORY = 4 << 30
"""Bytes that must be free in memory for the files of a server."""
numbers = count(1)


def to_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return urlsplit(url)._replace(path=f"/{name}").geturl()


def execute(url: str, *statements: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(go())


def make_directory(*, durable: bool = False) -> Path:
    """Create a directory for a server: in memory if there is room and fsync is off, otherwise on disk.

    Databases and clusters create and delete thousands of files, which is slow on a disk.
    """
    # Not below pytest's directory: as root, it is closed to the user that runs PostgreSQL.
    memory = "/dev/shm"
    roomy = not durable and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= MEMORY
    return Path(tempfile.mkdtemp(prefix="catbus-postgres-", dir=memory if roomy else None))


def serve() -> Iterator[str]:
    fsync = os.environ.get("CATBUS_TEST_FSYNC", "off")
    directory = make_directory(durable=fsync != "off")
    settings = {"fsync": fsync, "max_connections": "50"}
    if find_installation().major >= 17:
        settings["max_notify_queue_pages"] = "1024"  # 8 MB instead of 8 GB, so that a test can fill it
    try:
        with embedded_server.prepare_server(directory, settings) as server:
            with server.log_file.open("ab") as log:
                process = subprocess.Popen(server.command, stdout=log, stderr=subprocess.STDOUT, **server.popen_options)
            with tethered(process, directory):
                server.wait_ready(process)
                yield server.url
                process.send_signal(signal.SIGINT)
                process.wait(30)
    finally:
        shutil.rmtree(directory)


@contextmanager
def tethered(process: subprocess.Popen[bytes], directory: Path) -> Iterator[None]:
    """Stop the server when this process ends, even by SIGKILL: a shell reads the end of a pipe from this process."""
    script = 'read _; kill -INT $1; while kill -0 $1; do sleep 0.1; done 2> /dev/null; rm -rf "$2"'
    command = ["sh", "-c", script, "sh", str(process.pid), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0) as watch:
        try:
            yield
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(30)
            watch.terminate()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The superuser's URL of a server. Without a server: an error with CI=true, otherwise a skip."""
    if url := os.environ.get("CATBUS_TEST_POSTGRES"):
        yield url
        return
    try:
        yield from serve()
    except ConfigError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def _template(postgres_server: str) -> Iterator[str]:
    """The name of a database with the schema. A test gets a copy, which is faster than applying the schema."""
    maintenance = to_database(postgres_server, "postgres")
    name = f"{TEMPLATE}_{os.getpid()}"
    execute(maintenance, f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    files = schema_files()
    scripts = [script for _, _, script in files]
    execute(to_database(postgres_server, name), *scripts, version_update(files[-1][0]))
    yield name
    execute(maintenance, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_database_url(postgres_server: str) -> Iterator[str]:
    """The URL of a new database without the schema."""
    yield from _fresh(postgres_server, "template0")


@pytest.fixture
def database_url(postgres_server: str, _template: str) -> Iterator[str]:
    """The URL of a new database with the schema."""
    yield from _fresh(postgres_server, _template)


def _fresh(server: str, template: str) -> Iterator[str]:
    name = f"catbus_test_{os.getpid()}_{next(numbers)}"
    maintenance = to_database(server, "postgres")
    # Since version 15 a copy goes through the WAL by default; copying files is faster for an empty database.
    strategy = "STRATEGY file_copy" if server_major(server) >= 15 else ""
    execute(maintenance, f"CREATE DATABASE {name} TEMPLATE {template} {strategy}")
    yield to_database(server, name)
    execute(maintenance, f"DROP DATABASE {name} WITH (FORCE)")


@cache
def server_major(server: str) -> int:
    async def ask() -> int:
        connection = await asyncpg.connect(to_database(server, "postgres"))
        try:
            return int(connection.get_server_version().major)
        finally:
            await connection.close()

    return asyncio.run(ask())
