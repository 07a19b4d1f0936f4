"""`docs/webhooks.md`: the receivers run, and verify what `catbus consumer test` and replicas send."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from catbus.webhooks.public_addresses import AddressRules
from catbus.webhooks.signed_request import DeliveredMessage, SignedRequest, encode_messages, encode_test
from catbus.webhooks.verdicts import FIRST_DELAY, LONGEST_DELAY, AttemptResult, Outcome, backoff
from catbus.webhooks.webhook_sender import WebhookSender
from tests.postgres.sql import wait_until
from tests.test_readme import examples
from tests.webhooks.test_signed_request import MADE, SECRETS

PAGE = Path(__file__).parent.parent / "docs" / "webhooks.md"
(FASTAPI,) = examples(PAGE, "python")
(NODE,) = examples(PAGE, "js")
MESSAGES = [
    DeliveredMessage(18, "orders.42", '{"status":"paid"}', 5, None),
    DeliveredMessage(20, "orders.7", "[1]", 6, "a"),
]


def write_fastapi(directory: Path, port: int) -> list[str]:
    (directory / "receiver.py").write_text(FASTAPI)
    return [sys.executable, "-m", "hypercorn", "receiver:app", "--workers", "0", "--bind", f"127.0.0.1:{port}"]


def write_node(directory: Path, port: int) -> list[str]:
    node = shutil.which("node")
    assert node is not None
    (directory / "receiver.mjs").write_text(NODE)
    return [node, "receiver.mjs"]


RECEIVERS = {"fastapi": write_fastapi, "node": write_node}


@contextmanager
def receiving(name: str, directory: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a receiver of the page. Yields its URL and the process, whose output are the messages."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WEBHOOK_SECRET": SECRETS[0], "PORT": str(port)}
    command = RECEIVERS[name](directory, port)
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield f"http://127.0.0.1:{port}/hook", process
        finally:
            process.kill()


@pytest.mark.parametrize("name", RECEIVERS)
async def test_receiver_of_the_page_accepts_what_is_signed_and_nothing_else(name: str, tmp_path: Path) -> None:
    sender = WebhookSender(AddressRules(["127.0.0.1"]), 1)

    async def send(body: bytes, *secrets: str, age: float = 0) -> AttemptResult:
        return await sender.send(SignedRequest("msg_1", url, body, secrets), time.time() - age, 20)

    async def is_up() -> bool:
        return (await send(b"", SECRETS[1])).outcome is Outcome.REJECTED

    messages = encode_messages("mails", 0, MADE, MESSAGES)
    with receiving(name, tmp_path) as (url, process):
        await wait_until(is_up)
        assert (await send(encode_test("mails", MADE), SECRETS[0])).outcome is Outcome.DELIVERED
        assert (await send(messages, SECRETS[1])).text == "the receiver responded with status 401"
        assert (await send(messages, SECRETS[0], age=1000)).outcome is Outcome.REJECTED
        # As during a rotation.
        assert (await send(messages, SECRETS[1], SECRETS[0])).outcome is Outcome.DELIVERED
        await sender.close()
        process.kill()
        assert process.stdout is not None
        lines = [line for line in process.stdout.read().splitlines() if line.startswith(("18 ", "20 "))]
        assert [line.replace("'", '"').replace(" ", "") for line in lines] == [
            '18orders.42{"status":"paid"}', "20orders.7[1]"
        ]  # fmt: skip


def test_setting_says_how_long_a_receiver_may_be_away() -> None:
    minutes = sum(backoff(failures, 0.5) for failures in range(1, 20)) / 60
    assert f"for about {round(minutes):d} minutes" in (PAGE.parent.parent / "catbus.toml").read_text()
    assert (FIRST_DELAY, LONGEST_DELAY) == (1, 600)
    assert "from about a second to ten minutes" in PAGE.read_text()
