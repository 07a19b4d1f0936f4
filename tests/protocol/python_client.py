"""The Python client as a `ScriptedClient`: it sends by calls of `Bus` and receives their results as objects."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import trio

import catbus
from catbus.client import Bus, Gap, Live, Messages
from catbus.errors import Disconnected, Refused


class PythonClient:
    def __init__(self, nursery: trio.Nursery, url: str, ca: str | None) -> None:
        self._nursery = nursery
        self._connect = partial(catbus.connect, url, ca=ca, reconnect=False)
        self._bus: Bus | None = None
        self._closing = trio.Event()
        self._subscriptions: dict[str, trio.CancelScope] = {}
        self._results, self._received = trio.open_memory_channel[dict[str, Any]](100)

    async def send(self, text: str) -> bool:
        try:
            message = json.loads(text)
        except ValueError:
            return False
        return isinstance(message, dict) and await self._call(message)

    async def receive(self) -> dict[str, Any]:
        return await self._received.receive()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self._closing.set()

    async def _call(self, message: dict[str, Any]) -> bool:
        """Make the call that sends the message. Returns False if there is none."""
        bus = self._bus
        match message:
            case {"type": "auth", "protocol": 1} if "producer" not in message and bus is None:
                await self._nursery.start(self._run, message["token"])
            case {"type": "subscribe"} if bus is not None and not {"retained", "presence"} & message.keys():
                await self._nursery.start(self._subscribe, bus, message)
            case {"type": "unsubscribe", "pattern": pattern} if pattern in self._subscriptions:
                self._subscriptions.pop(pattern).cancel()
                self._report("unsubscribed", message)
            case {"type": "publish"} if bus is not None and not {"retry", "retain", "expect"} & message.keys():
                await self._publish(bus, message)
            case {"type": "history"} if bus is not None:
                page = await bus.history(message["pattern"], limit=message["limit"])
                self._report("history", message, more=page.more, messages=[_as_object(each) for each in page.messages])
            case {"type": "ping"} if bus is not None:
                await bus.ping()
                self._report("pong", message, seq=message["seq"])
            case _:
                return False
        return True

    def _report(self, kind: str, request: dict[str, Any], **found: Any) -> None:
        repeated: dict[str, Any] = {name: request[name] for name in ("id", "pattern", "channel") if name in request}
        self._results.send_nowait({"type": kind, **repeated, **found})

    async def _run(self, token: str, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with self._connect(token=token) as bus:
                self._bus = bus
                self._report(
                    "auth_ok", {}, client_id=bus.client_id, producer=bus.producer,
                    epoch=bus.epoch, head=bus.head, floor=bus.floor,
                )  # fmt: skip
                task_status.started()
                await self._closing.wait()
                for subscription in self._subscriptions.values():
                    subscription.cancel()
        except Refused as error:
            self._report("auth_error", {}, code=error.code.value, message=error.message)
            task_status.started()

    async def _subscribe(self, bus: Bus, message: dict[str, Any], *, task_status: trio.TaskStatus[None]) -> None:
        def report(event: object) -> None:
            if isinstance(event, Live):
                self._report("live", message, seq=event.seq)
            elif isinstance(event, Gap):
                gap = {"from": event.first, "to": event.last, "epoch": event.epoch, "reason": event.reason}
                self._report("gap", message, **gap)

        pattern = message["pattern"]
        where = {name: message[name] for name in ("since", "epoch") if name in message}
        try:
            async with bus.subscribe(pattern, **where, on_event=report) as messages:
                self._report("subscribed", message, seq=messages.cursor)
                with trio.CancelScope() as scope:
                    self._subscriptions[pattern] = scope
                    task_status.started()
                    await self._listen(messages)
        except Refused as error:
            self._report("subscribe_error", message, code=error.code.value, message=error.message)
            task_status.started()
        except Disconnected:
            # The cancellation and the end of the connection happen at the same moment.
            if not self._closing.is_set():
                raise

    async def _listen(self, messages: Messages) -> None:
        async for message in messages:
            self._results.send_nowait(_as_object(message))

    async def _publish(self, bus: Bus, message: dict[str, Any]) -> None:
        options = {name: message[name] for name in ("ephemeral", "echo") if name in message}
        try:
            seq = await bus.publish(message["channel"], message["payload"], **options)
        except Refused as error:
            self._report("publish_error", message, code=error.code.value, message=error.message)
        else:
            if message.get("ack", True):
                self._report("published", message, **({} if seq is None else {"seq": seq}))


def _as_object(message: catbus.client.Message) -> dict[str, Any]:
    """The message as on the wire."""
    found = {"seq": message.seq, "at": message.at, "sender": message.sender, "pattern": message.pattern}
    present = {name: value for name, value in found.items() if value is not None}
    return {"type": "message", "channel": message.channel, "payload": message.payload, **present}


async def open_client(nursery: trio.Nursery, url: str, ca: str | None) -> PythonClient:
    await trio.lowlevel.checkpoint()
    return PythonClient(nursery, url, ca)
