"""The types of the JavaScript client, and its own tests in Node against a real broker."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import trio

from tests.brokers import SECRET, running
from tests.programs import CLIENT, find_module, find_program


@pytest.fixture
def node() -> str:
    find_module("ws")
    return find_program("nodejs", "node")


def test_types_pass_the_strict_compiler(node: str) -> None:
    done = subprocess.run(
        [node, find_module("typescript/bin/tsc"), "--noEmit"], cwd=CLIENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


async def test_client_passes_its_own_tests_in_node(node: str) -> None:
    async with running() as (_, address):
        environment = {**os.environ, "CATBUS_URL": f"ws://{address}/ws", "CATBUS_SECRET": SECRET}
        command = [node, "--test", "--test-reporter=tap", "test/"]
        with trio.fail_after(120):
            done = await trio.run_process(command, cwd=CLIENT, env=environment, capture_stdout=True, check=False)
    report = done.stdout.decode()
    assert done.returncode == 0, report
    assert "# skipped 0" in report


def test_parts_of_the_console_that_need_no_browser(node: str) -> None:
    command = [node, "--test", "--test-reporter=tap", str(Path(__file__).parent / "console.test.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
