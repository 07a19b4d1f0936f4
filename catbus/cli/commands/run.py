"""`catbus run`: run a broker until a signal stops it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import click
import msgspec
import trio

from ...broker import Broker, client_urls, page_urls, serve
from ...config import (
    SECRET_COMMAND,
    Config,
    LoadedConfig,
    changed_settings,
    default_state_directory,
    find_weak_secrets,
    load_with_sources,
    redact_url,
)
from ...endpoints.open_files import raise_open_file_limit
from ...errors import ConfigError
from ...observability.loggers import get_logger
from ...processes.service_manager import ALIVE, READY, STOPPING, ServiceManager
from ..development_credentials import DEFAULT_URL, development_token, read_or_create_secret
from ..line_writer import use_threads, write_line
from ..log_configuration import configure_logging, set_levels
from ..main_command import explain_error
from ..shared_options import config_option, database_option, state_option
from ..workers import freeze_garbage_collector, run_workers, worker_count

logger = get_logger("catbus.run")

NO_DATABASE = (
    "no database is set, but other machines can reach this broker: set DATABASE_URL to postgres://..., or give "
    "--database embedded, or --database memory for a log that ends with the process"
)
SECRET_ADVICE = (
    f"use the output of `{SECRET_COMMAND}`, or bind 127.0.0.1 only (--ws-bind 127.0.0.1:8080); for a trial, "
    "set auth.allow_weak_secrets (CATBUS_AUTH_ALLOW_WEAK_SECRETS=true)"
)
RELOADABLE = frozenset({"logging.levels"})
"""Settings that a running broker reloads."""


@click.command("run", short_help="Run a broker.")
@config_option
@database_option
@click.option(
    "--ws-bind", multiple=True, metavar="ADDRESS", help="Serve WebSocket and HTTP on this address, like 127.0.0.1:8080."
)
@state_option
@click.option(
    "--workers",
    metavar="N|auto",
    callback=lambda _, __, text: int(text) if text and text.isdecimal() else text,
    help="Serve with N processes on the same ports, or with one for each core.",
)
@click.option("--log", "levels", metavar="LEVELS", help="Log levels, like info or catbus=debug,aioquic=warning.")
def command(
    config: Path | None,
    database: str | None,
    ws_bind: tuple[str, ...],
    state: str | None,
    workers: int | str | None,
    levels: str | None,
) -> None:
    """Run a broker. The first SIGTERM or Ctrl-C starts a graceful shutdown, the second one stops it immediately.

    SIGHUP reloads the certificate, which is also reloaded when its files change, and the log levels. The log names
    other settings that have changed: they require a restart.

    With --workers, a supervisor passes these signals on to its workers and starts those again that end. Each worker is
    a replica, so they need a database. SIGTERM to one worker restarts it: its clients move to the others.

    Settings come from the file of --config, then from the environment (DATABASE_URL, CATBUS_SECRET, CATBUS_WS_BIND,
    CATBUS_LOG, and CATBUS_SECTION_NAME for any setting), then from options. The later source wins. `catbus check` shows
    the source of each.

    \b
    Examples:
      catbus run --config catbus.toml
      catbus run --database embedded --ws-bind 127.0.0.1:8080
      catbus run --config catbus.toml --workers auto
      DATABASE_URL=postgres://me@db/catbus CATBUS_SECRET=... catbus run
    """
    given = {
        "database.url": database,
        "websocket.bind": ws_bind or None,
        "state": state,
        "run.workers": workers,
        "logging.levels": levels,
    }
    reading = load_with_sources(config, os.environ, given)
    check_exposure(reading.config, reading.sources)
    count = worker_count(reading.config)
    settings, token = ensure_secret(reading.config)

    def configure_logs() -> None:
        configure_logging(
            settings.logging.levels,
            settings.logging.format,
            sys.stdout,
            secrets=[*settings.auth.secrets, settings.auth.admin_key or ""],
        )

    if count > 1:
        use_threads(False)
    configure_logs()
    for text in (*reading.warnings, *find_weak_secrets(reading.config)):
        logger.warning(text)
    raise_open_file_limit()
    reload = ConfigReloader(reading.config, lambda: load_with_sources(config, os.environ, given))
    manager = ServiceManager(os.environ)
    if count == 1:
        status = trio.run(serve_until_signalled, settings, token, reload, manager)
    else:
        _log_start(settings, workers=count)
        status = run_workers(
            settings,
            count,
            configure_logs,
            reload,
            lambda addresses: _show_address(addresses, settings, token),
            explain_error,
            manager,
        )
        logger.info("stopped")
    if status:
        raise click.exceptions.Exit(status)


def check_exposure(config: Config, sources: Mapping[str, str]) -> None:
    """Raise `ConfigError` if other machines can reach the broker, and it has no chosen database or a weak secret.

    `sources` has the settings without their defaults.
    """
    if config.loopback:
        return
    if "database.url" not in sources:
        raise ConfigError(NO_DATABASE)
    weak = find_weak_secrets(config)
    if weak and not config.auth.allow_weak_secrets:
        raise ConfigError(f"{weak[0]}, but other machines can reach this broker: {SECRET_ADVICE}")


def ensure_secret(config: Config) -> tuple[Config, str | None]:
    """Return the configuration with a secret, and for the development secret a token.

    Raises `ConfigError` if there is no secret and other machines can reach the broker.
    """
    if config.auth.secrets:
        return config, None
    if not config.loopback:
        raise ConfigError(
            "there is no secret to verify tokens, but other machines can reach this broker: set CATBUS_SECRET, for "
            f"example to the output of `{SECRET_COMMAND}`, or bind 127.0.0.1 only (--ws-bind 127.0.0.1:8080)"
        )
    secret = read_or_create_secret(config.state_directory)
    auth = msgspec.structs.replace(config.auth, secrets=(secret,))
    return msgspec.structs.replace(config, auth=auth), development_token(secret)


class ConfigReloader:
    """The reload of the configuration on SIGHUP. The certificate is reloaded elsewhere."""

    def __init__(self, config: Config, read_again: Callable[[], LoadedConfig]) -> None:
        self._config = config
        self._read_again = read_again
        self._keys = _read_files(config.auth.jwt)

    def __call__(self) -> None:
        """Reload the reloadable settings, and log the names of other changed settings."""
        try:
            reading = self._read_again()
        except ConfigError as error:
            logger.warning("cannot reload the configuration; all settings remain", reason=str(error))
            return
        for text in reading.warnings:
            logger.warning(text)
        changed = changed_settings(self._config, reading.config)
        reloaded = [name for name in changed if name in RELOADABLE]
        not_reloaded = [name for name in changed if name not in RELOADABLE]
        if "auth.jwt" not in changed and _read_files(reading.config.auth.jwt) != self._keys:
            not_reloaded.append("auth.jwt")
        if reloaded:
            set_levels(reading.config.logging.levels)
            self._config = msgspec.structs.replace(
                self._config,
                logging=msgspec.structs.replace(self._config.logging, levels=reading.config.logging.levels),
            )
        logger.info("reloaded the configuration", reloaded=reloaded, unchanged=not (reloaded or not_reloaded))
        if not_reloaded:
            logger.warning("changed settings require a restart", settings=not_reloaded)


def _read_files(files: Sequence[str]) -> list[bytes | None]:
    """Return the contents of files, with None for an unreadable one."""
    found: list[bytes | None] = []
    for file in files:
        try:
            found.append(Path(file).read_bytes())
        except OSError:
            found.append(None)
    return found


async def serve_until_signalled(
    config: Config, token: str | None, reload: Callable[[], None], manager: ServiceManager
) -> int:
    """Serve until a signal stops the broker. SIGHUP calls `reload`. Return the exit status."""
    status = 0
    broker: Broker | None = None
    # With a terminal, SIGHUP means that the terminal was closed, and stops the broker.
    reloads = not sys.stdin.isatty()
    # PID 1 of a container has no default handlers: before this line, SIGTERM is ignored.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def handle_signals(signals: AsyncIterator[int]) -> None:
                nonlocal status
                stopping = False
                async for number in signals:
                    if number == signal.SIGHUP and reloads:
                        manager.tell_reloading()
                        reload()
                        if broker is not None:
                            broker.reload()
                            manager.tell(READY)
                        continue
                    manager.tell(STOPPING)
                    if broker is None or stopping:
                        status = 128 + number if stopping else 0
                        nursery.cancel_scope.cancel()
                    else:
                        logger.info("stopping", signal=signal.Signals(number).name)
                        broker.stop()
                    stopping = True

            async def serve_until_stopped(*, task_status: trio.TaskStatus[Broker] = trio.TASK_STATUS_IGNORED) -> None:
                await serve(config, task_status=task_status)
                nursery.cancel_scope.cancel()

            async def show_life(interval: float) -> None:
                while True:
                    manager.tell(ALIVE)
                    await trio.sleep(interval)

            nursery.start_soon(handle_signals, signals)
            if manager.watchdog_interval is not None:
                nursery.start_soon(show_life, manager.watchdog_interval)
            _log_start(config)
            broker = await nursery.start(serve_until_stopped)
            # Before the broker reports that it serves, because this blocks the event loop for a moment.
            freeze_garbage_collector()
            _show_address(broker.addresses, config, token)
            manager.tell(READY)
    logger.info("stopped")
    return status


def _log_start(config: Config, **fields: int) -> None:
    logger.info("starting", database=redact_url(config.database.url), pid=os.getpid(), **fields)


def _show_address(addresses: Sequence[tuple[str, str]], config: Config, token: str | None) -> None:
    urls = client_urls(config, addresses)
    logger.info("serving", urls=urls)
    if config.webtransport.bind and not config.webtransport_served:
        logger.warning("WebTransport is disabled: there is no certificate (CATBUS_CERT and CATBUS_KEY)")
    if token is None:
        return
    command_line = "catbus" if shutil.which("catbus") else os.path.relpath(sys.argv[0])
    if command_line.endswith("__main__.py"):
        command_line = "python -m catbus"
    options = "" if DEFAULT_URL in urls or not urls else f" --url {urls[0]}"
    found = config.state_directory == default_state_directory(os.environ)
    # For people at a terminal. A program that parses the log lines on stdout must not get this text.
    text = config.logging.format == "text" or (config.logging.format == "auto" and sys.stdout.isatty())
    lines = [
        "",
        "  Catbus is running at",
        *(f"    {url}" for url in urls),
        "",
        "  Only this machine can reach it. Its development token allows all channels:",
        f"    {token}",
        "",
        *_console_lines(page_urls(config, addresses), token),
        "  From another shell:",
        *([] if found else [f"    export CATBUS_TOKEN={token}"]),
        f"    {command_line} sub 'demo.*'{options}",
        f"    {command_line} pub demo.hello '{{\"n\": 1}}'{options}",
        "",
    ]
    write_line("\n".join(lines), sys.stdout if text else sys.stderr)


def _console_lines(pages: Sequence[str], token: str) -> list[str]:
    """Return the address of the console. A browser does not send the fragment with the token to anybody."""
    return [f"  In a browser, the console:\n    {page}/console#token={token}\n" for page in pages[:1]]
