"""`catbus consumer`: consumers from their creation to their deletion, and what is said about wrong calls."""

from __future__ import annotations

import json

import pytest
import trio

from tests.postgres.consumers import publish, receive
from tests.postgres.sql import open_sql

from .conftest import Command, Outcome


@pytest.fixture
def consumer(catbus: Command, database_url: str) -> Command:
    """`catbus consumer`, with the database."""

    def run(*arguments: str) -> Outcome:
        return catbus("consumer", *arguments, "--database", database_url)

    return run


def play(url: str, *channels: str, rejected: tuple[int, ...] = (), script: str = "") -> None:
    """Publish, receive with the consumer `c`, and reject."""

    async def go() -> None:
        async with open_sql(url) as sql:
            await publish(sql, *channels)
            await sql.execute("BEGIN")
            await receive(sql)
            for seq in rejected:
                await sql.fetch("SELECT catbus.reject('c', $1, 'broken')", seq)
            await sql.execute(f"COMMIT; {script}")

    trio.run(go)


def test_consumer_is_created_listed_and_deleted(consumer: Command, database_url: str) -> None:
    assert consumer("list") == (0, "", "there is no consumer: catbus consumer create NAME PATTERN\n")
    status, output, errors = consumer("create", "c", "a.*", "--partitions", "2", "--hold", "--start", "floor")
    assert (status, output) == (0, "")
    assert "catbus.receive('c', 100)" in errors
    play(database_url, "a.x", "b.x", "a.x", rejected=(3,))
    status, output, errors = consumer("list")
    assert (status, errors) == (0, "")
    columns, row = output.splitlines()
    assert columns.split() == ["CONSUMER", "PATTERN", "OWNER", "PARTITIONS", "LAG", "MOVED", "DEAD", "NOTES"]
    assert row.split()[:2] == ["c", "a.*"]
    assert row.split()[-2:] == ["1", "hold"]
    status, output, _ = consumer("list", "--json")
    found = json.loads(output)
    assert [found[name] for name in ("consumer", "pattern", "hold", "lag", "gap", "dead_letters")] == [
        "c", "a.*", True, 3, False, 1,
    ]  # fmt: skip
    assert sorted(partition["cursor"] for partition in found["partitions"]) == [0, 3]
    assert consumer("delete", "c", "--yes") == (0, "", "deleted c\n")
    assert consumer("list", "--json") == (0, "", "")


def test_dead_letters_are_shown_and_deleted(consumer: Command, database_url: str) -> None:
    consumer("create", "c", "a.*", "--start", "floor")
    play(database_url, "a.x", "a.y", rejected=(1, 2))
    status, output, _ = consumer("dead", "c")
    first, second = map(json.loads, output.splitlines())
    assert status == 0
    assert [first[name] for name in ("seq", "channel", "payload", "reason", "sender")] == [
        1,
        "a.x",
        "1",
        "broken",
        None,
    ]
    assert second["channel"] == "a.y"
    assert consumer("dead", "c", "--delete", "1") == (0, "", "")
    assert json.loads(consumer("dead", "c").output) == second
    status, _, errors = consumer("dead", "c", "--delete", "1", "--delete", "2")
    assert (status, errors) == (1, "catbus: c has no dead letter 1\n")
    assert consumer("dead", "c") == (0, "", "")


