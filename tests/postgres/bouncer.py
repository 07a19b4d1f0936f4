"""A real PgBouncer in front of the tests' PostgreSQL, in transaction mode."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import trio

from tests.log.harness import TEST_TIMEOUT
from tests.postgres.proxy import _target
from tests.postgres.server import tethered
from tests.programs import find_program


class Bouncer:
    """A PgBouncer process; `url` connects through it to the given database.

    With a `certificate`, whose PEM also contains the key, it accepts only TLS connections.
    """

    def __init__(self, url: str, size: int, directory: Path, certificate: bytes | None = None) -> None:
        directory.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        parts = urlsplit(url)
        target = _target(url)
        host, server_port = target if isinstance(target, tuple) else target.rsplit("/.s.PGSQL.", 1)
        mode = "require" if certificate else "disable"
        self.url = f"postgres://{parts.username}:{parts.password}@127.0.0.1:{port}{parts.path}?sslmode={mode}"
        self._port = port
        self._log = directory / "log"
        (directory / "users").write_text(f'"{unquote(parts.username or "")}" "{unquote(parts.password or "")}"\n')
        tls = ""
        if certificate:
            pem = directory / "tls.pem"
            pem.write_bytes(certificate)
            tls = f"client_tls_sslmode = require\nclient_tls_cert_file = {pem}\nclient_tls_key_file = {pem}\n"
        (directory / "ini").write_text(
            "[databases]\n"
            f"* = host={host} port={server_port}\n"
            "[pgbouncer]\n"
            "listen_addr = 127.0.0.1\n"
            f"listen_port = {port}\n"
            "unix_socket_dir =\n"
            "auth_type = scram-sha-256\n"
            f"auth_file = {directory}/users\n"
            "pool_mode = transaction\n"
            f"default_pool_size = {size}\n"
            "server_login_retry = 0.1\n" + tls
        )
        # PgBouncer refuses to run as root.
        user = ["-u", "postgres"] if os.getuid() == 0 else []
        self._command = [find_program("pgbouncer", "pgbouncer"), *user, str(directory / "ini")]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    async def wait_ready(self) -> None:
        with trio.fail_after(TEST_TIMEOUT):
            while True:
                assert self.process.poll() is None, self._log.read_text()
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", self._port)).aclose()
                    return
                except OSError:
                    await trio.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TEST_TIMEOUT)

    async def restart(self) -> None:
        self.process = self._start()
        await self.wait_ready()


@asynccontextmanager
async def open_bouncer(url: str, *, size: int = 3, certificate: bytes | None = None) -> AsyncIterator[Bouncer]:
    """Run a PgBouncer with at most `size` connections to the database."""
    directory = Path(tempfile.mkdtemp(prefix="catbus-bouncer-"))
    bouncer = Bouncer(url, size, directory, certificate)
    try:
        with tethered(bouncer.process, directory):
            await bouncer.wait_ready()
            yield bouncer
            bouncer.process.send_signal(signal.SIGTERM)
            bouncer.process.wait(TEST_TIMEOUT)
    finally:
        if bouncer.process.poll() is None:
            bouncer.kill()
        shutil.rmtree(directory, ignore_errors=True)
