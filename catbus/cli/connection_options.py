"""What the commands share that speak to a broker: where it is, and who is speaking."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import click

from ..client import Bus, Reconnected, Reconnecting, connect
from ..client.transport import parse_address
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
    help="The broker. Also CATBUS_URL.",
)
fallback_option = click.option(
    "--fallback-url",
    envvar="CATBUS_FALLBACK_URL",
    metavar="URL",
    callback=lambda context, parameter, url: None if url is None else _check_url(context, parameter, url),
    help="A WebSocket for where --url, by WebTransport, does not get through. Also CATBUS_FALLBACK_URL.",
)
token_option = click.option(
    "--token",
    envvar="CATBUS_TOKEN",
    help="Who you are. Also CATBUS_TOKEN. For a broker on this machine one is made with CATBUS_SECRET, or with the "
    "development secret, where you have it.",
)


ca_option = click.option(
    "--ca",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Who may have signed the broker's certificate, for https:// and wss://. "
    "For a broker on this machine the development certificate is found by itself.",
)


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """A broker to speak to, and as whom. `token` is None when there is none to be had."""

    url: str
    token: str | None = field(repr=False)
    ca: str | None
    fallback_url: str | None = None

    def require_token(self) -> None:
        """Raise `click.UsageError` when there is no token to show."""
        if self.token is None:
            raise click.UsageError(
                "there is no token to show: give --token or set CATBUS_TOKEN (catbus grant makes one)"
            )

    def connect(self) -> AbstractAsyncContextManager[Bus]:
        """Connect, once `check` has passed, and say on stderr when the connection is lost and when there is another."""
        assert self.token is not None
        return connect(
            self.url, fallback_url=self.fallback_url, token=self.token, ca=self.ca, on_event=_report_connection_event
        )


def _report_connection_event(event: object) -> None:
    match event:
        case Reconnecting(attempt=1):
            write_line(f"catbus: {event.reason}; connecting again", sys.stderr)
        case Reconnected(moved=False):
            write_line("catbus: connected again", sys.stderr)


def connection_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where the broker is, and hand them to it as one `Remote`."""

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
