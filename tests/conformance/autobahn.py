"""The Autobahn test suite against the endpoint's echo. It needs Python 2.7."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.programs import find_for_conformance

OVER_A_MEBIBYTE = frozenset(
    [f"9.{part}.{case}" for part in (1, 2) for case in (4, 5, 6)]
    + [f"9.{part}.{n}" for part in (3, 4) for n in range(1, 10)]
)
"""Cases whose messages have 4 MiB or more. By default a message may have 1 MiB."""

GOOD = frozenset({"OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED"})


@dataclass(frozen=True, slots=True)
class Report:
    """`verdicts` counts what the suite says of behaviour; `failed` has the closing codes of cases that did not pass."""

    verdicts: Counter[str]
    failed: dict[str, int | None]


async def play(url: str, directory: Path, cases: list[str]) -> Report:
    """Have the suite play `cases`, such as `6.*`, to the echo at `url`; its own reports stay in `directory`."""
    specification = {
        "outdir": str(directory),
        "servers": [{"agent": "catbus", "url": url}],
        "cases": cases,
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    path = directory / "fuzzingclient.json"
    await trio.Path(path).write_text(json.dumps(specification))
    command = [str(find_for_conformance("wstest", "autobahn")), "--mode", "fuzzingclient", "--spec", str(path)]
    await trio.run_process(command, stdout=subprocess.DEVNULL)
    return read(json.loads((directory / "index.json").read_text())["catbus"])


def read(found: dict[str, dict[str, Any]]) -> Report:
    """What the suite's index says. A case has two verdicts, of which the second is about how the connection ended."""
    failed = {
        case: report["remoteCloseCode"]
        for case, report in found.items()
        if not {report["behavior"], report["behaviorClose"]} <= GOOD
    }
    return Report(Counter(report["behavior"] for report in found.values()), failed)
