"""Presence after a failover: the UNLOGGED tables of a promoted standby are empty."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

import msgspec
import trio

from catbus import Broker, Config
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import DatabaseSettings, PresenceSettings
from tests.brokers import CONFIG, SECRET, running
from tests.postgres.clusters import open_cluster, open_served_cluster
from tests.postgres.proxy import Proxy, open_proxy
from tests.postgres.sql import open_sql, wait_until
from tests.postgres.test_new_epoch import wait_replayed
from tests.postgres.test_presence_replicas import watch
from tests.raw_session import RawSession, open_session

PATIENCE = 120.0

_MEMBERS = "SELECT count(DISTINCT client_id) FROM catbus.presence WHERE channel = 'room.1'"


def token(name: str) -> str:
    return sign(SECRET, client_id=name, grants=Grants.ALL)


def settings(proxy: Proxy) -> Config:
    database = DatabaseSettings(url=proxy.url)
    return msgspec.structs.replace(CONFIG, database=database, presence=PresenceSettings(grace=5.0))


async def open_member(stack: AsyncExitStack, broker: Broker, name: str) -> RawSession:
    """Connect a client, and make it a member."""
    session = await stack.enter_async_context(open_session(broker.urls[0], token(name)))
    await session.request("joined", type="join", channel="room.1")
    return session


async def test_no_connected_member_is_announced_as_gone_after_a_failover() -> None:
    """A member that left during the failover is announced as gone, once, and with it any other that counted as gone."""
    in_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
    with trio.fail_after(PATIENCE):
        with open_served_cluster() as cluster, open_cluster() as standby:
            async with open_proxy(cluster.url) as proxy, AsyncExitStack() as stack:
                config = settings(proxy)
                first, _ = await stack.enter_async_context(running(config, seconds=PATIENCE))
                second, _ = await stack.enter_async_context(running(config, seconds=PATIENCE))
                for broker in (first, second):
                    await broker.replica.log.wait_open()
                await open_member(stack, first, "alice")
                await open_member(stack, second, "bob")
                watchers = [
                    await stack.enter_async_context(open_session(broker.urls[0], token("watcher")))
                    for broker in (first, second)
                ]
                async with AsyncExitStack() as leaving:
                    await open_member(leaving, second, "carol")
                    for watcher in watchers:
                        names = {member["client_id"] for member in await watch(watcher)}
                        while names != {"alice", "bob", "carol"}:
                            change = await watcher.receive("presence")
                            assert change["action"] == "join"
                            names.add(change["client_id"])
                    await in_thread(partial(cluster.make_standby, standby))
                    await wait_replayed(cluster, standby)
                    epoch = first.replica.log.epoch
                    proxy.close()
                    await in_thread(cluster.stop)
                    await leaving.aclose()
                    await in_thread(standby.promote)
                async with open_sql(standby.url) as sql:
                    assert await sql.fetchrow(_MEMBERS) == (0,)
                    proxy.open(standby.url)

                    async def written_again() -> bool:
                        return bool(await sql.fetchrow(_MEMBERS) == (2,))

                    await wait_until(written_again)
                await open_member(stack, second, "dave")
                for watcher in watchers:
                    found = []
                    while ("leave", "carol") not in found:
                        change = await watcher.receive("presence")
                        found.append((change["action"], change["client_id"]))
                    assert sorted(found) == [("join", "dave"), ("leave", "carol")]
                for broker in (first, second):
                    present = await broker.members("room.*")
                    assert [member.client_id for member in present.members] == ["alice", "bob", "dave"]
                assert first.replica.log.epoch == second.replica.log.epoch != epoch
