"""The examples in docs/python-client.md do what they say, as they are written there, but for where the broker is."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
import trio

import catbus
from catbus.client.reconnect_policy import State
from tests.brokers import TOKEN, running
from tests.test_readme import carry_out, examples

PAGE = Path(__file__).parent.parent / "docs/python-client.md"
EXAMPLES = examples(PAGE, "python")


def find(text: str, address: str) -> str:
    [example] = [each for each in EXAMPLES if text in each]
    assert "127.0.0.1:8080" in example
    return example.replace("127.0.0.1:8080", address)


def test_every_example_is_python() -> None:
    assert len(EXAMPLES) == 6
    for example in EXAMPLES:
        compile(example, "python-client.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


async def test_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as (_, address):
        await carry_out(find("AsyncExitStack", address), token=TOKEN)
    assert capsys.readouterr().out == "[{'n': 1}]\n"


async def test_a_trio_program(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as (_, address):
        names: dict[str, Any] = {"token": TOKEN}
        exec(compile(find("import trio", address), "python-client.md", "exec"), names)
        await names["main"]()
    assert capsys.readouterr().out == "demo.trio {'n': 1}\n"


async def test_a_counter_that_many_clients_change(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [each for each in EXAMPLES if "ConflictError" in each]
    names: dict[str, Any] = {}
    exec(compile(example, "python-client.md", "exec"), names)
    async with running() as (_, address):
        url = f"ws://{address}/ws"
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(names["count"], url, TOKEN)
        async with catbus.connect(url, token=TOKEN) as bus, bus.retained("counters.*") as counters:
            assert {channel: found.payload for channel, found in counters.items()} == {"counters.visits": 8}
    assert len(capsys.readouterr().out.splitlines()) == 8


async def test_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [each for each in EXAMPLES if "bus.join(" in each]
    names: dict[str, Any] = {}
    exec(compile(example, "python-client.md", "exec"), names)
    async with running() as (_, address), catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus:
        await names["chat"](bus, "Alice")
    here, change = capsys.readouterr().out.splitlines()
    assert here == "here: ['Alice']"
    assert change.endswith(" {'name': 'Alice', 'typing': True}")


async def test_a_worker_whose_cursor_is_beside_its_effect(database_url: str) -> None:
    async def payments(url: str) -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetchrow("SELECT total, cursor FROM totals, cursors") or ())
        except asyncpg.UndefinedTableError:
            return []
        finally:
            await connection.close()

    async def work_until(names: dict[str, Any], total: int) -> str:
        worker = asyncio.create_task(names["work"](database_url))
        while True:
            found = await payments(database_url)
            if found and found[0] >= total:
                break
            if worker.done():
                await worker
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker
        assert found[0] == total
        return str(found[1])

    async with running() as (_, address):
        names: dict[str, Any] = {"token": TOKEN}
        exec(compile(find("asyncpg", address), "python-client.md", "exec"), names)
        async with catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus:
            await bus.publish("orders.1", {"amount": 3})
            first = await trio.to_thread.run_sync(asyncio.run, work_until(names, 3))
            await bus.publish("orders.1", {"amount": 4})
            second = await trio.to_thread.run_sync(asyncio.run, work_until(names, 7))
            assert [first, second] == [f"{seq}.{bus.epoch}" for seq in (1, 2)]


def test_the_diagram_has_every_state() -> None:
    [diagram] = examples(PAGE, "mermaid")
    for state in State:
        assert f"--> {state}" in diagram
