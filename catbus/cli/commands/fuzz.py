"""`catbus fuzz`: test a running broker with random clients against a model of the protocol."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...client.broker_address import parse_address
from ...errors import PeerError
from ...protocol.channels import check_channel
from ..connection_options import ca_option
from ..development_credentials import DEFAULT_URL, find_signing_secret

if TYPE_CHECKING:
    from ...testing.fuzz import FuzzResult

SHRINK_TIME = 60.0
"""Seconds for shrinking a failing example."""
PROGRESS_INTERVAL = 30.0
"""Seconds between two progress lines, if there is no terminal for a progress bar."""


@click.command("fuzz", short_help="Test a running broker with random and hostile clients.")
@click.option(
    "--url",
    "urls",
    multiple=True,
    default=[DEFAULT_URL],
    envvar="CATBUS_URL",
    show_default=True,
    help="The URL of the broker. Repeat it for several replicas. WebTransport is tested, too, if the broker announces "
    "it over WebSocket. Also CATBUS_URL.",
)
@click.option(
    "--token",
    envvar="CATBUS_TOKEN",
    help="The token of all clients, which must allow to read and write `fuzz.*`. Also CATBUS_TOKEN. With a secret "
    "instead, clients have different grants.",
)
@click.option(
    "--secret",
    help="Sign tokens with this secret. CATBUS_SECRET keeps it off the command line; for a broker on this machine the "
    "development secret is the default.",
)
@ca_option
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, help="Duration."
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the random examples. [random]")
@click.option("--root", default="fuzz", show_default=True, help="Prefix of all channels.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False),
    metavar="DIR",
    default=".hypothesis",
    show_default=True,
    help="Directory for failing examples, which are tried first the next time.",
)
@click.option(
    "--script",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Write the script that reproduces a failure to this file.",
)
def command(
    urls: tuple[str, ...],
    token: str | None,
    secret: str | None,
    ca: str | None,
    minutes: float,
    seed: int | None,
    root: str,
    keep: str,
    script: str | None,
) -> None:
    """Test a running broker with a state machine of clients, and with hostile clients.

    The clients connect, subscribe, publish, get and lose grants, are disconnected, and resume at their cursors. After
    each step all of them must have received exactly the messages of a model of the protocol, over WebSocket and
    WebTransport. No other client may publish to channels below --root during the test. Existing messages are not
    changed, and some thousand messages per minute remain in the log.

    A failure is shrunk, and a Python script that reproduces it is printed. The exit status is then 1, otherwise 0.
    Requires Hypothesis: pip install 'catbus-broker[testing]'.

    \b
    Examples:
      catbus fuzz --minutes 1
      catbus fuzz --url wss://bus.example.com/ws --token "$TOKEN" --minutes 5
      catbus fuzz --url ws://10.0.0.1:8080/ws --url ws://10.0.0.2:8080/ws --minutes 60
    """
    try:
        from ...testing.fuzz import find_target, fuzz, shrink, write_script
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: pip install 'catbus-broker[testing]'") from None
    _check_options(urls, root)
    secret = None if token is not None else secret or find_signing_secret(urls)
    if token is None and secret is None:
        raise click.UsageError("no token and no secret is set: give --token, or set CATBUS_SECRET")
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    target = find_target(urls, token=token, secret=secret, ca=ca, root=root)
    for reason in target.unreachable:
        click.echo(f"catbus: {reason}; continuing without it", err=True)
    click.echo(f"fuzzing {', '.join(url for url, _ in target.endpoints)} for {minutes:g} min, seed {seed}", err=True)
    progress = _FuzzProgress(60 * minutes)
    try:
        result = fuzz(target, 60 * minutes, seed, keep=keep, on_example=progress.show)
    finally:
        progress.end()
    done = f"{result.examples} examples with {result.steps} steps, {result.attacks} by hostile clients"
    if result.found is None:
        click.echo(f"no failure in {done}; seed {seed}")
        return
    click.echo("failure found; shrinking it ...", err=True)
    smaller = shrink(target, result.found, SHRINK_TIME)
    found = smaller or result.found
    click.echo(f"failure in {done}; seed {seed}:\n\n{str(found.error) or type(found.error).__name__}\n")
    click.echo(f"These steps {'reproduce it' if smaller else 'did not reproduce it: it depends on timing'}.")
    program = write_script(urls, found, ca=ca, root=root)
    if script is None:
        click.echo(f"\n{program}")
    else:
        Path(script).write_text(program, encoding="utf-8")
        click.echo(f"The script is in {script}.")
    raise click.exceptions.Exit(1)


def _check_options(urls: tuple[str, ...], root: str) -> None:
    for url in urls:
        try:
            parse_address(url)
        except ValueError as error:
            raise click.UsageError(f"--url: {error}") from None
    try:
        check_channel(root)
    except PeerError as error:
        raise click.UsageError(f"--root: {error}") from None


class _FuzzProgress:
    """The progress on stderr: a bar on a terminal, otherwise a line from time to time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = self._told = time.monotonic()
        self._bar = click.progressbar(
            length=max(1, round(seconds)), file=sys.stderr, show_eta=False, item_show_func=lambda text: text
        )

    def show(self, result: FuzzResult) -> None:
        now = time.monotonic()
        spent = now - self._began
        text = f"{result.examples} examples, {result.steps} steps"
        if sys.stderr.isatty():
            self._bar.update(round(min(spent, self._seconds)) - self._bar.pos, text)
        elif now - self._told >= PROGRESS_INTERVAL:
            self._told = now
            click.echo(f"{_format_minutes(spent)} of {_format_minutes(self._seconds)}: {text}", err=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            self._bar.render_finish()


def _format_minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
