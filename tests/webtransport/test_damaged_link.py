"""Two connections over a link that loses, repeats, reorders, truncates and damages datagrams."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial

import pytest
from aioquic.quic.connection import QuicConnection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catbus.webtransport import ConnectionLimits, SessionClosed, SessionOpened
from catbus.webtransport.quic_connection import BoundedQuicConnection
from tests.webtransport.simulated_link import Link, server_config

FEW = settings(max_examples=settings().max_examples // 4, suppress_health_check=[HealthCheck.too_slow])


class Bad:
    """Damage to datagrams, each kind at its own rate."""

    def __init__(self, source: random.Random, *, loss: float, repeat: float, flip: float, cut: float, spread: float):
        self.random = source
        self.loss, self.repeat, self.flip, self.cut, self.spread = loss, repeat, flip, cut, spread
        self.harmed = 0

    def __call__(self, data: bytes) -> Iterable[tuple[float, bytes]]:
        copies = 2 if self.random.random() < self.repeat else 1
        for _ in range(copies):
            copy = data
            if self.random.random() < self.loss:
                self.harmed += 1
                continue
            if self.random.random() < self.flip:
                self.harmed += 1
                at = self.random.randrange(len(copy) * 8)
                flipped = bytearray(copy)
                flipped[at // 8] ^= 1 << at % 8
                copy = bytes(flipped)
            if self.random.random() < self.cut:
                self.harmed += 1
                copy = copy[: self.random.randrange(len(copy))]
            yield 0.01 + self.random.random() * self.spread, copy


# If a quarter of all packets is lost, the backoff of retransmissions sometimes exceeds the idle timeout.
@st.composite
def bad(draw: st.DrawFn) -> Bad:
    return Bad(
        random.Random(draw(st.integers(0, 2**32))),
        loss=draw(st.sampled_from([0, 0.03, 0.1])),
        repeat=draw(st.sampled_from([0, 0.2])),
        flip=draw(st.sampled_from([0, 0.02])),
        cut=draw(st.sampled_from([0, 0.02])),
        spread=draw(st.sampled_from([0, 0.02, 0.2])),
    )


def body(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


writes = st.lists(
    st.tuples(
        st.booleans(),  # client or server
        st.integers(0, 3),  # index of the stream
        st.sampled_from([1, 100, 2000, 30_000]),
    ),
    max_size=12,
)


def exchange(damage: Bad, plan: list[tuple[bool, int, int]]) -> None:
    link = Link(damage=damage)
    link.until(lambda: link.client.saw(SessionOpened) or link.client.lost)
    # A client gives up a server after 10 s, which is rare.
    if link.client.lost:
        assert link.now >= 1010
        return
    streams: dict[tuple[bool, int], int] = {}
    expected: dict[tuple[bool, int], bytearray] = {}
    for number, (client, which, size) in enumerate(plan):
        end = link.client if client else link.server
        key = (client, which)
        if key not in streams:
            opened = end.it.open_stream(bidirectional=which % 2 == 0)
            assert opened is not None
            streams[key] = opened
        stream, data = streams[key], body(number, size)
        link.until(partial(end.it.writable, stream))
        assert end.it.send(stream, data)
        expected.setdefault(key, bytearray()).extend(data)
        if number % 3 == 0:
            link.step()
    for (client, _), stream in streams.items():
        end = link.client if client else link.server
        assert end.it.send(stream, b"", end=True)

    def all_arrived() -> bool:
        return all(stream in (link.server if client else link.client).ended for (client, _), stream in streams.items())

    link.until(all_arrived, seconds=300)
    for (client, which), stream in streams.items():
        assert (link.server if client else link.client).received[stream] == expected[client, which]
    assert link.client.lost is link.server.lost is None
    for end in (link.client, link.server):
        assert end.it.unconsumed == 0
        assert not end.it._failed

    # Without further damage, everything is acknowledged and the close is delivered.
    link.damage = lambda data: [(0.01, data)]
    link.until(lambda: not link.client.it.unacknowledged() and not link.server.it.unacknowledged())
    link.server.it.close_session(4242, "so long", link.now)
    link.until(lambda: link.client.lost)
    assert link.client.saw(SessionClosed) == [SessionClosed(4242, "so long")]


@FEW
@given(bad(), writes)
def test_each_stream_delivers_exactly_the_sent_bytes(damage: Bad, plan: list[tuple[bool, int, int]]) -> None:
    exchange(damage, plan)


@FEW
@given(bad(), writes)
def test_aioquic_has_nothing_to_send_when_it_is_not_called(damage: Bad, plan: list[tuple[bool, int, int]]) -> None:
    def ask(quic: BoundedQuicConnection, now: float) -> list[tuple[bytes, object]]:
        nothing = quic._nothing_to_send(now)
        found: list[tuple[bytes, object]] = QuicConnection.datagrams_to_send(quic, now)
        assert not nothing or not found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedQuicConnection, "datagrams_to_send", ask)
        exchange(damage, plan)


def test_aioquic_is_not_called_when_it_has_nothing_to_send() -> None:
    link = Link().open()
    link.run(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(QuicConnection, "datagrams_to_send")
        for end in link.ends():
            assert end.it.datagrams_to_send(link.now) == []
            assert not end.it._failed


def test_link_damages_datagrams() -> None:
    damage = Bad(random.Random(2), loss=0.2, repeat=0.2, flip=0.1, cut=0.1, spread=0.2)
    link = Link().open()
    link.damage = damage
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    link.client.it.send(stream, bytes(100_000), end=True)
    link.until(lambda: stream in link.server.ended)
    assert damage.harmed > 20


@pytest.mark.parametrize("seed", range(4))
def test_windows_are_extended_despite_packet_loss(seed: int) -> None:
    limits = ConnectionLimits(connection_window=40_000, stream_window=20_000)
    damage = Bad(random.Random(seed), loss=0.15, repeat=0.1, flip=0, cut=0, spread=0.02)
    link = Link(server=server_config(limits)).open()
    link.damage = damage
    sent = {}
    for number in range(3):
        stream = link.client.it.open_stream(bidirectional=number > 0)
        assert stream is not None
        sent[stream] = body(number, 150_000)
        assert link.client.it.send(stream, sent[stream], end=True)
    link.until(lambda: link.server.ended == sent.keys(), seconds=600)
    assert link.server.received == sent


@FEW
@given(st.integers(0, 2**32), st.binary(max_size=1300))
def test_random_datagram_changes_nothing(seed: int, garbage: bytes) -> None:
    link = Link().open()
    for end, source in ((link.client, link.server.address), (link.server, link.client.address)):
        connection_id = next(iter(end.it.connection_ids))
        for data in (garbage, bytes([0x40 | seed & 0x3F]) + connection_id + garbage, b"\xc0\0\0\0\1" + garbage):
            end.it.receive_datagram(data, source, link.now)
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    link.client.it.send(stream, b"x", end=True)
    link.until(lambda: stream in link.server.ended)


def test_replayed_datagrams_change_nothing() -> None:
    carried: list[bytes] = []
    link = Link()

    def remember(data: bytes) -> Iterable[tuple[float, bytes]]:
        carried.append(data)
        return [(0.01, data)]

    link.upwards = remember
    link.open()
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    link.client.it.send(stream, b"once", end=True)
    link.until(lambda: stream in link.server.ended)
    for data in carried.copy():
        link.server.it.receive_datagram(data, link.client.address, link.now)
        link.server.it.receive_datagram(data, ("198.51.100.9", 9), link.now)
    link.run(1)
    assert link.server.received == {stream: b"once"}
    assert link.server.lost is None
    assert link.server.it.peer_address == link.client.address


def test_client_continues_after_its_address_changes() -> None:
    link = Link().open()
    link.run(1)
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    link.client.it.send(stream, b"from elsewhere")
    elsewhere = ("198.51.100.9", 1)
    for data, _ in link.client.it.datagrams_to_send(link.now):
        link.server.it.receive_datagram(data, elsewhere, link.now)
    link.server.take(link.now)
    assert link.server.received[stream] == b"from elsewhere"
    assert link.server.it.peer_address == elsewhere