def test_consumer_is_moved_and_goes_on_behind_a_gap(consumer: Command, database_url: str) -> None:
    consumer("create", "c", "a.*", "--start", "floor")
    play(
        database_url, "a.x", "a.x", script="DELETE FROM catbus.entries WHERE seq = 1; UPDATE catbus.head SET floor = 2"
    )
    assert consumer("reset", "c", "1") == (0, "", "moved c to 1\n")
    assert consumer("reset", "c", "gap") == (0, "", "c has no gap\n")
    play(database_url, script="UPDATE catbus.consumer_cursors SET cursor = 0")
    assert consumer("list").output.split()[-1] == "gap"
    assert consumer("reset", "c", "gap") == (0, "partition 0 of c never receives the messages 1 to 1\n", "")
    assert consumer("reset", "c", "head").status == 0
    assert json.loads(consumer("list", "--json").output)["lag"] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("create", "d", "a.*.b"), 2, "pattern"),
        (("create", "d e", "a"), 1, "not a name of a consumer"),
        (("create", "c", "a"), 1, 'the consumer "c" exists'),
        (("create", "d", "a", "--start", "now"), 1, 'starts at "head", at "floor" or after a seq'),
        (("create", "d", "a", "--owner", "nobody_at_all"), 1, 'no role "nobody_at_all"'),
        (("reset", "d", "head"), 1, 'has no consumer "d"'),
        (("delete", "d", "--yes"), 1, 'has no consumer "d"'),
        (("delete", "c"), 2, "give --yes"),
        (("dead", "d"), 1, 'no consumer "d"'),
    ],
)
def test_wrong_call_says_what_is_wrong(consumer: Command, arguments: tuple[str, ...], status: int, text: str) -> None:
    consumer("create", "c", "a.*")
    found = consumer(*arguments)
    assert (found.status, found.output) == (status, "")
    assert text in found.errors
    assert found.errors.count("\n") == 1


def test_help_teaches_the_transaction(catbus: Command) -> None:
    status, output, _ = catbus("consumer")
    assert status == 0
    assert "SELECT seq, channel, payload FROM catbus.receive('billing', 100);" in output
    for name in ("list", "show", "create", "delete", "reset", "dead", "secret", "pause", "resume", "test"):
        assert "Examples:" in catbus("consumer", name, "--help").output


# Deliveries


def test_consumer_with_a_url_is_tested_paused_and_resumed(
    catbus: Command, consumer: Command, database_url: str
) -> None:
    status, output, errors = consumer("create", "mails", "a.*", "--push", "http://127.0.0.1:1/hook?key=secret")
    assert status == 0
    secret = output.strip()
    assert secret.startswith("whsec_")
    assert "catbus consumer test mails" in errors
    assert consumer("secret", "mails").output == output
    assert consumer("list").output.split()[-1] == "push"
    # Without `[webhooks] allow`, nothing is sent to this machine. The query of the URL may be secret.
    status, output, errors = consumer("test", "mails")
    assert (status, output) == (1, "")
    assert "connecting without TLS to 127.0.0.1 is not allowed" in errors
    assert "key=" not in errors
    assert consumer("pause", "mails", "--reason", "moving") == (0, "", "paused mails\n")
    assert consumer("list").output.split()[-2:] == ["push", "paused"]
    push = json.loads(consumer("show", "mails").output)["push"]
    assert (push["url"], push["reason"]) == ("http://127.0.0.1:1/hook?key=secret", "moving")
    assert [partition["failures"] for partition in push["partitions"]] == [0]
    assert consumer("resume", "mails") == (0, "", "resumed mails\n")
    assert json.loads(consumer("show", "mails").output)["push"]["paused"] is None
    fresh = consumer("secret", "mails", "--rotate", "--overlap", "1h").output.strip()
    assert fresh != secret
    assert consumer("secret", "mails").output.strip() == fresh


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("create", "d", "a", "--push", "ftp://x"), 1, "deliveries need a URL"),
        (("show", "d"), 1, 'no consumer "d"'),
        (("secret", "c"), 1, "has no URL"),
        (("secret", "c", "--overlap", "soon", "--rotate"), 2, "is a duration"),
        (("pause", "c"), 1, "has no URL"),
        (("resume", "d"), 1, 'has no consumer "d"'),
        (("test", "c"), 1, "has no URL"),
    ],
)
def test_wrong_call_for_deliveries_says_what_is_wrong(
    consumer: Command, arguments: tuple[str, ...], status: int, text: str
) -> None:
    consumer("create", "c", "a.*")
    found = consumer(*arguments)
    assert (found.status, found.output) == (status, "")
    assert text in found.errors
