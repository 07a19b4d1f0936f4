"""How many messages the client takes in, and how many it publishes, a second: `python -m tests.client.bench`.

The broker is a process of its own that sends frames made beforehand and answers publishes without looking at them
closely, so that what is measured is the client. Prints microseconds of the client's own CPU for a message.
"""

from __future__ import annotations

import multiprocessing
import re
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import anyio
import msgspec
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Request, TextMessage

from catbus.client import Bus, connect
from tests.client.scripted_broker import AUTH_OK, message

PAYLOAD = {"status": "paid", "text": "x" * 100}
FRAME = 500


def broker(listener: socket.socket) -> None:
    while True:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(peer,), daemon=True).start()


def serve(peer: socket.socket) -> None:
    connection = WSConnection(ConnectionType.SERVER)

    def say(text: str) -> None:
        peer.sendall(connection.send(TextMessage(data=text)))

    seq = 0
    while data := peer.recv(1 << 18):
        connection.receive_data(data)
        for event in connection.events():
            match event:
                case Request():
                    peer.sendall(connection.send(AcceptConnection()))
                case CloseConnection():
                    peer.sendall(connection.send(event.response()))
                    return
                case TextMessage() if '"auth"' in event.data:
                    say(msgspec.json.encode(AUTH_OK).decode() + "\n")
                case TextMessage() if '"subscribe"' in event.data:
                    count = int(re.findall(r'"since":(\d+)', event.data)[0])
                    say('{"type":"subscribed","pattern":"a.*","seq":0}\n')
                    template = msgspec.json.encode(message(0, PAYLOAD, "a.*", "a.b")).decode() + "\n"
                    for first in range(count, 2 * count, FRAME):
                        lines = [template.replace('"seq":0', f'"seq":{first + i + 1}') for i in range(FRAME)]
                        say("".join(lines))
                case TextMessage():
                    ids = re.findall(r'"id":(\d+)', event.data)
                    replies = []
                    for number in ids:
                        seq += 1
                        replies.append(f'{{"type":"published","channel":"a.b","id":{number},"seq":{seq}}}\n')
                    if replies:
                        say("".join(replies))


async def measure(what: str, count: int, work: Awaitable[object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    await work
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {what:<34}{count / wall:>10,.0f}/s{cpu / count * 1e6:>10.2f} us CPU")


async def receive(bus: Bus, count: int) -> None:
    async with bus.subscribe("a.*", since=count) as messages:
        async for item in messages:
            if item.seq == 2 * count:
                break


async def publish_each(bus: Bus, count: int) -> None:
    for _ in range(count):
        await bus.publish("a.b", PAYLOAD)


async def publish_side_by_side(bus: Bus, count: int, tasks: int) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(publish_each, bus, count // tasks)


async def main(url: str) -> None:
    async with connect(url, token="t") as bus:
        await measure("received, 500 a frame", 200_000, receive(bus, 200_000))
        await measure("publish_many", 100_000, bus.publish_many([("a.b", PAYLOAD)] * 100_000))
        await measure("publish, one after another", 3_000, publish_each(bus, 3_000))
        await measure("publish, 100 tasks", 20_000, publish_side_by_side(bus, 20_000, 100))


def profiled(run: Callable[[], object]) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.runcall(run)
    pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}/ws"
        process = multiprocessing.get_context("fork").Process(target=broker, args=(listener,), daemon=True)
        process.start()
        for backend in ("asyncio", "trio"):
            print(backend)
            if "--profile" in sys.argv:
                profiled(lambda backend=backend: anyio.run(main, url, backend=backend))  # type: ignore[misc]
            else:
                anyio.run(main, url, backend=backend)
        process.terminate()
