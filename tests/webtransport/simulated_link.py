"""A simulated link between two connections, which can lose, repeat, delay and damage datagrams, with its own clock."""

from __future__ import annotations

import datetime
import hashlib
import heapq
import ipaddress
from collections.abc import Callable, Iterable
from functools import cache
from itertools import count
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from catbus.webtransport import (
    ConnectionLimits,
    ConnectionLost,
    Event,
    SessionOpened,
    SessionRequested,
    StreamData,
    WebTransportConfiguration,
    WebTransportConnection,
    client_configuration,
    server_configuration,
)
from catbus.webtransport.connectionless_packets import read_header

SERVER = ("192.0.2.1", 4433)
CLIENT = ("192.0.2.2", 50000)

TICK = 1e-6
"""Minimum step of the clock, in seconds."""


@cache
def certificate() -> tuple[str, str, bytes]:
    """Make a self-signed certificate for `localhost` and 127.0.0.1. Return it and its key as PEM, and its hash."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=10))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return (
        made.public_bytes(serialization.Encoding.PEM).decode(),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        hashlib.sha256(made.public_bytes(serialization.Encoding.DER)).digest(),
    )


@cache
def server_config(limits: ConnectionLimits | None = None) -> WebTransportConfiguration:
    pem, key, _ = certificate()
    return server_configuration(pem, key, limits)


@cache
def client_config(limits: ConnectionLimits | None = None) -> WebTransportConfiguration:
    return client_configuration("localhost", ca=certificate()[0], limits=limits)


Damage = Callable[[bytes], Iterable[tuple[float, bytes]]]
"""A function that returns each arriving copy of a datagram with its delay in seconds."""


def untouched(data: bytes) -> Iterable[tuple[float, bytes]]:
    return [(0.01, data)]


class End:
    """One side: its connection, events and received bytes. It consumes bytes immediately unless `consumes` is False."""

    def __init__(self, address: Any, connection: WebTransportConnection | None) -> None:
        self.address = address
        self.connection = connection
        self.events: list[Event] = []
        self.received: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.consumes = True
        self.answer: Callable[[WebTransportConnection, float], object] = lambda connection, now: connection.accept()

    @property
    def it(self) -> WebTransportConnection:
        assert self.connection is not None
        return self.connection

    def take(self, now: float) -> None:
        for event in self.it.events():
            self.events.append(event)
            if isinstance(event, StreamData):
                self.received.setdefault(event.stream, bytearray()).extend(event.data)
                if event.ended:
                    self.ended.add(event.stream)
                if self.consumes:
                    self.it.consumed(event.stream, len(event.data))
            elif isinstance(event, SessionRequested):
                self.answer(self.it, now)

    def saw(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def lost(self) -> str | None:
        return next((event.reason for event in self.saw(ConnectionLost)), None)


class Link:
    """A client, a server, and the datagrams in transit between them."""

    def __init__(
        self,
        *,
        server: WebTransportConfiguration | None = None,
        client: WebTransportConfiguration | None = None,
        damage: Damage = untouched,
        connect: bool = True,
        **request: Any,
    ) -> None:
        self.now = 1000.0
        self.damage = damage
        self.upwards: Damage | None = None
        """The damage to the client's datagrams, if it differs."""
        self.server_configuration = server or server_config()
        request.setdefault("authority", "localhost:4433")
        made = (
            WebTransportConnection.client(client or client_config(), SERVER, self.now, **request) if connect else None
        )
        self.client = End(CLIENT, made)
        self.server = End(SERVER, None)
        self.sent = {CLIENT: 0, SERVER: 0}
        self._order = count()
        self._under_way: list[tuple[float, int, Any, bytes]] = []

    def ends(self) -> list[End]:
        return [end for end in (self.client, self.server) if end.connection is not None]

    def flush(self) -> None:
        """Send the waiting datagrams of both sides."""
        for end in self.ends():
            end.take(self.now)
            for data, to in end.it.datagrams_to_send(self.now):
                self.sent[end.address] += 1
                damage = (self.upwards or self.damage) if end is self.client else self.damage
                self.carry(to, damage(data))
            end.take(self.now)

    def carry(self, to: Any, copies: Iterable[tuple[float, bytes]]) -> None:
        for delay, data in copies:
            heapq.heappush(self._under_way, (self.now + delay, next(self._order), to, data))

    def step(self, before: float = float("inf")) -> bool:
        """Advance to the next arrival or timer. Return False if there is none before the given time."""
        self.flush()
        times = [end.it.timer for end in self.ends()]
        if self._under_way:
            times.append(self._under_way[0][0])
        known = [time for time in times if time is not None]
        if not known or min(known) > before:
            return False
        # By a rounding error, aioquic can report a timer as due while its action is not due yet.
        self.now = max(self.now + TICK, min(known))
        while self._under_way and self._under_way[0][0] <= self.now:
            _, _, to, data = heapq.heappop(self._under_way)
            self.arrive(to, data)
        for end in self.ends():
            timer = end.it.timer
            if timer is not None and timer <= self.now:
                end.it.handle_timer(self.now)
        self.flush()
        return True

    def arrive(self, to: Any, data: bytes) -> None:
        if to == CLIENT:
            self.client.it.receive_datagram(data, SERVER, self.now)
            return
        if self.server.connection is None:
            header = read_header(data)
            if header is None or not header.is_initial or len(data) < 1200:
                return
            self.server.connection = WebTransportConnection.server(self.server_configuration, header.destination)
        self.server.it.receive_datagram(data, CLIENT, self.now)

    def until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Run until the condition holds. Fail after this time, or if nothing more happens."""
        end = self.now + seconds
        self.flush()
        while not condition():
            assert self.now < end, "it takes too long"
            assert self.step(), "nothing happens any more"

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.step(end):
            pass
        self.now = max(self.now, end)

    def open(self) -> Link:
        self.until(lambda: self.client.saw(SessionOpened))
        return self
