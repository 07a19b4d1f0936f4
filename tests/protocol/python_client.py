"""The Python client as a `Peer` of `conversations`: what it is to say, it says by a call; what comes of it is heard."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import trio

import catbus
from catbus.client import Bus, Gap, Live, Messages
from catbus.errors import Disconnected, Refused


class Client:
    def __init__(self, nursery: trio.Nursery, url: str, ca: str | None) -> None:
        self._nursery = nursery
        self._connect = partial(catbus.connect, url, ca=ca, reconnect=False)
        self._bus: Bus | None = None
        self._leaving = trio.Event()
        self._subscriptions: dict[str, trio.CancelScope] = {}
        self._news, self._heard = trio.open_memory_channel[dict[str, Any]](100)

    async def say(self, text: str) -> bool:
        try:
            message = json.loads(text)
        except ValueError:
            return False
        return isinstance(message, dict) and await self._do(message)

    async def hear(self) -> dict[str, Any]:
        return await self._heard.receive()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self._leaving.set()

    async def _do(self, message: dict[str, Any]) -> bool:
        """Whether there is a call that says it."""
        bus = self._bus
        match message:
            case {"type": "auth", "protocol": 1} if "producer" not in message and bus is None:
                await self._nursery.start(self._stay, message["token"])
            case {"type": "subscribe"} if bus is not None:
                await self._nursery.start(self._subscribe, bus, message)
            case {"type": "unsubscribe", "pattern": pattern} if pattern in self._subscriptions:
                self._subscriptions.pop(pattern).cancel()
                self._tell("unsubscribed", message)
            case {"type": "publish"} if bus is not None and "retry" not in message:
                await self._publish(bus, message)
            case {"type": "history"} if bus is not None:
                page = await bus.history(message["pattern"], limit=message["limit"])
                self._tell("history", message, more=page.more, messages=[_restated(each) for each in page.messages])
            case {"type": "ping"} if bus is not None:
                await bus.ping()
                self._tell("pong", message, seq=message["seq"])
            case _:
                return False
        return True

    def _tell(self, kind: str, request: dict[str, Any], **found: Any) -> None:
        repeated = {name: request[name] for name in ("id", "pattern", "channel") if name in request}
        self._news.send_nowait({"type": kind, **repeated, **found})

    async def _stay(self, token: str, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with self._connect(token=token) as bus:
                self._bus = bus
                self._tell(
                    "auth_ok", {}, client_id=bus.client_id, producer=bus.producer,
                    epoch=bus.epoch, head=bus.head, floor=bus.floor,
                )  # fmt: skip
                task_status.started()
                await self._leaving.wait()
                for subscription in self._subscriptions.values():
                    subscription.cancel()
        except Refused as error:
            self._tell("auth_error", {}, code=error.code.value, message=error.message)
            task_status.started()

    async def _subscribe(self, bus: Bus, message: dict[str, Any], *, task_status: trio.TaskStatus[None]) -> None:
        def tell(event: object) -> None:
            if isinstance(event, Live):
                self._tell("live", message, seq=event.seq)
            elif isinstance(event, Gap):
                gap = {"from": event.first, "to": event.last, "epoch": event.epoch, "reason": event.reason}
                self._tell("gap", message, **gap)

        pattern = message["pattern"]
        where = {name: message[name] for name in ("since", "epoch") if name in message}
        try:
            async with bus.subscribe(pattern, **where, on_event=tell) as messages:
                self._tell("subscribed", message, seq=messages.cursor)
                with trio.CancelScope() as scope:
                    self._subscriptions[pattern] = scope
                    task_status.started()
                    await self._listen(messages)
        except Refused as error:
            self._tell("subscribe_error", message, code=error.code.value, message=error.message)
            task_status.started()
        except Disconnected:
            # Being cancelled and the end of the connection come at the same moment.
            if not self._leaving.is_set():
                raise

    async def _listen(self, messages: Messages) -> None:
        async for message in messages:
            self._news.send_nowait(_restated(message))

    async def _publish(self, bus: Bus, message: dict[str, Any]) -> None:
        options = {name: message[name] for name in ("ephemeral", "echo") if name in message}
        try:
            seq = await bus.publish(message["channel"], message["payload"], **options)
        except Refused as error:
            self._tell("publish_error", message, code=error.code.value, message=error.message)
        else:
            if message.get("ack", True):
                self._tell("published", message, **({} if seq is None else {"seq": seq}))


def _restated(message: catbus.client.Message) -> dict[str, Any]:
    """A message as it is on the wire."""
    found = {"seq": message.seq, "at": message.at, "sender": message.sender, "pattern": message.pattern}
    present = {name: value for name, value in found.items() if value is not None}
    return {"type": "message", "channel": message.channel, "payload": message.payload, **present}


async def open_client(nursery: trio.Nursery, url: str, ca: str | None) -> Client:
    await trio.lowlevel.checkpoint()
    return Client(nursery, url, ca)
