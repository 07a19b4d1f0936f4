"""Live maps, memberships and conditional publishes of an application, over real sockets."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from catbus.client import Backoff, ConflictError, Disconnected, MemberKey, PresentMember, Refused, connect
from catbus.error_codes import ErrorCode
from tests.client.scripted_broker import Honest, Peer, message, serve, talk, talk_to
from tests.client.test_presence_queue import change, member
from tests.client.test_presence_queue import page as members_page
from tests.client.test_retained_queue import gap, live, page, written

pytestmark = pytest.mark.anyio

SNAPSHOT = page(written(90, 1), written(91, 2, "a.c")), live(100)


async def snapshot(peer: Peer) -> None:
    request = await peer.subscribed()
    assert request["retained"] is True
    await peer.send(*SNAPSHOT)


async def test_map_is_complete_when_the_block_begins() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.send(page(written(90, 1), complete=False))
        await peer.send(page(written(91, 2, "a.c")))
        await peer.send(live(100))

    async with talk(script) as bus, bus.retained("a.*") as todos:
        assert {channel: found.payload for channel, found in todos.items()} == {"a.b": 1, "a.c": 2}
        assert (len(todos), "a.d" in todos, todos.pattern, todos.error) == (2, False, "a.*", None)
        assert (todos["a.c"].seq, todos["a.c"].at, todos["a.c"].sender) == (91, 1_700_000_000_000, None)
        assert repr(todos) == "<LiveMap of a.*: 2 entries>"


async def test_callbacks_and_iterations_get_the_changes() -> None:
    async def script(peer: Peer) -> None:
        await snapshot(peer)
        await peer.expect("ping")
        await peer.send(written(101, 5), message(102, 6), written(103, None, "a.c"), written(104, 7, "a.d"))
        await peer.expect("ping")
        await peer.send(written(105, 8))

    called: list[Any] = []
    async with talk(script) as bus, bus.retained("a.*") as todos:
        stop = todos.on_change(lambda change: called.append((change.key, todos.get(change.key) is change.value)))
        changes = todos.changes()
        await bus_ping(bus)
        found = [await anext(changes) for _ in range(3)]
        assert [(c.key, c.value and c.value.payload, c.previous and c.previous.payload) for c in found] == [
            ("a.b", 5, 1),
            ("a.c", None, 2),
            ("a.d", 7, None),
        ]
        assert called == [("a.b", True), ("a.c", True), ("a.d", True)]
        stop()
        stop()
        await bus_ping(bus)
        assert (await anext(changes)).value is todos["a.b"]
        assert len(called) == 3


async def bus_ping(bus: Any) -> None:
    """Tell the script to go on."""
    with anyio.move_on_after(0):
        await bus.ping()


async def test_slow_iteration_gets_the_newest_of_each_channel() -> None:
    async def script(peer: Peer) -> None:
        await snapshot(peer)
        await peer.expect("ping")
        steps = [written(101 + n, n, f"a.{n % 50}") for n in range(3000)]
        await peer.send(*steps, *(written(4000 + n, None, f"a.{n}") for n in range(1, 50)))
        await peer.send({"type": "pong", "seq": 2})

    async with talk(script) as bus, bus.retained("a.*") as todos:
        changes = todos.changes()
        await bus.ping()
        # 49 of the channels came and went.
        change = await anext(changes)
        assert (change.key, change.value and change.value.payload, change.previous) == ("a.0", 2950, None)
        with anyio.move_on_after(0) as nothing_more:
            await anext(changes)
        assert nothing_more.cancelled_caught


async def test_live_map_reads_on_while_the_buffer_of_a_subscription_is_full() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await snapshot_of(peer, "b.*")
        for seq in range(101, 131):
            await peer.send(message(seq, "x" * 1000))
        await peer.send(written(131, 1, "b.c", "b.*"))

    async def snapshot_of(peer: Peer, pattern: str) -> None:
        await peer.subscribed()
        await peer.send(page(pattern=pattern), live(100, pattern))

    async with talk(script) as bus, bus.subscribe("a.*", buffer=1), bus.retained("b.*") as found:
        arrived = anyio.Event()
        found.on_change(lambda _: arrived.set())
        await arrived.wait()
        assert found["b.c"].payload == 1


async def test_map_keeps_its_entries_over_a_lost_connection() -> None:
    lives = 0
    again = anyio.Event()

    async def script(peer: Peer) -> None:
        nonlocal lives
        lives += 1
        await peer.admit()
        if lives == 1:
            await snapshot(peer)
            await peer.close(1011)
            return
        request = await peer.subscribed()
        assert (request["since"], request["retained"]) == (100, True)
        await again.wait()
        await peer.send(gap(101, 150), page(written(90, 1)), live(150))

    async with (
        serve(script) as url,
        connect(url, token="t", reconnect=Backoff(0, 0)) as bus,
        bus.retained("a.*") as todos,
    ):
        changes = todos.changes()
        while lives < 2:
            await anyio.lowlevel.checkpoint()
        assert len(todos) == 2
        again.set()
        removed = await anext(changes)
        assert (removed.key, removed.value) == ("a.c", None)
        assert list(todos) == ["a.b"]


@pytest.mark.parametrize("how", ["revoked", "closed", "left"])
async def test_iteration_ends_with_its_map(how: str) -> None:
    async def script(peer: Peer) -> None:
        await snapshot(peer)
        await peer.expect("ping")
        if how == "revoked":
            await peer.send({"type": "revoked", "pattern": "a.*", "seq": 100})
        elif how == "closed":
            await peer.close(4403, "revoked")

    async with talk(script) as bus:
        async with bus.retained("a.*") as todos:
            changes = todos.changes()
            await bus_ping(bus)
            if how == "revoked":
                with pytest.raises(Refused) as caught:
                    await anext(changes)
                assert caught.value.code is ErrorCode.REVOKED
                assert todos.error is not None
            elif how == "closed":
                with pytest.raises(Disconnected):
                    await anext(changes)
            assert len(todos) == 2
        if how == "left":
            assert [change async for change in changes] == []


async def test_rejected_map_raises_refused() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("subscribe")
        error = {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized"}
        await peer.send({**error, "id": request["id"]})

    async with talk(script) as bus:
        with pytest.raises(Refused, match="unauthorized"):
            async with bus.retained("a.*"):
                pass
        with pytest.raises(Refused, match="invalid_pattern"):
            async with bus.presence("a..b"):
                pass


async def test_presence_maps_members_by_their_key() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.subscribed()
        assert request["presence"] is True
        await peer.send(members_page(member("alice", info="hi")))
        await peer.expect("ping")
        await peer.send(change("join", member("bob")), message(101), change("update", member("alice", 2)))

    async with talk(script) as bus, bus.presence("a.*") as members:
        changes = members.changes()
        alice = MemberKey("a.b", "alice", None)
        assert dict(members) == {alice: PresentMember("a.b", 1, "alice", info="hi")}
        await bus_ping(bus)
        assert (await anext(changes)).key.client_id == "bob"
        updated = await anext(changes)
        assert (updated.key, updated.value, updated.previous) == (
            alice,
            PresentMember("a.b", 2, "alice"),
            PresentMember("a.b", 1, "alice", info="hi"),
        )


async def test_members_are_read_in_pages() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("members")
        assert request == {"type": "members", "pattern": "a.*", "limit": 1000, "id": 1}
        await peer.send({"type": "members", "id": 1, "members": [member("alice")], "next": "here"})
        request = await peer.expect("members")
        assert request["after"] == "here"
        await peer.send({"type": "members", "id": request["id"], "members": [member("bob", info={})]})
        request = await peer.expect("members")
        await peer.send({"type": "error", "id": request["id"], "message": "no", "code": "unauthorized"})

    async with talk(script) as bus:
        assert await bus.members("a.*") == [PresentMember("a.b", 1, "alice"), PresentMember("a.b", 1, "bob", info={})]
        with pytest.raises(Refused, match="unauthorized"):
            await bus.members("a.*")


async def test_join_lasts_as_long_as_its_block() -> None:
    seen: list[Any] = []

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.receive()
            seen.append((request["type"], request.get("info")))
            kind = {"join": "joined", "leave": "left"}[request["type"]]
            await peer.send({"type": kind, "channel": "room", "id": request["id"]})
            if request.get("info") == "gone":
                goaway = {"type": "goaway", "reason": "", "reconnect_in": 9}
                await peer.send({"type": "left", "channel": "room"}, goaway)

    told = anyio.Event()
    async with talk(script, on_event=lambda _: told.set()) as bus:
        async with bus.join("room", {"n": 1}) as membership:
            assert (membership.channel, membership.error, seen) == ("room", None, [("join", {"n": 1})])
            await membership.update(None)
            with pytest.raises(Refused, match="too_large"):
                await membership.update("x" * 2000)
        async with bus.join("room", "gone") as membership:
            assert seen[1:] == [("join", None), ("leave", None), ("join", "gone")]
            await told.wait()
            assert membership.error is not None
            with pytest.raises(Refused, match="revoked"):
                await membership.update(2)


async def test_rejected_join_raises_refused() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("join")
        await peer.send({"type": "error", "id": request["id"], "message": "no", "code": "limit"})
        await peer.expect("leave")

    async with talk(script) as bus:
        with pytest.raises(Refused, match="limit"):
            async with bus.join("room"):
                pass
        with pytest.raises(Refused, match="invalid_channel"):
            async with bus.join("room.*"):
                pass


async def test_join_ends_with_the_bus() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("join")
        await peer.close(4403, "revoked")

    async with talk(script) as bus:
        with pytest.raises(Disconnected):
            async with bus.join("room"):
                pass


async def test_conflict_tells_the_present_seq() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("publish")
        assert (request["retain"], request["expect"]) == (True, 0)
        refusal = {"message": "the retained message is another one", "code": "conflict", "seq": 7}
        await peer.send({"type": "publish_error", "channel": "a", "id": request["id"], **refusal})
        request = await peer.published(101)
        assert (request["retain"], request["expect"], request["payload"]) == (True, 7, None)

    async with talk(script) as bus:
        with pytest.raises(ConflictError, match="another one") as caught:
            await bus.publish("a", 1, retain=True, expect=0)
        assert (caught.value.seq, caught.value.code) == (7, ErrorCode.CONFLICT)
        assert await bus.publish("a", None, retain=True, expect=7) == 101


async def test_messages_that_are_published_together_can_be_retained() -> None:
    async def script(peer: Peer) -> None:
        for seq in (101, 102):
            assert (await peer.published(seq))["retain"] is True

    async with talk(script) as bus:
        assert await bus.publish_many([("a", 1), ("b", None)], retain=True) == [101, 102]


async def test_useless_arguments_are_rejected_before_anything_is_sent() -> None:
    broker = Honest()
    async with talk_to(broker) as bus:
        with pytest.raises(ValueError, match="expect: only with retain"):
            await bus.publish("a", 1, expect=0)
        with pytest.raises(ValueError, match="retain: not with ephemeral"):
            await bus.publish("a", 1, ephemeral=True, retain=True)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="retain: only with echo"):
            await bus.publish("a", 1, retain=True, echo=False)
        with pytest.raises(ValueError, match="retain: not with ephemeral"):
            await bus.publish_many([("a", 1)], ephemeral=True, retain=True)
        with pytest.raises(TypeError, match="expect: an integer"):
            await bus.publish("a", 1, retain=True, expect="7")  # type: ignore[call-overload]
    assert broker.published == []
