"""A shop that keeps its orders in PostgreSQL, in the database of the broker, and publishes by SQL."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import asyncpg  # type: ignore[import-untyped]

MENU = {"Espresso": 250, "Cappuccino": 340, "Croissant": 280}
"""Prices in cents."""

P = ParamSpec("P")
T = TypeVar("T")


def run(
    url: str, function: Callable[Concatenate[asyncpg.Connection, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call a function with a connection, in a transaction. It blocks the thread. A real application has a pool."""

    async def connect() -> T:
        connection = await asyncpg.connect(url)
        try:
            async with connection.transaction():
                return await function(connection, *args, **kwargs)
        finally:
            await connection.close()

    return asyncio.run(connect())


async def set_up(connection: asyncpg.Connection) -> None:
    """Make the tables and the consumer of the worker, if there are none."""
    await connection.execute((Path(__file__).parent / "setup.sql").read_text())


async def deliver_mails_to(connection: asyncpg.Connection, url: str) -> str:
    """Have the broker deliver charged orders to a URL. Returns the secret that signs the requests."""
    # The program may have run before, with another URL: then the deliveries continue where they were.
    cursor = await connection.fetchval("SELECT cursor::text FROM catbus.consumer_positions() WHERE consumer = 'mails'")
    if cursor is not None:
        await connection.execute("SELECT catbus.drop_consumer('mails')")
    await connection.execute(
        "SELECT catbus.create_consumer('mails', 'orders.charged.*', start => $1, hold => true, push => $2)",
        cursor or "head",
        url,
    )
    return str(await connection.fetchval("SELECT catbus.webhook_secret('mails')"))


async def send_mails(connection: asyncpg.Connection, orders: list[int]) -> None:
    """Send a mail for each order, unless that has happened. Here it is a row."""
    sent = await connection.fetch(
        "INSERT INTO shop.mails SELECT unnest($1::bigint[]) ON CONFLICT DO NOTHING RETURNING order_id", orders
    )
    await connection.executemany("SELECT shop.announce('mailed', $1)", sent)


async def place_order(connection: asyncpg.Connection, customer: str, item: str) -> None:
    """Insert an order, and publish it in the same transaction: there is never one without the other."""
    number = await connection.fetchval(
        "INSERT INTO shop.orders (customer, item, cents) VALUES ($1, $2, $3) RETURNING id", customer, item, MENU[item]
    )
    await connection.execute("SELECT shop.announce('placed', $1)", number)


async def list_orders(connection: asyncpg.Connection) -> dict[str, Any]:
    """The newest orders, and the position in the log after which their changes follow: first the position is read."""
    epoch, head, _ = await connection.fetchrow("SELECT * FROM catbus.position()")
    rows = await connection.fetch("SELECT * FROM shop.order_list ORDER BY id DESC LIMIT 100")
    return {"epoch": epoch, "head": head, "orders": [dict(row) for row in rows], "menu": MENU}
