"""The commands of `catbus consumer` for consumers whose messages replicas deliver to a URL."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click
import trio

from ..config import Config, parse_duration, redact_url
from ..postgres.webhooks.webhook_administration import (
    WebhookAdministration,
    WebhookPartition,
    WebhookReport,
    open_webhooks,
)
from ..webhooks.public_addresses import AddressRules
from ..webhooks.signed_request import SignedRequest, encode_test
from ..webhooks.verdicts import AttemptResult, Outcome
from .database_access import database_options, load_database, open_database
from .text_tables import format_time

T = TypeVar("T")

secret_option = click.option(
    "--secret-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help='The signing secret: "whsec_" and 24 to 64 bytes in base64; - for stdin. [a random one]',
)


def with_consumers(
    config: Config, work: Callable[[WebhookAdministration], Awaitable[T]], *, prepare: bool = False
) -> T:
    """Run `work` on the consumers in the database and return its result. With `prepare`, migrate the schema before."""

    async def go() -> T:
        async with open_database(config) as database, open_webhooks(database, prepare=prepare) as consumers:
            return await work(consumers)

    return trio.run(go)


def read_secret(path: Path | None) -> str | None:
    """Read the signing secret that `secret_option` names."""
    if path is None:
        return None
    try:
        return str(click.open_file(str(path)).read(1024)).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"the secret cannot be read: {error}") from None


def webhook_as_dict(webhook: WebhookReport) -> dict[str, object]:
    """The deliveries of a consumer, as JSON has them."""
    return {
        "url": webhook.url,
        "paused": _format(webhook.paused),
        "reason": webhook.reason,
        "partitions": [_partition_as_dict(partition) for partition in webhook.partitions],
    }


def _partition_as_dict(partition: WebhookPartition) -> dict[str, object]:
    return {
        "partition": partition.partition,
        "delivering": partition.delivering,
        "failures": partition.failures,
        "due": _format(partition.due),
        "error": partition.error,
        "failed": _format(partition.failed),
        "delivered": _format(partition.delivered),
    }


def _format(time: datetime | None) -> str | None:
    return None if time is None else format_time(time)


@click.command("secret", short_help="Show or change the secret that signs deliveries.")
@click.argument("name")
@click.option("--rotate", is_flag=True, help="Make another one.")
@click.option("--overlap", default="24h", show_default=True, help="How long the former one signs, too.")
@secret_option
@database_options
def secret(
    name: str,
    rotate: bool,
    overlap: str,
    secret_file: Path | None,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Show the secret that signs the deliveries of the consumer NAME.

    With --rotate, it is replaced. For some time each delivery has two signatures, by the new secret and by the former
    one, so that receivers can change theirs without missing one.

    \b
    Examples:
      catbus consumer secret mails
      catbus consumer secret mails --rotate --overlap 1h
    """
    if secret_file is not None and not rotate:
        raise click.UsageError("--secret-file needs --rotate")
    try:
        seconds = parse_duration(overlap)
    except ValueError:
        raise click.UsageError(f'--overlap is a duration like "24h", not "{overlap}"') from None
    given = read_secret(secret_file)

    async def work(consumers: WebhookAdministration) -> str:
        if rotate:
            return await consumers.rotate_webhook_secret(name, given, seconds)
        return await consumers.webhook_secret(name)

    click.echo(with_consumers(load_database(config, database, state), work))


@click.command("pause", short_help="Pause the deliveries of a consumer.")
@click.argument("name")
@click.option("--reason", metavar="TEXT", help="Shown by `catbus consumer show`.")
@database_options
def pause(name: str, reason: str | None, config: Path | None, database: str | None, state: str | None) -> None:
    """Pause the deliveries of the consumer NAME. It keeps its position; a request that has begun is not interrupted.

    \b
    Examples:
      catbus consumer pause mails --reason 'the receiver moves'
    """
    with_consumers(load_database(config, database, state), lambda consumers: consumers.pause(name, reason))
    click.echo(f"paused {name}", err=True)


@click.command("resume", short_help="Resume the deliveries of a consumer.")
@click.argument("name")
@database_options
def resume(name: str, config: Path | None, database: str | None, state: str | None) -> None:
    """Resume the deliveries of the consumer NAME. A batch that waits for its next attempt is delivered at once.

    Use it when a receiver that responded with 410, or that failed for long, works again.

    \b
    Examples:
      catbus consumer resume mails
    """
    with_consumers(load_database(config, database, state), lambda consumers: consumers.resume(name))
    click.echo(f"resumed {name}", err=True)


@click.command("test", short_help="Send a test to the URL of a consumer.")
@click.argument("name")
@database_options
def test(name: str, config: Path | None, database: str | None, state: str | None) -> None:
    """Send a signed event of the type `catbus.test` to the URL of the consumer NAME, and print what came of it.

    The request comes from this machine, with the `timeout` and the `allow` of [webhooks] in the configuration. Nothing
    is retried, and the position of the consumer stays.

    \b
    Examples:
      catbus consumer test mails
    """
    settings = load_database(config, database, state)

    async def work(consumers: WebhookAdministration) -> tuple[str, AttemptResult]:
        key = await consumers.webhook_secret(name)
        webhook = await consumers.webhook(name)
        assert webhook is not None
        url = webhook.url
        return url, await _send_test(
            settings, SignedRequest(_new_id(), url, encode_test(name, datetime.now(UTC)), [key])
        )

    url, result = with_consumers(settings, work)
    url = redact_url(url)
    if result.outcome is not Outcome.DELIVERED:
        raise click.ClickException(f"{url}: {result.text}")
    click.echo(f"{url}: {result.text}")


async def _send_test(settings: Config, request: SignedRequest) -> AttemptResult:
    # The HTTP client takes 0.1 s to import.
    from ..webhooks.webhook_sender import WebhookSender

    sender = WebhookSender(AddressRules(settings.webhooks.allow), 1)
    try:
        return await sender.send(request, time.time(), settings.webhooks.timeout)
    finally:
        await sender.close()


def _new_id() -> str:
    return f"msg_{secrets.token_hex(16)}"


COMMANDS = (secret, pause, resume, test)
