"""The examples of `docs/http.md` do what they say, in their order, on a real broker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import trio

from tests.brokers import TOKEN, running
from tests.programs import find_program

DOCUMENT = (Path(__file__).parents[1] / "docs" / "http.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```bash\n(.*?)^```\n\n```(?:json|text)\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


async def run(script: str, url: str) -> str:
    find_program("curl", "curl")
    variables = {"URL": url, "TOKEN": TOKEN, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    done = await trio.run_process(["bash", "-euc", script], env=variables, capture_stdout=True)
    return done.stdout.decode().replace("\r", "")


async def test_examples_print_what_the_document_says() -> None:
    assert len(EXAMPLES) == DOCUMENT.count("```bash")
    async with running() as (broker, address):
        for script, expected in EXAMPLES:
            printed = await run(script, f"http://{address}")
            printed = re.sub(r'"at":\d+', '"at":AT', printed.replace(broker.replica.log.epoch, "EPOCH"))
            assert printed == expected, script


async def test_loop_follows_the_log_without_a_loss() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    async with running() as (broker, address):
        messages = names["follow"](f"http://{address}", TOKEN, "a.*")
        seen: list[int] = []

        def read(number: int) -> None:
            for message in messages:
                seen.append(message["payload"])
                if len(seen) == number:
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read, 200)
            while not broker.replica.message_pages.wake_ups:
                await trio.sleep(0.01)
            for number in range(200):
                await broker.publish("a.b", number)
        messages.close()
    assert seen == list(range(200))
