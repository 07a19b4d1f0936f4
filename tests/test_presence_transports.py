"""Presence over sockets: the same over WebSocket, WebTransport and event streams, and for administrators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

import catbus
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import PresenceSettings
from catbus.errors import Refused
from tests.brokers import CONFIG, SECRET, TOKEN, request
from tests.endpoints.event_source import events
from tests.raw_session import open_session
from tests.test_both_transports import running

ALICE = sign(SECRET, client_id="alice", grants=Grants(("room.*",), ()))


def state(message: dict[str, Any]) -> tuple[Any, ...]:
    """What is the same on all transports."""
    return tuple(message.get(name) for name in ("action", "channel", "sessions", "client_id", "info"))


async def test_every_transport_joins_and_watches(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as (_, websocket, found),
        open_session(websocket, ALICE) as alice,
        open_session(websocket, TOKEN) as one,
        open_session(found["webtransport"], TOKEN, found["certificate"]) as other,
        events(urlsplit(websocket).netloc, "pattern=room.*&presence=1") as source,
    ):
        for watcher in (one, other):
            await watcher.request("subscribed", type="subscribe", pattern="room.*", presence=True)
            snapshot = await watcher.receive("members")
            assert snapshot == {"type": "members", "pattern": "room.*", "members": [], "complete": True}
        event = await source.next()
        assert (event.type, event.data) == ("members", snapshot)
        assert event.last_id == source.parser.last_id, "it moves no position"

        await alice.request("joined", type="join", channel="room.1", info={"name": "Älice"})
        await other.request("joined", type="join", channel="room.2")
        await alice.request("left", type="leave", channel="room.1")
        for watcher in (one, other):
            changes = [state(await watcher.receive("presence")) for _ in range(3)]
            assert changes[0] == ("join", "room.1", 1, "alice", {"name": "Älice"})
            assert changes[1][:3] == ("join", "room.2", 1)
            assert changes[2][:4] == ("leave", "room.1", 0, "alice")
            page = await watcher.request("members", type="members", pattern="room.*")
            assert [each["channel"] for each in page["members"]] == ["room.2"]
        blocks = [await source.next() for _ in range(3)]
        assert [(each.type, state(each.data)) for each in blocks] == [("presence", change) for change in changes]


async def test_subscription_on_its_own_stream_has_its_presence_there(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as (_, websocket, found),
        open_session(websocket, ALICE) as alice,
        open_session(found["webtransport"], TOKEN, found["certificate"]) as watcher,
    ):
        await alice.request("joined", type="join", channel="room.1")
        subscribed = await watcher.request("subscribed", type="subscribe", pattern="room.*", presence=True, stream=True)
        assert subscribed["stream"]
        page = await watcher.receive("members")
        assert [each["client_id"] for each in page["members"]] == ["alice"]
        await alice.request("left", type="leave", channel="room.1")
        assert (await watcher.receive("presence"))["action"] == "leave"
        await watcher.send(type="unsubscribe", pattern="room.*")
        await watcher.receive("unsubscribed")


@pytest.mark.parametrize("query", ["pattern=room.*&presence=yes", "pattern=room.*&presence=1&presence=1"])
async def test_event_stream_rejects_another_value(tmp_path: Path, query: str) -> None:
    async with running(tmp_path) as (_, websocket, _), events(urlsplit(websocket).netloc, query) as source:
        assert source.status == 400
        assert json.loads(await source.body())["code"] == "bad_message"


async def test_administrators_list_members_in_pages(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, presence=PresenceSettings(sessions=True))
    async with (
        running(tmp_path, config) as (broker, websocket, _),
        open_session(websocket, ALICE) as alice,
    ):
        for channel in ("room.1", "room.2", "room.3"):
            await alice.request("joined", type="join", channel=channel, info={"in": channel})
        address = urlsplit(websocket).netloc

        async def pages(query: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            after = ""
            while True:
                response = await request(address, f"/api/presence?{query}{after}", token=TOKEN)
                assert response.status == 200, response
                page = json.loads(response.body)
                found += page["members"]
                if page["next"] is None:
                    return found
                after = "&after=" + page["next"].replace(" ", "+")

        assert await pages("limit=2") == [
            {"channel": channel, "sessions": 1, "client_id": "alice", "session": None, "info": {"in": channel}}
            for channel in ("room.1", "room.2", "room.3")
        ]
        assert [each["channel"] for each in await pages("pattern=room.2")] == ["room.2"]
        [session] = await pages("pattern=_catbus.sessions")
        assert (session["client_id"], session["info"]["client_id"]) == (None, "alice")
        assert session["info"]["transport"] == "websocket"
        for query, code in (("after=x", "bad_message"), ("pattern=..", "invalid_pattern"), ("limit=0", "bad_message")):
            response = await request(address, f"/api/presence?{query}", token=TOKEN)
            assert (response.status, json.loads(response.body)["code"]) == (400, code)
        assert (await request(address, "/api/presence", token=ALICE)).status == 403

        page = await broker.members("room.*", limit=2)
        assert [(each.channel, each.client_id) for each in page.members] == [("room.1", "alice"), ("room.2", "alice")]
        page = await broker.members("room.*", after=page.next)
        assert [(each.channel, each.info) for each in page.members] == [("room.3", b'{"in": "room.3"}')]
        assert page.next is None
        with pytest.raises(Refused):
            await broker.members("..")
        with pytest.raises(ValueError, match="limit"):
            await broker.members("*", limit=0)
        assert isinstance(broker, catbus.Broker)
