"""The Autobahn test suite, run against the echo endpoint. The suite needs Python 2.7."""

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
"""Cases whose messages have 4 MiB or more. The default limit of a message is 1 MiB."""

GOOD = frozenset({"OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED"})


@dataclass(frozen=True, slots=True)
class Report:
    """The number of cases with each verdict on behaviour, and the close code of each failed case."""

    verdicts: Counter[str]
    failed: dict[str, int | None]


async def run_suite(url: str, directory: Path, cases: list[str]) -> Report:
    """Run `cases` of the suite, such as `6.*`, against the echo at `url`. Its own reports stay in `directory`."""
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
    return parse_report(json.loads((directory / "index.json").read_text())["catbus"])


def parse_report(found: dict[str, dict[str, Any]]) -> Report:
    """Parse the index of the suite. A case has two verdicts: on behaviour, and on the closing of the connection."""
    failed = {
        case: report["remoteCloseCode"]
        for case, report in found.items()
        if not {report["behavior"], report["behaviorClose"]} <= GOOD
    }
    return Report(Counter(report["behavior"] for report in found.values()), failed)
