"""`catbus run`: a broker, until it is told to stop."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import click
import msgspec
import trio

from ...broker import Broker, serve
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
from ...endpoints.capacity import raise_limit
from ...errors import ConfigError
from ...observability.loggers import get_logger
from ..development_credentials import DEFAULT_URL, development_token, read_or_create_secret
from ..line_writer import write_line
from ..log_configuration import configure_logging, set_levels
from ..shared_options import config_option, database_option, state_option

logger = get_logger("catbus.run")

NO_DATABASE = (
    "no database is set, and others can reach this broker: set DATABASE_URL to postgres://..., or give --database "
    "embedded, or --database memory for a log that ends with the process"
)
SECRET_ADVICE = (
    f"use the output of `{SECRET_COMMAND}`, or bind 127.0.0.1 only (--ws-bind 127.0.0.1:8080); to try it all the "
    "same, set auth.allow_weak_secrets (CATBUS_AUTH_ALLOW_WEAK_SECRETS=true)"
)
RELOADABLE = frozenset({"logging.levels"})
"""Settings that a running broker takes when they change."""


@click.command("run", short_help="Run a broker.")
@config_option
@database_option
@click.option(
    "--ws-bind", multiple=True, metavar="ADDRESS", help="Serve WebSocket and HTTP there, like 127.0.0.1:8080."
)
@state_option
@click.option("--log", "levels", metavar="LEVELS", help="What to log, like info or catbus=debug,aioquic=warning.")
def command(
    config: Path | None, database: str | None, ws_bind: tuple[str, ...], state: str | None, levels: str | None
) -> None:
    """Run a broker. The first SIGTERM or Ctrl-C stops it in order, the second at once.

    SIGHUP has it read its certificate anew, which it also does by itself when the files change, and its log levels.
    The log names the other settings that have changed since: they take a restart.

    Settings come from the file that --config names, then from the environment (DATABASE_URL, CATBUS_SECRET,
    CATBUS_WS_BIND, CATBUS_LOG, and CATBUS_SECTION_NAME for any setting), then from options; what comes later wins.
    `catbus check` says where each comes from.

    \b
    Examples:
      catbus run --config catbus.toml
      catbus run --database embedded --ws-bind 127.0.0.1:8080
      DATABASE_URL=postgres://me@db/catbus CATBUS_SECRET=... catbus run
    """
    given = {
        "database.url": database,
        "websocket.bind": ws_bind or None,
        "state": state,
        "logging.levels": levels,
    }
    reading = load_with_sources(config, os.environ, given)
    check_exposure(reading.config, reading.sources)
    settings, token = ensure_secret(reading.config)
    configure_logging(
        settings.logging.levels,
        settings.logging.format,
        sys.stdout,
        secrets=[*settings.auth.secrets, settings.auth.admin_key or ""],
    )
    for text in (*reading.warnings, *find_weak_secrets(reading.config)):
        logger.warning(text)
    raise_limit()
    status = trio.run(
        serve_until_signalled,
        settings,
        token,
        ConfigReloader(reading.config, lambda: load_with_sources(config, os.environ, given)),
    )
    if status:
        raise click.exceptions.Exit(status)


def check_exposure(config: Config, sources: Mapping[str, str]) -> None:
    """Raise `ConfigError` where others can reach the broker and it would lose its log, or admit who guesses.

    `sources` names the settings that somebody has set.
    """
    if config.loopback:
        return
    if "database.url" not in sources:
        raise ConfigError(NO_DATABASE)
    weak = find_weak_secrets(config)
    if weak and not config.auth.allow_weak_secrets:
        raise ConfigError(f"{weak[0]}, and others can reach this broker: {SECRET_ADVICE}")


def ensure_secret(config: Config) -> tuple[Config, str | None]:
    """The configuration with a secret, and a token for it when the secret is a development secret.

    Raises `ConfigError` where there is none and others could reach the broker.
    """
    if config.auth.secrets:
        return config, None
    if not config.loopback:
        raise ConfigError(
            "there is no secret to verify tokens with, and others can reach this broker: set CATBUS_SECRET, for "
            f"example to the output of `{SECRET_COMMAND}`, or bind 127.0.0.1 only (--ws-bind 127.0.0.1:8080)"
        )
    secret = read_or_create_secret(config.state_directory)
    auth = msgspec.structs.replace(config.auth, secrets=(secret,))
    return msgspec.structs.replace(config, auth=auth), development_token(secret)


class ConfigReloader:
    """What SIGHUP does, beside the certificate: read the configuration again, and say what of it is taken."""

    def __init__(self, config: Config, read_again: Callable[[], LoadedConfig]) -> None:
        self._config = config
        self._read_again = read_again
        self._keys = _read_files(config.auth.jwt)

    def __call__(self) -> None:
        """Take what can be taken, and log the names of the rest."""
        try:
            reading = self._read_again()
        except ConfigError as error:
            logger.warning("the configuration cannot be read again, all settings stay", reason=str(error))
            return
        for text in reading.warnings:
            logger.warning(text)
        changed = changed_settings(self._config, reading.config)
        taken = [name for name in changed if name in RELOADABLE]
        left = [name for name in changed if name not in RELOADABLE]
        if "auth.jwt" not in changed and _read_files(reading.config.auth.jwt) != self._keys:
            left.append("auth.jwt")
        if taken:
            set_levels(reading.config.logging.levels)
            self._config = msgspec.structs.replace(
                self._config,
                logging=msgspec.structs.replace(self._config.logging, levels=reading.config.logging.levels),
            )
        logger.info("read the configuration again", taken=taken, unchanged=not (taken or left))
        if left:
            logger.warning("settings have changed that take a restart", settings=left)


def _read_files(files: Sequence[str]) -> list[bytes | None]:
    """What stands in files, and None for one that cannot be read."""
    found: list[bytes | None] = []
    for file in files:
        try:
            found.append(Path(file).read_bytes())
        except OSError:
            found.append(None)
    return found


async def serve_until_signalled(config: Config, token: str | None, reload: Callable[[], None] = lambda: None) -> int:
    """Serve until a signal says otherwise; `reload` is called on SIGHUP. Returns the exit status."""
    status = 0
    broker: Broker | None = None
    # With a terminal, SIGHUP means that it is gone, and the broker goes with it.
    reloads = not sys.stdin.isatty()
    # PID 1 of a container has no default handler: before this line, SIGTERM goes unheard.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def obey(signals: AsyncIterator[int]) -> None:
                nonlocal status
                stopping = False
                async for number in signals:
                    if number == signal.SIGHUP and reloads:
                        reload()
                        if broker is not None:
                            broker.reload()
                        continue
                    if broker is None or stopping:
                        status = 128 + number if stopping else 0
                        nursery.cancel_scope.cancel()
                    else:
                        logger.info("stopping", signal=signal.Signals(number).name)
                        broker.stop()
                    stopping = True

            async def serve_to_the_end(*, task_status: trio.TaskStatus[Broker] = trio.TASK_STATUS_IGNORED) -> None:
                await serve(config, task_status=task_status)
                nursery.cancel_scope.cancel()

            nursery.start_soon(obey, signals)
            logger.info("starting", database=redact_url(config.database.url), pid=os.getpid())
            broker = await nursery.start(serve_to_the_end)
            # Before it is said to serve: this takes a moment, in which nothing else is done.
            _freeze_garbage_collector()
            _show_address(broker, config, token)
    logger.info("stopped")
    return status


def _show_address(broker: Broker, config: Config, token: str | None) -> None:
    urls = broker.urls
    logger.info("serving", urls=urls)
    if config.webtransport.bind and not config.webtransport_served:
        logger.warning("WebTransport is not served: there is no certificate (CATBUS_CERT and CATBUS_KEY)")
    if token is None:
        return
    command_line = "catbus" if shutil.which("catbus") else os.path.relpath(sys.argv[0])
    if command_line.endswith("__main__.py"):
        command_line = "python -m catbus"
    options = "" if DEFAULT_URL in urls or not urls else f" --url {urls[0]}"
    found = config.state_directory == default_state_directory(os.environ)
    # For whoever sits in front of it. A program that reads our log lines from stdout must not stumble over this.
    text = config.logging.format == "text" or (config.logging.format == "auto" and sys.stdout.isatty())
    lines = [
        "",
        "  Catbus serves",
        *(f"    {url}" for url in urls),
        "",
        "  Only this machine can reach it. Its development token allows everything:",
        f"    {token}",
        "",
        "  From another shell:",
        *([] if found else [f"    export CATBUS_TOKEN={token}"]),
        f"    {command_line} sub 'demo.*'{options}",
        f"    {command_line} pub demo.hello '{{\"n\": 1}}'{options}",
        "",
    ]
    write_line("\n".join(lines), sys.stdout if text else sys.stderr)


def _freeze_garbage_collector() -> None:
    # What is alive by now stays alive: the collector need not look at it again, and rarely at the rest.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
