"""A worker that charges each order exactly once, also if it is killed. Start as many as you like.

The transaction that inserts the charge also moves the position of the consumer. So it is the acknowledgement.
"""

import asyncio
import os

import asyncpg  # type: ignore[import-untyped]

import catbus

DURATION = float(os.environ.get("CHARGE_SECONDS", "0.5"))
"""How long it takes to charge an order, so that there is something to see, and time to kill the worker."""


async def charge(connection: asyncpg.Connection, message: catbus.ConsumerMessage) -> None:
    order = message.payload
    await connection.execute(
        "INSERT INTO shop.charges (order_id, cents, worker) VALUES ($1, $2, $3)",
        order["id"],
        order["cents"],
        os.getpid(),
    )
    await asyncio.sleep(DURATION)
    await connection.execute("SELECT shop.announce('charged', $1)", order["id"])


# A killed process counts as an attempt, and visitors may kill it as often as they like: so there is no last attempt.
asyncio.run(catbus.consume(os.environ["DATABASE_URL"], "charging", charge, attempts=None))
