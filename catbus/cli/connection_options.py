"""The options of commands that connect to a broker: its URL, its CA certificate, and the token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import click

from ..client import Bus, Reconnected, Reconnecting, connect
from ..client.broker_address import parse_address
from .development_credentials import DEFAULT_URL, find_certificate, find_token
from .line_writer import write_line


def _check_url(_: click.Context, __: click.Parameter, url: str) -> str:
    try:
        parse_address(url)
    except ValueError as error:
        raise click.UsageError(f"--url: {error}") from None
    return url


url_option = click.option(
    "--url",
    default=DEFAULT_URL,
    envvar="CATBUS_URL",
    show_default=True,
    callback=_check_url,
    help="The URL of the broker. Also CATBUS_URL.",
)
fallback_option = click.option(
    "--fallback-url",
    envvar="CATBUS_FALLBACK_URL",
    metavar="URL",
    callback=lambda context, parameter, url: None if url is None else _check_url(context, parameter, url),
    help="A WebSocket URL to use if WebTransport to --url fails. Also CATBUS_FALLBACK_URL.",
)
token_option = click.option(
    "--token",
    envvar="CATBUS_TOKEN",
    help="The token. Also CATBUS_TOKEN. For a broker on this machine one is signed with CATBUS_SECRET, or with the "
    "development secret if you can read it.",
)


ca_option = click.option(
    "--ca",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="The CA certificate that signed the broker's certificate, for https:// and wss://. "
    "For a broker on this machine the development certificate is used by default.",
)


def timeout_option(text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the option `--timeout`, in seconds."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help=text,
    )


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """The broker to connect to, and the token, or None if there is none."""

    url: str
    token: str | None = field(repr=False)
    ca: str | None
    fallback_url: str | None = None

    def require_token(self) -> None:
        """Raise `click.UsageError` if there is no token."""
        if self.token is None:
            raise click.UsageError("no token is set: give --token or set CATBUS_TOKEN (catbus grant makes one)")

    def connect(self) -> AbstractAsyncContextManager[Bus]:
        """Connect, and report a lost connection and a reconnect on stderr. Call `require_token` before."""
        assert self.token is not None
        return connect(
            self.url, fallback_url=self.fallback_url, token=self.token, ca=self.ca, on_event=_report_connection_event
        )


def _report_connection_event(event: object) -> None:
    match event:
        case Reconnecting(attempt=1):
            write_line(f"catbus: {event.reason}; reconnecting", sys.stderr)
        case Reconnected(moved=False):
            write_line("catbus: reconnected", sys.stderr)


def connection_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the connection options to a command. It gets them as the argument `broker`, a `ConnectionOptions`."""

    @url_option
    @fallback_option
    @token_option
    @ca_option
    @wraps(command)
    def with_connection(
        *, url: str, fallback_url: str | None, token: str | None, ca: str | None, **others: Any
    ) -> None:
        token, ca = token or find_token(url), ca or find_certificate(url)
        command(broker=ConnectionOptions(url, token, ca, fallback_url), **others)

    return with_connection
