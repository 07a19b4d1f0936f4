"""Play suites and clients that nobody here wrote to a broker, and print what they say.

    python -m tests.conformance
    python -m tests.conformance --only ws HAProxy
    python -m tests.conformance --write docs/conformance.md

`make conformance` installs what it needs. What is missing is said, and the rest is played. Ends with status 1 when
something fails that is not expected to.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.browser.driver import PROGRAMS
from tests.conformance import autobahn, conversation, proxies, puppets
from tests.conformance.echo import SIZE, echoing
from tests.conformance.ways import EXTENDED_CONNECT, WAYS, Certificates
from tests.foreign.test_webtransport import play as play_webtransport
from tests.programs import CLIENT, find_for_conformance, find_foreign_python, find_program

STEP_TIME = 60
"""Seconds for a step of a conversation."""

PASSED = "passed"
Missing = pytest.skip.Exception, pytest.fail.Exception
"""What `tests.programs` raises for something that is not installed."""

Row = Sequence[object]
Results = dict[str, str]
"""What came of each step: `PASSED`, maybe with a note; why the client cannot do it, after a dash; or how it failed."""


def table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# The Autobahn suite


async def play_autobahn(made: Certificates, directory: Path, only: Sequence[str]) -> tuple[str, bool]:
    try:
        find_for_conformance("wstest", "autobahn")
    except Missing:
        return "Not played: it needs Python 2.7 (`make conformance PYTHON2=/path/to/python2.7`).", True
    rows: list[Row] = []
    fine = True
    for way, size in (("plain", SIZE), ("TLS", SIZE), ("plain", 65_536)):
        certificate = (str(made.certificate), str(made.key)) if way == "TLS" else None
        place = directory / f"autobahn-{way}-{size}"
        place.mkdir()
        with trio.fail_after(1500):
            async with echoing(size, certificate) as url:
                report = await autobahn.play(url, place, [each for each in only if "." in each] or ["*"])
        too_large = [case for case, code in report.failed.items() if code == 1009 and case in autobahn.OVER_A_MEBIBYTE]
        expected = too_large if size < SIZE else []
        fine &= len(report.failed) == len(expected)
        found = report.verdicts
        limit = f"{16 * size >> 20} MiB"
        failed = ", ".join(f"{case}" + ("" if case in expected else " **unexpected**") for case in report.failed)
        counts = [found[verdict] for verdict in ("OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED")]
        rows.append([way, limit, sum(found.values()), *counts, len(report.failed), failed or "-"])
    head = ["Way", "Largest message", "Cases", "OK", "Non-strict", "Informational", "Not offered", "Failed", "Which"]
    return table(head, rows), fine


# Client libraries and browsers


async def converse(scene: conversation.Scene) -> Results:
    results: Results = {}
    for step in conversation.STEPS:
        try:
            with trio.fail_after(STEP_TIME):
                note = await step(scene)
            results[step.__name__] = f"{PASSED}: {note}" if note else PASSED
        except puppets.Unable as unable:
            results[step.__name__] = f"- {unable}"
        except Exception as error:  # noqa: BLE001 (it is what is to be known)
            results[step.__name__] = f"FAILED: {type(error).__name__}: {error}"[:300]
    return results


async def play_clients(
    made: Certificates, directory: Path, only: Sequence[str]
) -> tuple[dict[tuple[str, str], Results], dict[tuple[str, str], str]]:
    """What came of each client on each way, and in which version of HTTP proxies heard of it."""
    results: dict[tuple[str, str], Results] = {}
    versions: dict[tuple[str, str], str] = {}
    names = chosen(puppets.PUPPETS, only)
    ways = chosen(WAYS, only)
    for name in names:
        try:
            async with puppets.PUPPETS[name]() as puppet:
                for number, way in enumerate(ways):
                    if name == puppets.EXTENDED_CONNECT and way not in EXTENDED_CONNECT:
                        continue
                    place = directory / f"{name}-{number}"
                    place.mkdir()
                    try:
                        if proxy_name := WAYS[way].proxy:
                            proxies.PROGRAMS[proxy_name]()
                        async with WAYS[way].scene(puppet, made, place) as (scene, proxy):
                            results[name, way] = await converse(scene)
                    except Missing as missing:
                        results[name, way] = {"all": f"- {missing}"}
                        continue
                    if proxy is not None:
                        versions[name, way] = ", ".join(sorted(proxy.versions())) or "none"
                    print(f"{name}, {way}: {summary(results[name, way])}", file=sys.stderr, flush=True)
        except Missing as missing:
            results |= {(name, way): {"all": f"- {missing}"} for way in ways}
    return results, versions


def chosen(all_of_them: Iterable[str], only: Sequence[str]) -> list[str]:
    return [name for name in all_of_them if name in only] or list(all_of_them)


def summary(results: Results) -> str:
    """`11 of 11`, or what has failed."""
    if (missing := results.get("all")) is not None:
        return f"not played: {missing.removeprefix('- ')}"
    failed = [step for step, result in results.items() if result.startswith("FAILED")]
    possible = [step for step, result in results.items() if not result.startswith("-")]
    text = f"{len(possible) - len(failed)} of {len(possible)}"
    return f"{text}, not {', '.join(failed)}" if failed else text


async def play_webtransport_libraries() -> dict[str, str]:
    found = {}
    for library in ("pywebtransport", "web-transport-quinn"):
        with tempfile.TemporaryDirectory() as state:
            try:
                heard = await play_webtransport(library, Path(state))
                found[library] = PASSED if heard["ended"]["type"] == "unsubscribed" else str(heard)
            except Missing as missing:
                found[library] = f"- {missing}"
            except Exception as error:  # noqa: BLE001 (likewise)
                found[library] = f"FAILED: {error}"[:300]
    return found


# What was played with


def said(find: Callable[[], str | Path], *options: str, pattern: str = r"\d+\.[\w.+~-]+") -> str:
    """The version that a program names."""
    try:
        command = [str(find()), *options]
    except Missing:
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(pattern, done.stdout + done.stderr)
    return found[0] if found else "not installed"


def packages(find: Callable[[], Path], *names: str) -> list[Row]:
    """The versions of packages for another Python."""
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return [[name, said(find, "-c", code, name)] for name in names]


def versions_played() -> str:
    browsers = [[name, said(partial(find_program, *PROGRAMS[name.lower()]), "--version")] for name in BROWSERS]
    python2 = partial(find_for_conformance, "python", "autobahn")
    suite = said(python2, "-m", "pip", "show", "autobahntestsuite", pattern=r"(?<=Version: )\S+")
    rows: list[Row] = [
        ["Python of the broker", sys.version.split()[0]],
        *[[name, importlib.metadata.version(name)] for name in ("trio-websocket", "wsproto", "aioquic")],
        ["Autobahn suite", suite],
        *packages(partial(find_for_conformance, "python"), "websockets", "aiohttp", "websocket-client", "niquests"),
        *packages(find_foreign_python, "pywebtransport", "web-transport-quinn"),
        ["Node", said(partial(find_program, "nodejs", "node"), "--version")],
        [
            "ws",
            said(lambda: find_program("npm", "npm"), "ls", "--prefix", str(CLIENT), "ws", pattern=r"(?<=ws@)[\w.]+"),
        ],
        *browsers,
        *[[name, said(find, OPTIONS[name])] for name, find in proxies.PROGRAMS.items()],
    ]
    return table(["", "Version"], rows)


BROWSERS = "Chromium", "Firefox"
OPTIONS = {"nginx": "-v", "HAProxy": "-v", "Caddy": "version"}
"""How proxies are asked for their versions."""


# All of it


async def play(only: Sequence[str]) -> tuple[str, bool]:
    """All that is asked for, as tables, and whether nothing has failed that should not."""
    parts = ["### Versions", versions_played()]
    fine = True
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        made = Certificates(directory)
        if wanted(only, "autobahn") or any("." in each for each in only):
            text, passed = await play_autobahn(made, directory, only)
            parts += ["### The Autobahn suite", text]
            fine &= passed
        if wanted(only, *puppets.PUPPETS, *WAYS):
            results, versions = await play_clients(made, directory, only)
            parts += tables(results, versions)
            fine &= all(is_fine(client, way, each) for (client, way), each in results.items())
        if wanted(only, "webtransport"):
            found = await play_webtransport_libraries()
            parts += ["### WebTransport libraries", table(["Library", "A session"], list(found.items()))]
            fine &= not any(result.startswith("FAILED") for result in found.values())
    return "\n\n".join(parts) + "\n", fine


def wanted(only: Sequence[str], *names: str) -> bool:
    return not only or bool(set(only) & set(names))


def is_fine(client: str, way: str, results: Results) -> bool:
    return (client, way) in EXPECTED or not any(result.startswith("FAILED") for result in results.values())


EXPECTED = {(puppets.EXTENDED_CONNECT, "Caddy with http2xconnect")}
"""Failures that are not the broker's; docs/conformance.md says whose."""


