"""Head-of-line blocking: how large messages on one channel delay small ones on another, on a link that loses packets.

    sudo python bench/head_of_line.py --seconds 30 --svg docs/head_of_line.svg

One subscriber has two channels: one with a message of --big bytes twice per second, and one with a message of 100 bytes
50 times per second. It uses WebSocket, WebTransport with one stream, and WebTransport with a stream for each
subscription. Two TUN devices, one of them in a network namespace of its own, are the link between the subscriber and
the broker. A program forwards packets from one device to the other after --delay milliseconds and drops some of them,
for TCP and for QUIC alike. This needs root.

Latency is from just before the publish until the subscriber has the message, by one clock.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import trio
import trustme
from harness import SECRET, percentile

import catbus
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import AuthSettings, Config, DrainSettings, WebSocketSettings, WebTransportSettings

NAMESPACE = "catbus-hol"
BROKER_ADDRESS, SUBSCRIBER_ADDRESS = "10.77.0.1", "10.77.0.2"
MODES = {
    "websocket": "WebSocket",
    "one stream": "WebTransport, one stream",
    "own streams": "WebTransport, a stream each",
}
LOSSES = (0.0, 1.0, 5.0)
SMALL_RATE, BIG_RATE = 50.0, 2.0
WARM_UP_TIME = 2.0
ROOT = Path(__file__).parent.parent

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


# The link


def open_tun(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return handle


def forward_packets(here: int, there: int, delay: float, loss: float) -> None:
    """Forward packets in both directions after `delay` seconds, dropping the share `loss` of them, until killed."""
    chance = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([here, there], [], [], timeout)
        now = time.monotonic()
        for handle in ready:
            while True:
                try:
                    packet = os.read(handle, 65_536)
                except BlockingIOError:
                    break
                if chance.random() >= loss:
                    number += 1
                    heapq.heappush(waiting, (now + delay, number, there if handle == here else here, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, handle, packet = heapq.heappop(waiting)
            os.write(handle, packet)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def link(delay: float, loss: float) -> Iterator[None]:
    """Open a link between `BROKER_ADDRESS` in this namespace and `SUBSCRIBER_ADDRESS` in the other one."""
    handles = [open_tun("catbus-hol0"), open_tun("catbus-hol1")]
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "set", "catbus-hol1", "netns", NAMESPACE)
        inside = ["netns", "exec", NAMESPACE, "ip"]
        ip("address", "add", BROKER_ADDRESS, "peer", SUBSCRIBER_ADDRESS, "dev", "catbus-hol0")
        ip("link", "set", "catbus-hol0", "up")
        ip(*inside, "address", "add", SUBSCRIBER_ADDRESS, "peer", BROKER_ADDRESS, "dev", "catbus-hol1")
        ip(*inside, "link", "set", "catbus-hol1", "up")
        ip(*inside, "link", "set", "lo", "up")
        command = [sys.executable, __file__, "--forward", *map(str, handles), str(delay), str(loss)]
        with subprocess.Popen(command, pass_fds=handles) as forwarder:
            try:
                yield
            finally:
                forwarder.kill()
    finally:
        for handle in handles:
            os.close(handle)
        ip("netns", "delete", NAMESPACE)


# The subscriber, in the other namespace


async def subscribe(url: str, ca: str, mode: str, seconds: float) -> None:
    """Print the latencies of the small and of the large messages, in seconds, as JSON."""
    token = sign(SECRET, client_id="bench", grants=Grants(("*",), ("*",)))
    found: dict[str, list[float]] = {"hol.small": [], "hol.big": []}
    async with catbus.connect(url, token=token, ca=ca) as bus, trio.open_nursery() as nursery:

        async def follow(channel: str) -> None:
            async with bus.subscribe(channel, stream=mode == "own streams") as messages:
                async for message in messages:
                    found[channel].append(time.time() - message.payload["sent"])

        for channel in found:
            nursery.start_soon(follow, channel)
        await trio.sleep(WARM_UP_TIME)
        for latencies in found.values():
            latencies.clear()
        await trio.sleep(seconds)
        print(json.dumps(found), flush=True)
        nursery.cancel_scope.cancel()


# The broker and the publisher, in this one


async def publish(broker: catbus.Broker, channel: str, rate: float, size: int) -> None:
    due = trio.current_time()
    while True:
        await broker.publish(channel, {"sent": time.time(), "text": "x" * size})
        due += 1 / rate
        await trio.sleep_until(due)


async def measure(config: Config, ca: str, mode: str, options: argparse.Namespace) -> dict[str, list[float]]:
    async with trio.open_nursery() as nursery:
        broker = await nursery.start(catbus.serve, config)
        nursery.start_soon(publish, broker, "hol.small", SMALL_RATE, 100)
        nursery.start_soon(publish, broker, "hol.big", BIG_RATE, options.big)
        addresses = dict(broker.addresses)
        url = f"ws://{addresses['websocket']}/ws" if mode == "websocket" else f"https://{addresses['webtransport']}"
        command = ["ip", "netns", "exec", NAMESPACE, sys.executable, __file__, "--subscribe", url, ca, mode]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = await trio.run_process([*command, str(options.seconds)], capture_stdout=True, env=environment)
        nursery.cancel_scope.cancel()
    result: dict[str, list[float]] = json.loads(done.stdout)
    return result


def configuration(directory: Path) -> tuple[Config, str]:
    authority = trustme.CA()
    issued = authority.issue_cert(BROKER_ADDRESS)
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    config = Config(
        auth=AuthSettings(secrets=(SECRET,)),
        websocket=WebSocketSettings(bind=(f"{BROKER_ADDRESS}:0",)),
        webtransport=WebTransportSettings(
            bind=(f"{BROKER_ADDRESS}:0",), cert=str(directory / "cert.pem"), key=str(directory / "key.pem")
        ),
        drain=DrainSettings(delay=0, window=0, deadline=0),
    )
    return config, str(directory / "ca.pem")


# The results


def draw(rows: list[dict[str, Any]]) -> str:
    """Draw the p99 latency of the small messages as bars, in SVG."""
    colours = ("#b5543c", "#8a8f98", "#3b6ea5")
    most = max(row["p99"] for row in rows)
    height, left, group, bar = 220, 60, 150, 40
    parts = []
    for index, row in enumerate(rows):
        x = left + group * (index // len(MODES)) + bar * (index % len(MODES)) + 12
        size = height * row["p99"] / most
        parts.append(
            f'<rect x="{x}" y="{20 + height - size:.1f}" width="{bar - 4}" height="{size:.1f}" '
            f'fill="{colours[index % len(MODES)]}"/>'
            f'<text x="{x + bar / 2 - 2}" y="{14 + height - size:.1f}" text-anchor="middle">{row["p99"]:.0f}</text>'
        )
    for index, loss in enumerate(dict.fromkeys(row["loss"] for row in rows)):
        x = left + group * index + 12 + bar * 1.5
        parts.append(f'<text x="{x}" y="{height + 38}" text-anchor="middle">{loss:g} % lost</text>')
    for index, name in enumerate(MODES.values()):
        y = height + 62 + 18 * index
        parts.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="{colours[index]}"/>')
        parts.append(f'<text x="{left + 20}" y="{y}">{name}</text>')
    width = left + group * len(LOSSES) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 118}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="14" y="{20 + height / 2}" transform="rotate(-90 14 {20 + height / 2})" text-anchor="middle">'
        f"p99 of small messages, ms</text>{''.join(parts)}"
        f'<path d="M{left} 20V{height + 20}H{width - 10}" fill="none" stroke="black"/></svg>\n'
    )


def main() -> None:
    if sys.argv[1:2] == ["--forward"]:
        here, there, delay, loss = sys.argv[2:]
        forward_packets(int(here), int(there), float(delay), float(loss))
    if sys.argv[1:2] == ["--subscribe"]:
        url, ca, mode, seconds = sys.argv[2:]
        trio.run(subscribe, url, ca, mode, float(seconds))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of each measurement")
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds in each direction")
    parser.add_argument("--big", type=int, default=50_000, help="bytes of a large message")
    parser.add_argument(
        "--losses", type=float, nargs="+", default=LOSSES, help="lost packets in each direction, in percent"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the p99 latency into this file")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("this program needs root to make network devices")
    harness.prepare()
    print(harness.describe_machine())
    print(f"{options.delay:g} ms each way; latency of messages of 100 bytes beside {options.big} bytes twice a second")
    print("| lost | over | small p50 ms | small p99 ms | large p50 ms | large p99 ms | small received |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        config, ca = configuration(Path(name))
        for loss in options.losses:
            for mode, title in MODES.items():
                with link(options.delay / 1000, loss / 100):
                    found = trio.run(measure, config, ca, mode, options)
                small, big = (sorted(1000 * each for each in found[channel]) for channel in ("hol.small", "hol.big"))
                rows.append({"loss": loss, "mode": mode, "p99": percentile(small, 0.99)})
                figures = " | ".join(f"{percentile(each, share):.0f}" for each in (small, big) for share in (0.5, 0.99))
                print(f"| {loss:g} % | {title} | {figures} | {len(small)} |", flush=True)
    if options.svg is not None:
        options.svg.write_text(draw(rows))


if __name__ == "__main__":
    main()
