"""`catbus why` on two replicas: what became of messages for clients that read, stall, may not read, or are away."""

from __future__ import annotations

import sys

import trio

import catbus
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from tests.log.harness import TEST_TIMEOUT
from tests.postgres.processes import SECRET, Replica, open_replicas, token
from tests.postgres.sql import open_sql

LARGE = "x" * 60_000


async def why(replicas: list[Replica], message: int | str, client_id: str) -> str:
    """The first line that the command prints, when it asks the replica first to which the client is not connected."""
    first, *others = [replica.url for replica in reversed(replicas)]
    command = [sys.executable, "-m", "catbus", "why", str(message), "--client-id", client_id, "--url", first]
    command += [word for url in others for word in ("--replica", url)]
    done = await trio.run_process([*command, "--token", token("operator")], capture_stdout=True)
    return done.stdout.decode().partition("\n")[0]


async def test_fate_of_a_message_is_told_for_every_client(database_url: str) -> None:
    only_b = sign(SECRET, client_id="cleo", grants=Grants(("b.*",), ()))
    async with (
        open_replicas(database_url, 2, CATBUS_LIMITS_RECENT="1") as replicas,
        catbus.connect(replicas[0].url, token=token("bob")) as bob,
        catbus.connect(replicas[0].url, token=token("stalled")) as stalled,
        catbus.connect(replicas[0].url, token=only_b) as cleo,
        catbus.connect(replicas[1].url, token=token("alice")) as alice,
        open_sql(database_url) as sql,
    ):

        async def said(message: int | str, client_id: str, beginning: str) -> bool:
            return (await why(replicas, message, client_id)).startswith(beginning)

        before = await alice.publish("a.x", "before")
        async with bob.subscribe("a.*") as messages, stalled.subscribe("a.*", buffer=1), cleo.subscribe("b.*"):
            seq = await alice.publish("a.x", 1)
            assert (await anext(messages)).seq == seq
            assert await said(seq, "bob", f"delivered: message {seq} was sent to bob by ")
            assert await said(before, "bob", f"not delivered: bob subscribed after message {before}")
            assert await said(seq, "cleo", "not delivered: cleo has no permission")
            assert await said(seq, "alice", "not delivered: alice is connected, and not subscribed")
            assert await said(seq, "nobody", "no session of nobody is open on ")

            # It reads nothing, so its send queue fills, and what comes then waits in the log.
            newest = await alice.publish("a.x", LARGE)
            while not await said(newest, "stalled", f"lagging: message {newest} comes to stalled, after "):
                for _ in range(100):
                    newest = await alice.publish("a.x", LARGE)
            dropped = "perhaps dropped: full send queues of stalled had no room for "
            with trio.fail_after(TEST_TIMEOUT):
                while not await said("a.x", "stalled", dropped):
                    for _ in range(20):
                        await alice.publish("a.x", LARGE[:7000], ephemeral=True)
            assert await said("b.x", "cleo", "subscribed: cleo receives")

            await sql.execute("SELECT catbus.erase('a.x')")
            assert await said(seq, "bob", f"message {seq} was erased")
            await sql.execute(f"DELETE FROM catbus.entries WHERE seq <= {before}; UPDATE catbus.head SET floor = {seq}")
            assert await said(before, "bob", f"message {before} was removed by retention")
            assert await said(1_000_000, "bob", "never published: the newest message is ")
