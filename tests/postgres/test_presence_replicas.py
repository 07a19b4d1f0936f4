"""Presence on several replicas as processes: members move, are drained with their replica, or are lost with it."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import Any

import trio

from catbus.errors import Disconnected
from tests.postgres.processes import Replica, open_replicas, token
from tests.postgres.sql import expire_replica, open_sql
from tests.raw_session import Message, RawSession, open_session

PATIENCE = 120.0


async def join(stack: AsyncExitStack, replica: Replica, name: str, info: Any = None) -> RawSession:
    """Connect a client to a replica, and make it a member."""
    session = await stack.enter_async_context(open_session(replica.url, token(name)))
    await session.request("joined", type="join", channel="room.1", info=info)
    return session


async def watch(session: RawSession) -> list[Message]:
    """Subscribe with presence, and return the members of the snapshot."""
    await session.request("subscribed", type="subscribe", pattern="room.*", presence=True)
    found: list[Message] = []
    while True:
        page = await session.receive("members")
        found += page["members"]
        if page.get("complete"):
            return found


async def joins_and_leaves(session: RawSession, number: int) -> list[tuple[str, str]]:
    """Return the actions and client_ids of the next changes that are no updates, sorted."""
    found: list[tuple[str, str]] = []
    while len(found) < number:
        change = await session.receive("presence")
        if change["action"] != "update":
            found.append((change["action"], change["client_id"]))
    return sorted(found)


async def test_client_that_moves_between_replicas_is_not_announced(database_url: str) -> None:
    """Neither if it moves by itself, nor if its replica drains its clients and stops."""
    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 2, CATBUS_PRESENCE_GRACE="5s") as replicas, AsyncExitStack() as stack:
            first, second = replicas
            watcher = await stack.enter_async_context(open_session(first.url, token("watcher")))
            assert await watch(watcher) == []
            for name in ("carol", "dave"):
                await join(stack, second, name)
            async with AsyncExitStack() as before:
                await join(before, second, "alice", "first")
                await join(before, second, "bob")
                assert await joins_and_leaves(watcher, 4) == [
                    ("join", name) for name in ("alice", "bob", "carol", "dave")
                ]
            await join(stack, first, "alice", "again")
            second.terminate()
            await join(stack, first, "carol")
            assert await second.wait() == 0
            assert await joins_and_leaves(watcher, 2) == [("leave", "bob"), ("leave", "dave")]
            page = await watcher.request("members", type="members", pattern="room.*")
            assert [(each["client_id"], each["sessions"], each.get("info")) for each in page["members"]] == [
                ("alice", 1, "again"),
                ("carol", 1, None),
            ]


async def test_members_of_a_killed_replica_are_announced_as_gone_once(database_url: str) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            open_replicas(database_url, 2, module="tests.postgres.impatient_replica") as [first, second],
            open_sql(database_url) as sql,
            AsyncExitStack() as stack,
        ):
            watcher = await stack.enter_async_context(open_session(first.url, token("watcher")))
            await join(stack, first, "here")
            members = [await join(stack, second, f"member-{number}") for number in range(5)]
            known = {each["client_id"] for each in await watch(watcher)}
            while len(known) < 6:
                change = await watcher.receive("presence")
                assert change["action"] == "join"
                known.add(change["client_id"])
            second.kill()
            await second.wait()
            for session in members:
                with suppress(Disconnected):
                    await session.receive("goaway")
            await join(stack, first, "member-0")
            await expire_replica(sql, "member-1", rejoined=2)
            gone: list[str] = []
            while len(gone) < 4:
                change = await watcher.receive("presence")
                if change["action"] == "leave":
                    gone.append(change["client_id"])
            assert sorted(gone) == [f"member-{number}" for number in range(1, 5)]
            page = await watcher.request("members", type="members", pattern="room.*")
            assert [each["client_id"] for each in page["members"]] == ["here", "member-0"]
            again = await stack.enter_async_context(open_session(first.url, token("watcher")))
            assert [each["client_id"] for each in await watch(again)] == ["here", "member-0"]