def tables(results: dict[tuple[str, str], Results], versions: dict[tuple[str, str], str]) -> list[str]:
    clients = list(dict.fromkeys(client for client, _ in results))
    ways = list(dict.fromkeys(way for _, way in results))
    by_way = [
        [client, *(summary(results[client, way]) if (client, way) in results else "" for way in ways)]
        for client in clients
    ]
    steps = [step.__name__ for step in conversation.STEPS]
    docs = {step.__name__: step.__doc__ for step in conversation.STEPS}
    by_step = [
        [
            docs[step],
            *(
                manner({way: results[client, way].get(step, "") for way in ways if (client, way) in results})
                for client in clients
            ),
        ]
        for step in steps
    ]
    parts = ["### Clients, by way", table(["Client", *ways], by_way)]
    parts += ["### Clients, by what they do", table(["", *clients], by_step)]
    if versions:
        through = list(dict.fromkeys(way for _, way in versions))
        rows = [[client, *(versions.get((client, way), "") for way in through)] for client in clients]
        parts += ["### HTTP versions in which the proxies heard of WebSockets", table(["Client", *through], rows)]
    failures: dict[tuple[str, str, str], list[str]] = {}
    for (client, way), each in results.items():
        for step, result in each.items():
            if result.startswith("FAILED"):
                failures.setdefault((client, way, result), []).append(step)
    if failures:
        failed = [[client, way, ", ".join(found), result] for (client, way, result), found in failures.items()]
        parts += ["### Failures", table(["Client", "Way", "Steps", ""], failed)]
    return parts


def manner(results: dict[str, str]) -> str:
    """What a client did on all ways, where that was the same."""
    found = set(results.values()) - {""}
    if len(found) == 1:
        return found.pop()
    failed = [way for way, result in results.items() if result.startswith("FAILED")]
    return f"FAILED: {', '.join(failed)}" if failed else ", ".join(sorted(found))


BEGIN, END = "<!-- what `make conformance` has found -->\n", "<!-- end -->"


def write(path: Path, text: str) -> None:
    """Put `text` between the marks in a document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"autobahn, or cases of it (6.*); webtransport; {', '.join(puppets.PUPPETS)}; {', '.join(WAYS)}",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between the marks in this document")
    options = parser.parse_args()
    known = {"autobahn", "webtransport", *puppets.PUPPETS, *WAYS}
    if unknown := [name for name in options.only if name not in known and "." not in name]:
        parser.error(f"nothing is called {', '.join(unknown)}")
    text, fine = trio.run(play, options.only)
    print(f"{os.cpu_count()} cores\n\n{text}")
    if options.write:
        write(options.write, text)
    if not fine:
        sys.exit("something failed that should not")


if __name__ == "__main__":
    main()
