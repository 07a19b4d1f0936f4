"""The steps that each client of event streams runs against the broker, over one network path."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from unittest import mock

import httpx
import trio

import catbus
from catbus.session import heads
from tests.brokers import TOKEN
from tests.conformance.event_stream_clients import CertificateAuthority, EventStreamClient, Receive
from tests.conformance.third_party_clients import Unsupported

NUMBER = 20
"""Messages in a step."""
ARRIVAL_TIMEOUT = 20
"""Seconds for a message, or for a client to reconnect."""
CLIENT_ID = "alice"
"""The client of the token."""
HEADS = 8
"""Heads on a quiet stream. The broker sends them 1 s apart here."""


@dataclass(frozen=True)
class EventStreamUnderTest:
    """A client, the URL of an event stream with a pattern, and the broker at its end."""

    client: EventStreamClient
    url: str
    ca: CertificateAuthority
    broker: catbus.Broker

    @property
    def epoch(self) -> str:
        return self.broker.replica.log.epoch

    async def publish(self, payload: int) -> int:
        seq = await self.broker.publish("stream.x", payload)
        assert seq is not None
        return seq

    @asynccontextmanager
    async def open(self, last_id: str = "") -> AsyncIterator[Receive]:
        """Open a stream. The broker has subscribed its client when the context begins."""
        newest = max((session.id for session in self.broker.replica.sessions_after(0)), default=0)
        async with self.client.open(self.url, last_id, self.ca) as receive:
            with trio.fail_after(ARRIVAL_TIMEOUT):
                while not any(
                    opened.driver.session.subscriptions for opened in self.broker.replica.sessions_after(newest)
                ):
                    await trio.sleep(0.005)
            yield receive

    async def disconnect(self) -> None:
        """End all streams of the client, as an administrator can."""
        assert await self.broker.replica.disconnect_client(CLIENT_ID)
        with trio.fail_after(ARRIVAL_TIMEOUT):
            while self.broker.replica.sessions:
                await trio.sleep(0.005)

    async def expect(self, receive: Receive, *messages: tuple[int, int]) -> str:
        """Receive exactly these messages, each a seq and a payload. Returns the last `id`."""
        last_id = ""
        for seq, payload in messages:
            with trio.fail_after(ARRIVAL_TIMEOUT):
                message = await receive()
            assert (message.seq, message.payload) == (seq, payload), (message, seq, payload)
            last_id = message.last_id
            assert last_id == f"{seq}.{self.epoch}", message
        return last_id


async def at_once(stream: EventStreamUnderTest) -> None:
    """each message arrives before the next one is published"""
    async with stream.open() as receive:
        for number in range(NUMBER):
            await stream.expect(receive, (await stream.publish(number), number))


async def killed(stream: EventStreamUnderTest) -> None:
    """a client that is killed and started again with the last `id`"""
    async with stream.open() as receive:
        last_id = await stream.expect(receive, (await stream.publish(0), 0))
    missed = [(await stream.publish(number), number) for number in range(NUMBER)]
    async with stream.open(last_id) as receive:
        await stream.expect(receive, *missed)
        await stream.expect(receive, (await stream.publish(-1), -1))


async def reconnect(stream: EventStreamUnderTest) -> None:
    """a stream that the broker ends, twice: the client reconnects by itself and resumes"""
    if not stream.client.reconnects:
        raise Unsupported("does not reconnect by itself")
    async with stream.open() as receive:
        await stream.expect(receive, (await stream.publish(0), 0))
        for first in (1, 1 + NUMBER):
            await stream.disconnect()
            missed = [(await stream.publish(number), number) for number in range(first, first + NUMBER)]
            await stream.expect(receive, *missed)


EventStreamStep = Callable[[EventStreamUnderTest], Awaitable[None]]
EVENT_STREAM_STEPS: tuple[EventStreamStep, ...] = (at_once, killed, reconnect)


async def quiet(stream: EventStreamUnderTest) -> None:
    """a stream without messages stays open for longer than the timeouts of its proxy"""
    verify = True if stream.ca is None else ssl.create_default_context(cafile=stream.ca)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with mock.patch.object(heads, "HEAD_INTERVAL", 0.5), trio.fail_after(ARRIVAL_TIMEOUT):
        async with (
            httpx.AsyncClient(verify=verify, timeout=None) as client,
            client.stream("GET", stream.url, headers=headers) as response,
        ):
            found = 0
            async for line in response.aiter_lines():
                found += line.startswith("id: ")
                if found == HEADS:
                    await stream.publish(1)
                elif line.startswith("data: ") and found > HEADS:
                    return
    raise AssertionError(f"the stream ended after {found} heads")
