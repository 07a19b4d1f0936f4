"""The memory limit of unauthenticated peers, alone and in a replica."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator, sign
from catbus.close_codes import CloseCode
from catbus.config import Config
from catbus.limits.unauthenticated import (
    UNAUTHENTICATED_OBJECT_BYTES,
    UNAUTHENTICATED_PEER_BYTES,
    UnauthenticatedPeer,
    UnauthenticatedPeers,
)
from catbus.log import MemoryLog
from catbus.replica import Replica
from tests.test_replica import TransportWriter, reply_types

SECRET = "a secret of the tests"


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2 * UNAUTHENTICATED_PEER_BYTES), st.sampled_from("rrrrpl")),
        max_size=60,
    )
)
def test_memory_limit_evicts_the_oldest_unauthenticated_peers(steps: list[tuple[int, int, str]]) -> None:
    unauthenticated, ended = UnauthenticatedPeers(3 * UNAUTHENTICATED_PEER_BYTES), list[int]()
    peers = [UnauthenticatedPeer(unauthenticated, lambda number=number: ended.append(number)) for number in range(6)]  # type: ignore[misc]
    order: list[int] = []
    for number, size, step in steps:
        gone = len(ended)
        if step == "r":
            peers[number].received(size)
            if size and not peers[number].released and number not in order:
                order.append(number)
        elif step == "p":
            peers[number].processed()
        else:
            peers[number].release()
        assert ended[gone:] == order[: len(ended) - gone]
        order = [number for number in order if peers[number].size]
        assert all(peer.size <= UNAUTHENTICATED_PEER_BYTES for peer in peers)
        assert unauthenticated.size == sum(peer.size for peer in peers) <= 3 * UNAUTHENTICATED_PEER_BYTES
    assert unauthenticated.evicted == len(ended)


@pytest.fixture
async def replica(nursery: trio.Nursery) -> Replica:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    return replica


def auth() -> bytes:
    return b'{"type":"auth","protocol":1,"token":"%s"}' % sign(SECRET, client_id="alice", grants=Grants.ALL).encode()


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
async def test_large_object_is_accepted_only_after_authentication(replica: Replica, cut: int) -> None:
    large = b'{"type":"publish","id":1,"channel":"a","payload":"%s"}' % (b"x" * 60_000)
    client = replica.open_session(TransportWriter(), transport="test")
    for start in range(0, len(auth() + large), cut):
        await client.receive((auth() + large)[start : start + cut])
    assert client.closing is None
    unauthenticated = replica.open_session(TransportWriter(), transport="test")
    for start in range(0, UNAUTHENTICATED_OBJECT_BYTES + cut, cut):
        await unauthenticated.receive(large[start : start + cut])
    assert unauthenticated.closing is not None
    assert unauthenticated.closing[0] is CloseCode.TOO_LARGE
    assert reply_types(unauthenticated) == ["error"]


async def test_oldest_unauthenticated_session_is_closed_over_the_memory_limit(replica: Replica) -> None:
    replica.unauthenticated._limit = 1000
    authenticated, first, second, third = (replica.open_session(TransportWriter(), transport="test") for _ in range(4))
    authenticated.count_received(900)
    await authenticated.receive(auth())
    assert replica.unauthenticated.size == 0
    authenticated.count_received(10_000)
    for client in (first, second, third):
        client.count_received(400)
    assert [client.closing and client.closing[0] for client in (authenticated, first, second, third)] == [
        *(None, CloseCode.OVERLOADED),
        *(None, None),
    ]
    assert reply_types(first) == ["auth_error"]
    for client in (authenticated, first, second, third):
        client.end()
    assert (replica.unauthenticated.size, replica.unauthenticated.evicted) == (0, 1)
