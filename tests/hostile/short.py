"""Each attack in a short form, until some of it has arrived, and the conditions that hold at any speed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby

from catbus.testing.hostile_client import CLOSE_CODES

from .attacks import Attack, Ended, Tally, Target, attackers
from .broker import Broker, brokers
from .honest import fill, token
from .measure import SPARE_FILES
from .peers import Peer, QuicPeer, WebSocketPeer, frame, request

FILLED = 1000
MESSAGES = 10
ENOUGH_UNITS, ENOUGH_BYTES = 20, 256 << 10
"""Bytes that an attacker must have sent, unless it was closed before."""
BOUND = 64 << 20
"""Bytes by which a short attack may make the process grow, besides the log."""
WAIT = 30.0
"""Seconds after which a condition has failed."""
CHANNEL = "honest.short"


class Pair:
    """An honest publisher and its subscriber."""

    def __init__(self, target: Target, *, quic: bool) -> None:
        make = QuicPeer if quic else WebSocketPeer
        self._publisher, self._subscriber = make(target, token("publisher")), make(target, token("subscriber"))
        self._read = b""
        self._number = 0
        _say(self._subscriber, request("subscribe", pattern=CHANNEL))
        self._wait(rb'"subscribed"')
        self._read = b""

    def publish(self) -> list[str]:
        """Publish some messages, and wait for them. Returns what failed."""
        numbers = [str(self._number + each).encode() for each in range(MESSAGES)]
        self._number += MESSAGES
        for number in numbers:
            _say(self._publisher, request("publish", channel=CHANNEL, payload={"n": int(number)}, id=int(number)))
        found = self._wait(rb'"n":\s*(\d+)', MESSAGES)
        self._read = b""
        if found == numbers:
            return []
        return [f"an honest client got {found} instead of {numbers}"]

    def _wait(self, pattern: bytes, count: int = 1) -> list[bytes]:
        deadline = time.monotonic() + WAIT
        found: list[bytes] = []
        while len(found) < count and time.monotonic() < deadline:
            self._read += _hear(self._subscriber)
            _hear(self._publisher)
            found = re.findall(pattern, self._read)
        return found

    def close(self) -> None:
        for each in (self._publisher, self._subscriber):
            each.socket.close()


def _say(peer: Peer | QuicPeer, line: bytes) -> None:
    if isinstance(peer, QuicPeer):
        peer.say(line)
    else:
        peer.send(frame(line))


def _hear(peer: Peer | QuicPeer) -> bytes:
    if isinstance(peer, Peer):
        return peer.receive(0.005)
    peer.turn(0.005)
    read, peer.read = peer.read, b""
    return read


def run(attacks: Sequence[Attack], database: str = "") -> Iterator[tuple[str, list[str]]]:
    """Run the attacks, on a shared broker if they can. Yields each with its failures."""
    for _, some in groupby(sorted(attacks, key=_needs), key=_needs):
        group = list(some)
        with brokers(group[0], database=database) as (replicas, url):
            for attack in group:
                yield attack.name, list(_check(attack, replicas, url))


def _needs(attack: Attack) -> tuple[object, ...]:
    """Return the configuration that an attack needs."""
    return attack.log, attack.quic, attack.tls, attack.settings, attack.open_files, attack.replicas


def _check(attack: Attack, replicas: list[Broker], database: str) -> Iterator[str]:
    broker, tally = replicas[-1], Tally()
    target = Target(
        pid=broker.pid,
        port=broker.port,
        tally=Tally(),
        quic_port=broker.quic_port,
        ca=broker.ca,
        tls=attack.tls,
        elsewhere=replicas[0].port,
        database=database,
        seconds=0.5,
    )
    fill(target, min(attack.filled, FILLED))
    with closing(Pair(target, quic=attack.quic)) as pair:
        before = broker.use()
        try:
            with attackers(attack, target.against(tally), count=1):
                deadline = time.monotonic() + WAIT
                while not _is_enough(tally) and time.monotonic() < deadline:
                    time.sleep(0.002)
                if not _is_enough(tally):
                    yield f"the attack has not begun: {tally.size:.0f} bytes"
                yield from pair.publish()
        except Ended:
            yield "an honest connection was closed"
            return
        yield from pair.publish()
        deadline = time.monotonic() + WAIT
        while (files := broker.files) > before.files + SPARE_FILES and time.monotonic() < deadline:
            time.sleep(0.01)
        if files > before.files + SPARE_FILES:
            yield f"{files - before.files} more files are open"
        after = broker.use()
        if after.memory > before.memory + BOUND + (attack.kept << 20):
            yield f"{after.memory - before.memory >> 20} MiB more are used"
        if after.faults > before.faults:
            yield f"{after.faults - before.faults} faults of the broker's"
        if strange := tally.codes().keys() - CLOSE_CODES:
            yield f"closed with {sorted(strange)}"
        yield from tally.faults()


def _is_enough(tally: Tally) -> bool:
    return tally.units >= ENOUGH_UNITS or tally.size >= ENOUGH_BYTES or tally.endings > 0
