"""During each attack an honest client gets all of its messages in order, and afterwards nothing of the attack is left.

These tests measure no times: `python -m tests.hostile` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import IO

import pytest

from tests.hostile.__main__ import ATTACKS, table
from tests.hostile.broker import ROOT
from tests.postgres.server import execute, to_database

SIDE_BY_SIDE = ("session", "tls"), ("http",), ("websocket", "quic")
"""The programs, and the layers that each attacks. They wait most of the time."""
STOOD = [name for name, attack in ATTACKS.items() if attack.stands and not attack.drains]


class Outcomes:
    """The results that the programs report, by layer and attack."""

    def __init__(self, lines: Mapping[str, IO[str]]) -> None:
        self._lines = lines
        self._found: dict[str, list[str]] = {}

    def wait(self, name: str) -> list[str]:
        """Return the failures of one attack."""
        while name not in self._found:
            line = self._lines[ATTACKS[name].layer].readline()
            assert line, "the program has ended"
            done, faults = json.loads(line)
            self._found[done] = faults
        return self._found[name]


@pytest.fixture(scope="module")
def outcomes(postgres_server: str) -> Iterator[Outcomes]:
    maintenance, name = to_database(postgres_server, "postgres"), f"catbus_hostile_{os.getpid()}"
    execute(maintenance, f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    url = to_database(postgres_server, name)
    command = [sys.executable, "-m", "tests.hostile", "--short", "--database", url, "--only"]
    with ExitStack() as stack:
        lines = {}
        for layers in SIDE_BY_SIDE:
            program = stack.enter_context(
                subprocess.Popen([*command, *layers], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(program.terminate)
            assert program.stdout is not None
            lines.update(dict.fromkeys(layers, program.stdout))
        yield Outcomes(lines)
    execute(maintenance, f"DROP DATABASE {name} WITH (FORCE)")


def test_documentation_lists_every_attack() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    assert "\n".join(table(ATTACKS.values())) in text


@pytest.mark.parametrize("name", STOOD)
def test_broker_withstands_the_attack(outcomes: Outcomes, name: str) -> None:
    assert outcomes.wait(name) == []
