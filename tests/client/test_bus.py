"""The requests of an application, their replies and errors, over real sockets."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import sniffio

from catbus.client import Disconnected, Gap, Head, Live, Refused, connect
from catbus.error_codes import ErrorCode
from catbus.protocol import wire_messages as wire
from tests.client.scripted_broker import EPOCH, Honest, Peer, message, serve, talk, talk_to

pytestmark = pytest.mark.anyio


async def test_client_runs_on_the_selected_backend(anyio_backend_name: str) -> None:
    assert sniffio.current_async_library() == anyio_backend_name


async def test_bus_shows_what_the_broker_reported() -> None:
    async with talk_to(Honest()) as bus:
        assert (bus.client_id, bus.producer, bus.epoch, bus.head, bus.floor) == ("alice", "p1", EPOCH, 100, 1)
        assert bus.limits["message_size"] == 65536


async def test_publish_returns_its_seq() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.published(101)
        assert request == {"type": "publish", "channel": "orders.42", "payload": {"status": "paid"}, "id": 1}
        request = await peer.published(102)
        assert request["echo"] is False

    async with talk(script) as bus:
        assert await bus.publish("orders.42", {"status": "paid"}) == 101
        assert await bus.publish("orders.42", None, echo=False) == 102
        assert bus.head == 102


async def test_ephemeral_publish_has_no_seq() -> None:
    broker = Honest()
    async with talk_to(broker) as bus:
        assert await bus.publish("a", 1, ephemeral=True) is None
    assert broker.published[0]["ephemeral"] is True


async def test_rejected_publish_raises_refused() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("publish")
        refusal = {"message": "slow down", "code": "rate_limited", "retry_after": 0.5}
        await peer.send({"type": "publish_error", "channel": "a", "id": request["id"], **refusal})

    async with talk(script) as bus:
        with pytest.raises(Refused, match="slow down") as caught:
            await bus.publish("a", 1)
        assert caught.value.code is ErrorCode.RATE_LIMITED
        assert caught.value.retry_after == 0.5


async def test_invalid_request_is_never_sent() -> None:
    broker = Honest()
    async with talk_to(broker) as bus:
        with pytest.raises(Refused) as caught:
            await bus.publish("orders.*", 1)
        assert caught.value.code is ErrorCode.INVALID_CHANNEL
        with pytest.raises(Refused) as caught:
            async with bus.subscribe("a..b"):
                pass
        assert caught.value.code is ErrorCode.INVALID_PATTERN
        with pytest.raises(Refused) as caught:
            await bus.history("")
        assert caught.value.code is ErrorCode.INVALID_PATTERN
        with pytest.raises(TypeError, match="no JSON form"):
            await bus.publish("a", object())
        with pytest.raises(TypeError, match="no JSON form"):
            await bus.publish_many([("a", 1), ("a", object())])
        with pytest.raises(Refused) as caught:
            await bus.publish("a", "x" * 70_000)
        assert caught.value.code is ErrorCode.TOO_LARGE
        with pytest.raises(ValueError, match="buffer: an integer from 1"):
            async with bus.subscribe("a", buffer=0):
                pass
        await bus.ping()
    assert broker.published == broker.subscribes == []


async def test_publish_many_uses_few_frames_and_returns_results_in_order() -> None:
    frames = 0

    async def script(peer: Peer) -> None:
        nonlocal frames
        frames = peer.frames
        numbers: list[tuple[str, int]] = []
        for _ in range(500):
            request = await peer.expect("publish")
            assert request["payload"] == len(numbers)
            numbers.append((request["channel"], request["id"]))
        frames = peer.frames - frames
        for seq, (channel, number) in enumerate(reversed(numbers), 1):
            await peer.send({"type": "published", "channel": channel, "id": number, "seq": seq})

    async with talk(script) as bus:
        results = await bus.publish_many([("a.b", number) for number in range(500)])
    assert results == list(range(500, 0, -1))
    assert frames == 1


async def test_publish_many_returns_an_error_for_each_rejected_message() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("publish")
        refusal = {"message": "no", "code": "unauthorized"}
        await peer.send({"type": "publish_error", "channel": "a", "id": request["id"], **refusal})
        await peer.published(102)

    async with talk(script) as bus:
        results = await bus.publish_many([("a", 1), ("*", 2), ("b", 3), ("c", "x" * 70_000)])
    assert [result.code if isinstance(result, Refused) else result for result in results] == [
        ErrorCode.UNAUTHORIZED,
        ErrorCode.INVALID_CHANNEL,
        102,
        ErrorCode.TOO_LARGE,
    ]


async def test_publish_many_accepts_an_empty_list() -> None:
    async with talk(Peer.linger) as bus:
        assert await bus.publish_many([]) == []


async def test_publishes_in_flight_stay_below_the_limit_of_the_broker() -> None:
    async def script(peer: Peer) -> None:
        await peer.admit(limits={"pending_publishes": 3})
        numbers = [(await peer.expect("publish"))["id"] for _ in range(3)]
        seq = 0
        with anyio.move_on_after(0) as nothing_more:
            await peer.receive()
        assert nothing_more.cancelled_caught
        while seq < 10:
            seq += 1
            await peer.send({"type": "published", "channel": "a", "id": numbers.pop(0), "seq": seq})
            if seq <= 7:
                numbers.append((await peer.expect("publish"))["id"])

    async with serve(script) as url, connect(url, token="t") as bus:
        assert await bus.publish_many([("a", number) for number in range(10)]) == list(range(1, 11))


async def test_publishes_of_several_tasks_share_frames() -> None:
    broker = Honest()
    seqs: list[int] = []
    async with talk_to(broker) as bus:

        async def publish(number: int) -> None:
            seqs.append(await bus.publish("a", number))

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(publish, number)
    assert sorted(seqs) == list(range(101, 151))
    numbers = [request["id"] for request in broker.published]
    assert numbers == sorted(numbers)


async def test_raw_payload_is_published_unchanged() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.write(b'{"type":"message","channel":"a.b","payload":{"n": 1.0},"pattern":"a.*","seq":101,"at":1}\n')
        data = await peer.read()
        assert b'"payload":{"n": 1.0}' in data

    async with talk(script) as bus, bus.subscribe("a.*") as messages:
        item = await anext(messages)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.publish, "b", item.raw)
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()


async def test_message_has_all_fields() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed(seq=110)
        await peer.send({**message(111, {"n": 1}), "sender": "bob"}, message(None, "psst"))

    async with talk(script) as bus, bus.subscribe("a.*") as messages:
        assert (messages.pattern, messages.cursor, messages.epoch) == ("a.*", 110, EPOCH)
        first = await anext(messages)
        assert (first.channel, first.payload, first.seq, first.sender) == ("a.b", {"n": 1}, 111, "bob")
        assert (first.at, first.pattern, first.data) == (1_700_000_000_000, "a.*", b'{"n":1}')
        assert messages.cursor == 111
        second = await anext(messages)
        assert (second.payload, second.seq) == ("psst", None)
        assert messages.cursor == 111


async def test_events_reach_the_application_in_order_with_the_messages() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.subscribed(seq=120)
        assert (request["since"], request["epoch"]) == (50, "e0")
        await peer.send(
            {"type": "gap", "pattern": "a.*", "from": 51, "to": 90, "epoch": EPOCH, "reason": "epoch"},
            message(91),
            {"type": "live", "pattern": "a.*", "seq": 120},
            {"type": "head", "seq": 130, "epoch": EPOCH, "at": 1},
            message(131),
        )

    seen: list[Any] = []
    async with talk(script) as bus, bus.subscribe("a.*", since=50, epoch="e0", on_event=seen.append) as messages:
        assert (messages.cursor, messages.epoch) == (50, "e0")
        assert (await anext(messages)).seq == 91
        gap = Gap("a.*", 51, 90, EPOCH, "epoch")
        assert seen == messages.gaps == [gap]
        assert (messages.cursor, messages.epoch) == (91, EPOCH)
        assert (await anext(messages)).seq == 131
        assert seen == [gap, Live("a.*", 120), Head(130, EPOCH, 1)]
        assert messages.cursor == 131


async def test_head_updates_the_cursor_of_a_waiting_iteration() -> None:
    async with talk_to(Honest()) as bus, bus.subscribe("b") as messages:
        moved = anyio.Event()

        async def iterate() -> None:
            async for _ in messages:
                pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(iterate)
            await bus.publish_many([("a", 1)] * 3)
            assert messages.cursor == 100
            await bus.ping()
            while messages.cursor != 103:
                await anyio.lowlevel.checkpoint()
            moved.set()
            tasks.cancel_scope.cancel()


async def test_exception_of_an_event_callback_leaves_the_iteration() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.send({"type": "live", "pattern": "a.*", "seq": 120}, message(121))

    def complain(_: object) -> None:
        raise LookupError

    async with talk(script) as bus, bus.subscribe("a.*", on_event=complain) as messages:
        with pytest.raises(LookupError):
            await anext(messages)
        assert (await anext(messages)).seq == 121


async def test_rejected_subscription_raises_refused() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("subscribe")
        refusal = {"message": "no read grant", "code": "unauthorized"}
        await peer.send({"type": "subscribe_error", "pattern": request["pattern"], "id": request["id"], **refusal})
        await peer.subscribed()

    async with talk(script) as bus:
        with pytest.raises(Refused, match="no read grant") as caught:
            async with bus.subscribe("a.*"):
                pytest.fail("it was refused")
        assert caught.value.code is ErrorCode.UNAUTHORIZED
        async with bus.subscribe("a.*"):
            pass


async def test_two_iterations_of_a_pattern_share_one_subscription_with_separate_starts() -> None:
    broker = Honest()
    async with talk_to(broker) as bus, bus.subscribe("a") as first:
        await bus.publish_many([("a", 1), ("a", 2)])
        async with bus.subscribe("a", since=101) as second, bus.subscribe("a") as third:
            assert (await anext(second)).payload == 2
            await bus.publish("a", 3)
            assert (await anext(second)).payload == 3
            assert (await anext(third)).payload == 3
            assert broker.unsubscribes == 0
        assert [(await anext(first)).payload for _ in range(3)] == [1, 2, 3]
        assert list(broker.held) == ["a"]
    assert len(broker.subscribes) == 2


async def test_revoked_subscription_returns_earlier_messages_and_then_raises() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.send(message(101), {"type": "revoked", "pattern": "a.*", "seq": 101})
        await peer.published(102)

    async with talk(script) as bus, bus.subscribe("a.*") as messages:
        assert (await anext(messages)).seq == 101
        for _ in range(2):
            with pytest.raises(Refused) as caught:
                await anext(messages)
            assert caught.value.code is ErrorCode.REVOKED
        assert await bus.publish("b", 1) == 102


async def test_leaving_the_block_unsubscribes() -> None:
    broker = Honest()
    async with talk_to(broker) as bus:
        async with bus.subscribe("a") as messages:
            pass
        assert [item async for item in messages] == []
        await bus.ping()
        assert broker.unsubscribes == 1
        assert not broker.held


async def test_several_subscriptions_receive_their_own_messages() -> None:
    async with (
        talk_to(Honest()) as bus,
        bus.subscribe("a.*") as some,
        bus.subscribe("*") as everything,
        bus.subscribe("c") as nothing,
    ):
        await bus.publish_many([("a.x", 1), ("b", 2), ("a.y", 3)])
        assert [(await anext(some)).payload for _ in range(2)] == [1, 3]
        assert [(await anext(everything)).payload for _ in range(3)] == [1, 2, 3]
        assert nothing.cursor == 100


async def test_history_returns_pages() -> None:
    async with talk_to(Honest()) as bus:
        await bus.publish_many([("a.b", number) for number in range(5)])
        page = await bus.history("a.*", limit=3)
        assert [item.payload for item in page.messages] == [2, 3, 4]
        assert page.more
        page = await bus.history("a.*")
        assert [item.seq for item in page.messages] == [101, 102, 103, 104, 105]
        assert not page.more


async def test_last_messages_come_before_new_ones() -> None:
    broker = Honest()
    broker.page = 2
    async with talk_to(broker) as bus:
        await bus.publish_many([("a", number) for number in range(6)])
        async with bus.subscribe("a", last=5) as messages:
            assert messages.cursor == 101
            await bus.publish("a", 6)
            assert [(await anext(messages)).payload for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        async with bus.subscribe("a", last=100) as messages, bus.subscribe("b", last=1) as nothing:
            assert [(await anext(messages)).payload for _ in range(7)] == list(range(7))
            assert nothing.cursor == 107


async def test_message_published_during_the_fetch_comes_after_the_last_messages() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed(seq=110)
        request = await peer.expect("history")
        assert (request["limit"], request["before"]) == (2, 111)
        await peer.send(message(111, "new"))
        page = [message(seq, "old") for seq in (104, 109)]
        await peer.send({"type": "history", "id": request["id"], "messages": page, "more": True})

    async with talk(script) as bus, bus.subscribe("a.*", last=2) as messages:
        assert [(await anext(messages)).seq for _ in range(3)] == [104, 109, 111]


async def test_last_messages_of_another_epoch_are_dropped_if_a_gap_covers_them() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed(seq=110)
        request = await peer.expect("history")
        await peer.send({"type": "gap", "pattern": "a.*", "from": 91, "to": 90, "epoch": "e2", "reason": "epoch"})
        await peer.send({"type": "history", "id": request["id"], "messages": [message(105)], "more": False})
        await peer.send(message(91))

    async with talk(script) as bus, bus.subscribe("a.*", last=2) as messages:
        item = await anext(messages)
        assert (item.seq, item.cursor) == (91, "91.e2")
        assert [gap.last for gap in messages.gaps] == [90]


async def test_subscription_resumes_at_a_cursor_of_a_message_page_or_subscription() -> None:
    broker = Honest()
    async with talk_to(broker) as bus:
        await bus.publish_many([("a", number) for number in range(4)])
        page = await bus.history("a", limit=2)
        assert [item.cursor for item in page.messages] == [f"103.{EPOCH}", f"104.{EPOCH}"]
        assert page.cursor == page.messages[-1].cursor
        older = await bus.history("a", before=page.messages[0].cursor)
        assert [item.seq for item in older.messages] == [101, 102]
        assert (await bus.history("b")).cursor == f"104.{EPOCH}"
        assert (await bus.history("b", before=50)).cursor == f"49.{EPOCH}"
        async with bus.subscribe("a", since=older.messages[0].cursor) as messages:
            item = await anext(messages)
            assert (item.seq, item.epoch, item.cursor) == (102, EPOCH, f"102.{EPOCH}")
            assert messages.resume_from == item.cursor
            await bus.publish("a", 5, ephemeral=True)
        request = broker.subscribes[-1]
        assert (request["since"], request["epoch"]) == (101, EPOCH)
        async with bus.subscribe("a", since=messages.resume_from) as messages:
            assert (await anext(messages)).seq == 103


async def test_ephemeral_message_has_no_cursor() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.send(message(None, "psst"))

    async with talk(script) as bus, bus.subscribe("a.*") as messages:
        assert (await anext(messages)).cursor is None


async def test_history_sends_its_arguments() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.expect("history")
        assert (request["pattern"], request["limit"], request["before"]) == ("a", 7, 50)
        await peer.send({"type": "error", "message": "not now", "code": "unavailable"})

    async with talk(script) as bus:
        with pytest.raises(Refused, match="not now"):
            await bus.history("a", limit=7, before=50)


async def test_ping_returns_the_round_trip_time() -> None:
    async with talk_to(Honest()) as bus:
        assert 0 <= await bus.ping() < 5


async def test_authenticate_renews_the_token() -> None:
    async def script(peer: Peer) -> None:
        assert (await peer.admit(head=120))["token"] == "t2"
        await peer.expect("auth")
        await peer.send({"type": "auth_error", "message": "forged", "code": "unauthenticated"})

    async with talk(script) as bus:
        await bus.authenticate("t2")
        assert bus.head == 120
        with pytest.raises(Refused, match="forged"):
            await bus.authenticate("t3")


async def test_goaway_reaches_the_application() -> None:
    events: list[object] = []

    async def script(peer: Peer) -> None:
        await peer.send({"type": "goaway", "reason": "stopping", "reconnect_in": 1.5})
        await peer.published(101)

    async with talk(script, on_event=events.append) as bus:
        await bus.publish("a", 1)
    assert events == [wire.GoAway("stopping", 1.5)]


async def test_every_waiting_call_raises_disconnected_when_the_connection_ends() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        for kind in ("publish", "publish", "publish", "history", "ping", "subscribe"):
            await peer.expect(kind)
        await peer.send(message(101))
        await peer.close(4503, "the database is away")

    ends: dict[str, int | None] = {}
    async with talk(script) as bus, bus.subscribe("a.*") as messages:
        # Started one after another, they are sent in this order.
        async def note(name: str, work: Any) -> None:
            with pytest.raises(Disconnected, match="the database is away") as caught:
                await work
            ends[name] = caught.value.code

        async def iterate() -> None:
            async for item in messages:
                ends[f"message {item.seq}"] = None

        async def subscribe() -> None:
            async with bus.subscribe("b"):
                pass

        async with anyio.create_task_group() as tasks:
            works = [bus.publish("a", 1), bus.publish_many([("a", 1)] * 2), bus.history("a"), bus.ping(), subscribe()]
            names = ["publish", "publish_many", "history", "ping", "subscribe"]
            for name, work in zip(names, works, strict=True):
                tasks.start_soon(note, name, work)
                await anyio.wait_all_tasks_blocked()
            tasks.start_soon(note, "iterate", iterate())
        assert ends == {**dict.fromkeys([*names, "iterate"], 4503), "message 101": None}
        with pytest.raises(Disconnected, match="the database is away"):
            await bus.publish("a", 1)
        with pytest.raises(Disconnected, match="the database is away"):
            await anext(messages)


async def test_closed_bus_raises_disconnected() -> None:
    async with serve(Honest()) as url:
        async with connect(url, token="t") as bus:
            pass
        with pytest.raises(Disconnected, match="closed on this side"):
            await bus.publish("a", 1)
        with pytest.raises(Disconnected):
            await bus.ping()


async def test_iteration_over_a_full_frame_lets_other_tasks_run() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.send(*[message(seq) for seq in range(101, 1101)])

    turns = 0
    async with talk(script) as bus, bus.subscribe("a.*", buffer=5000) as messages:

        async def other() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with anyio.create_task_group() as tasks:
            first = await anext(messages)
            assert first.seq == 101
            tasks.start_soon(other)
            async for item in messages:
                if item.seq == 1100:
                    break
            assert turns >= 5
            tasks.cancel_scope.cancel()
