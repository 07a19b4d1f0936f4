"""A web application on Quart that embeds the broker: one process, one nursery, one login for both.

    python examples/embedding.py

Settings of the broker come from the environment, as for `catbus run`; without a database, the log is in memory.
"""

import os
import secrets
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config as WebConfig
from hypercorn.trio import serve as serve_web
from quart import request
from quart_trio import QuartTrio

import catbus
from catbus import AuthenticatedClient, ClientInfo, ErrorCode, Refused, Replacement

app = QuartTrio(__name__)
users: dict[str, str] = {}  # by token; a real application has them in its database
online: Counter[str] = Counter()  # sessions of each user


def broker() -> catbus.Broker:
    found: catbus.Broker = app.extensions["catbus"]
    return found


@app.post("/login")
async def log_in() -> dict[str, str]:
    token = secrets.token_urlsafe(32)
    users[token] = (await request.get_json())["user"]
    return {"token": token, "url": broker().urls[0]}


@app.post("/orders/<int:number>")
async def pay(number: int) -> dict[str, Any]:
    return {"seq": await broker().publish(f"orders.{number}", {"status": "paid"}, sender="shop")}


@app.get("/orders/<int:number>")
async def show(number: int) -> dict[str, Any]:
    page = await broker().history(f"orders.{number}")
    return {"events": [message.payload for message in page.messages]}


@app.get("/online")
async def list_online() -> dict[str, Any]:
    return {"users": sorted(online)}


async def authenticate(token: str, client: ClientInfo) -> AuthenticatedClient | None:
    user = users.get(token)
    if user is None:
        return None  # It may be one of the broker's own tokens.
    return AuthenticatedClient(user, read=["orders.*", "chat"], write=["chat"])


async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Replacement:
    match payload:
        case {"text": str(text)} if len(text) <= 500:
            return Replacement({"text": text.strip()})
    raise Refused(ErrorCode.BAD_MESSAGE, "a text of at most 500 characters is needed")


@asynccontextmanager
async def on_session(client: ClientInfo) -> AsyncIterator[None]:
    user = str(client.client_id)
    online[user] += 1
    try:
        yield
    finally:
        online[user] -= 1
        if not online[user]:
            del online[user]


async def wait_for_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        await anext(signals)


async def main() -> None:
    config = catbus.load(None, os.environ)
    web = WebConfig.from_mapping(bind=os.environ.get("WEB_BIND", "127.0.0.1:8000"))
    async with trio.open_nursery() as nursery:
        app.extensions["catbus"] = await nursery.start(
            partial(catbus.serve, config, authenticate=authenticate, on_publish=on_publish, on_session=on_session)
        )
        # Requests need the broker, so the web server starts after it, and stops before it.
        await serve_web(app, web, shutdown_trigger=wait_for_signal)
        broker().stop()


if __name__ == "__main__":
    trio.run(main)
