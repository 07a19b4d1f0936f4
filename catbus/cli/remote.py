"""What the commands share that speak to a broker: where it is, and who is speaking."""

from __future__ import annotations

import click

from ..client.transport import parse_address
from .development import DEFAULT_URL, find_token


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
token_option = click.option(
    "--token",
    envvar="CATBUS_TOKEN",
    help="Who you are. Also CATBUS_TOKEN. For a broker on this machine the development token is found by itself.",
)


def require_token(given: str | None, url: str) -> str:
    """The token to show a broker at `url`. Raises `click.UsageError`."""
    token = given or find_token(url)
    if token is None:
        raise click.UsageError("there is no token to show: give --token or set CATBUS_TOKEN (catbus grant makes one)")
    return token
