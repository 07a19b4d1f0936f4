"""Run third-party test suites, clients and proxies against a broker, and print the results.

    python -m tests.conformance
    python -m tests.conformance --only ws HAProxy
    python -m tests.conformance --write docs/conformance.md

`make conformance` installs the programs. The tables name those that are missing; the rest runs. The exit status is 1
after an unexpected failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from tests.browser.driver import PROGRAMS
from tests.conformance import autobahn, proxies, third_party_clients
from tests.conformance.client_steps import STEPS
from tests.conformance.echo import MESSAGE_SIZE, serve_echo
from tests.conformance.event_stream_clients import CURL, EVENT_STREAM_CLIENTS, EventStreamClient
from tests.conformance.event_stream_steps import EVENT_STREAM_STEPS, EventStreamStep, EventStreamUnderTest, quiet
from tests.conformance.network_paths import (
    EVENT_STREAM_PATHS,
    EXTENDED_CONNECT,
    NETWORK_PATHS,
    PROXY_TIMEOUT,
    SHORT_TIMEOUTS,
    Certificates,
    NetworkPath,
)
from tests.foreign.test_webtransport import run_session
from tests.programs import CLIENT, find_for_conformance, find_foreign_python, find_program

STEP_TIMEOUT = 60
"""Seconds that a step may take."""

PASSED = "passed"
Missing = pytest.skip.Exception, pytest.fail.Exception
"""The exceptions that `tests.programs` raises for a program that is not installed."""

T = TypeVar("T")
Row = Sequence[object]
Results = dict[str, str]
"""The result of each step: `PASSED`, maybe with a note; a dash and why the client cannot do it; or `FAILED` and why."""


def table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# The Autobahn suite


async def run_autobahn(certificates: Certificates, directory: Path, only: Sequence[str]) -> tuple[str, bool]:
    try:
        find_for_conformance("wstest", "autobahn")
    except Missing:
        return "Not run: it needs Python 2.7 (`make conformance PYTHON2=/path/to/python2.7`).", True
    rows: list[Row] = []
    passed = True
    for path, size in (("plain", MESSAGE_SIZE), ("TLS", MESSAGE_SIZE), ("plain", 65_536)):
        certificate = (str(certificates.certificate), str(certificates.key)) if path == "TLS" else None
        place = directory / f"autobahn-{path}-{size}"
        place.mkdir()
        with trio.fail_after(1500):
            async with serve_echo(size, certificate) as url:
                report = await autobahn.run_suite(url, place, [each for each in only if "." in each] or ["*"])
        too_large = [case for case, code in report.failed.items() if code == 1009 and case in autobahn.OVER_A_MEBIBYTE]
        expected = too_large if size < MESSAGE_SIZE else []
        passed &= len(report.failed) == len(expected)
        found = report.verdicts
        limit = f"{16 * size >> 20} MiB"
        failed = ", ".join(f"{case}" + ("" if case in expected else " **unexpected**") for case in report.failed)
        counts = [found[verdict] for verdict in ("OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED")]
        rows.append([path, limit, sum(found.values()), *counts, len(report.failed), failed or "-"])
    head = ["Path", "Largest message", "Cases", "OK", "Non-strict", "Informational", "Not offered", "Failed", "Which"]
    return table(head, rows), passed


# Client libraries and browsers


async def run_steps(client: T, steps: Iterable[Callable[[T], Awaitable[str | None]]]) -> Results:
    results: Results = {}
    for step in steps:
        try:
            with trio.fail_after(STEP_TIMEOUT):
                note = await step(client)
            results[step.__name__] = f"{PASSED}: {note}" if note else PASSED
        except third_party_clients.Unsupported as unsupported:
            results[step.__name__] = f"- {unsupported}"
        except Exception as error:  # noqa: BLE001 (any failure is a result)
            results[step.__name__] = f"FAILED: {type(error).__name__}: {error}"[:300]
    return results


async def run_clients(
    certificates: Certificates, directory: Path, only: Sequence[str]
) -> tuple[dict[tuple[str, str], Results], dict[tuple[str, str], str]]:
    """The results of each client on each path, and the HTTP versions in which proxies received its requests."""
    results: dict[tuple[str, str], Results] = {}
    versions: dict[tuple[str, str], str] = {}
    names = select(third_party_clients.CLIENTS, only)
    paths = select(NETWORK_PATHS, only)
    for name in names:
        try:
            async with third_party_clients.CLIENTS[name]() as driver:
                for number, path in enumerate(paths):
                    if name == third_party_clients.EXTENDED_CONNECT and path not in EXTENDED_CONNECT:
                        continue
                    place = directory / f"{name}-{number}"
                    place.mkdir()
                    try:
                        if proxy_name := NETWORK_PATHS[path].proxy:
                            proxies.PROGRAMS[proxy_name]()
                        async with NETWORK_PATHS[path].open(driver, certificates, place) as (client, proxy):
                            results[name, path] = await run_steps(client, STEPS)
                    except Missing as missing:
                        results[name, path] = {"all": f"- {missing}"}
                        continue
                    if proxy is not None:
                        versions[name, path] = ", ".join(sorted(proxy.versions())) or "none"
                    print(f"{name}, {path}: {summary(results[name, path])}", file=sys.stderr, flush=True)
        except Missing as missing:
            results |= {(name, path): {"all": f"- {missing}"} for path in paths}
    return results, versions


# Event streams


async def run_event_streams(certificates: Certificates, only: Sequence[str]) -> dict[tuple[str, str], Results]:
    """The results of each client of event streams on each path."""
    results: dict[tuple[str, str], Results] = {}
    paths = select(EVENT_STREAM_PATHS, only)
    for name in select(EVENT_STREAM_CLIENTS, only):
        try:
            async with EVENT_STREAM_CLIENTS[name]() as client:
                for path in paths:
                    results[name, path] = await run_event_stream(
                        client, EVENT_STREAM_PATHS[path], certificates, EVENT_STREAM_STEPS
                    )
                    print(f"{name}, {path}: {summary(results[name, path])}", file=sys.stderr, flush=True)
        except Missing as missing:
            results |= {(name, path): {"all": f"- {missing}"} for path in paths}
    return results


async def run_quiet_streams(certificates: Certificates) -> dict[str, str]:
    """The result of a stream without messages through each proxy whose timeout is short."""
    results = {}
    for name, path in SHORT_TIMEOUTS.items():
        found = await run_event_stream(CURL, path, certificates, (quiet,))
        results[name] = found.get(quiet.__name__) or found["all"]
    return results


async def run_event_stream(
    client: EventStreamClient, path: NetworkPath, certificates: Certificates, steps: Iterable[EventStreamStep]
) -> Results:
    with tempfile.TemporaryDirectory() as place:
        try:
            if path.proxy:
                proxies.PROGRAMS[path.proxy]()
            async with path.run_broker(certificates, Path(place)) as (broker, origin, _):
                url = f"{origin}/events?pattern=stream.*"
                return await run_steps(EventStreamUnderTest(client, url, certificates.ca(url), broker), steps)
        except Missing as missing:
            return {"all": f"- {missing}"}


def event_stream_tables(results: dict[tuple[str, str], Results]) -> list[str]:
    paths = list(dict.fromkeys(path for _, path in results))
    clients = list(dict.fromkeys(client for client, _ in results))
    rows = [[client, *(summary(results[client, path]) for path in paths)] for client in clients]
    parts = ["### Event streams, by path", table(["Client", *paths], rows)]
    failed = [
        [client, path, step, result]
        for (client, path), each in results.items()
        for step, result in each.items()
        if result.startswith("FAILED")
    ]
    return [*parts, "### Failures of event streams", table(["Client", "Path", "Step", ""], failed)] if failed else parts


def select(names: Iterable[str], only: Sequence[str]) -> list[str]:
    return [name for name in names if name in only] or list(names)


def summary(results: Results) -> str:
    """A summary such as `11 of 11`, with the steps that failed."""
    if (missing := results.get("all")) is not None:
        return f"not run: {missing.removeprefix('- ')}"
    failed = [step for step, result in results.items() if result.startswith("FAILED")]
    possible = [step for step, result in results.items() if not result.startswith("-")]
    text = f"{len(possible) - len(failed)} of {len(possible)}"
    return f"{text}, not {', '.join(failed)}" if failed else text


async def run_webtransport_libraries() -> dict[str, str]:
    found = {}
    for library in ("pywebtransport", "web-transport-quinn"):
        with tempfile.TemporaryDirectory() as state:
            try:
                received = await run_session(library, Path(state))
                found[library] = PASSED if received["ended"]["type"] == "unsubscribed" else str(received)
            except Missing as missing:
                found[library] = f"- {missing}"
            except Exception as error:  # noqa: BLE001 (any failure is a result)
                found[library] = f"FAILED: {error}"[:300]
    return found


# Versions


def version_of(find: Callable[[], str | Path], *options: str, pattern: str = r"\d+\.[\w.+~-]+") -> str:
    """The version that a program prints."""
    try:
        command = [str(find()), *options]
    except Missing:
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(pattern, done.stdout + done.stderr)
    return found[0] if found else "not installed"


def package_versions(find: Callable[[], Path], *names: str) -> list[Row]:
    """The versions of packages that are installed for another Python."""
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return [[name, version_of(find, "-c", code, name)] for name in names]


def npm_versions(*names: str) -> list[Row]:
    find, options = partial(find_program, "npm", "npm"), ("ls", "--prefix", str(CLIENT))
    return [[name, version_of(find, *options, name, pattern=rf"(?<= {name}@)[\w.]+")] for name in names]


def versions_table() -> str:
    browsers = [[name, version_of(partial(find_program, *PROGRAMS[name.lower()]), "--version")] for name in BROWSERS]
    python2 = partial(find_for_conformance, "python", "autobahn")
    suite = version_of(python2, "-m", "pip", "show", "autobahntestsuite", pattern=r"(?<=Version: )\S+")
    rows: list[Row] = [
        ["Python of the broker", sys.version.split()[0]],
        *[[name, importlib.metadata.version(name)] for name in ("trio-websocket", "wsproto", "aioquic", "httpx-sse")],
        ["Autobahn suite", suite],
        *package_versions(
            partial(find_for_conformance, "python"), "websockets", "aiohttp", "websocket-client", "niquests"
        ),
        *package_versions(find_foreign_python, "pywebtransport", "web-transport-quinn"),
        ["Node", version_of(partial(find_program, "nodejs", "node"), "--version")],
        *npm_versions("ws", "eventsource"),
        ["Go", version_of(partial(find_program, "golang-go", "go"), "version")],
        ["curl", version_of(partial(find_program, "curl", "curl"), "--version")],
        *browsers,
        *[[name, version_of(find, OPTIONS[name])] for name, find in proxies.PROGRAMS.items()],
    ]
    return table(["Program", "Version"], rows)


BROWSERS = "Chromium", "Firefox"
OPTIONS = {"nginx": "-v", "HAProxy": "-v", "Caddy": "version"}
"""The option with which each proxy prints its version."""


# The whole run


async def run(only: Sequence[str]) -> tuple[str, bool]:
    """Run the selected parts. Returns their tables, and whether nothing failed unexpectedly."""
    parts = ["### Versions", versions_table()]
    passed = True
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        certificates = Certificates(directory)
        if is_selected(only, "autobahn") or any("." in each for each in only):
            text, suite_passed = await run_autobahn(certificates, directory, only)
            parts += ["### The Autobahn suite", text]
            passed &= suite_passed
        if is_selected(only, *third_party_clients.CLIENTS, *NETWORK_PATHS):
            results, versions = await run_clients(certificates, directory, only)
            parts += tables(results, versions)
            passed &= all(passes(client, path, each) for (client, path), each in results.items())
        if is_selected(only, "event-streams", *EVENT_STREAM_CLIENTS):
            streams = await run_event_streams(certificates, only)
            parts += event_stream_tables(streams)
            passed &= all(passes(client, path, each) for (client, path), each in streams.items())
            quiet_streams = await run_quiet_streams(certificates)
            timeout = f"Without messages for longer than its timeout, here {PROXY_TIMEOUT} s"
            parts += ["### Quiet event streams", table(["Path", timeout], list(quiet_streams.items()))]
            passed &= not any(result.startswith("FAILED") for result in quiet_streams.values())
        if is_selected(only, "webtransport"):
            found = await run_webtransport_libraries()
            parts += ["### WebTransport libraries", table(["Library", "A session"], list(found.items()))]
            passed &= not any(result.startswith("FAILED") for result in found.values())
    return "\n\n".join(parts) + "\n", passed


def is_selected(only: Sequence[str], *names: str) -> bool:
    return not only or bool(set(only) & set(names))


def passes(client: str, path: str, results: Results) -> bool:
    return (client, path) in EXPECTED or not any(result.startswith("FAILED") for result in results.values())


EXPECTED = {(third_party_clients.EXTENDED_CONNECT, "Caddy with http2xconnect")}
"""Failures of other software; docs/conformance.md explains them."""


def tables(results: dict[tuple[str, str], Results], versions: dict[tuple[str, str], str]) -> list[str]:
    clients = list(dict.fromkeys(client for client, _ in results))
    paths = list(dict.fromkeys(path for _, path in results))
    by_path = [
        [client, *(summary(results[client, path]) if (client, path) in results else "" for path in paths)]
        for client in clients
    ]
    by_step = [
        [
            step.__doc__,
            *(
                summarize_paths(
                    {path: results[client, path].get(step.__name__, "") for path in paths if (client, path) in results}
                )
                for client in clients
            ),
        ]
        for step in STEPS
    ]
    parts = ["### Clients, by path", table(["Client", *paths], by_path)]
    parts += ["### Clients, by step", table(["Step", *clients], by_step)]
    if versions:
        through = list(dict.fromkeys(path for _, path in versions))
        rows = [[client, *(versions.get((client, path), "") for path in through)] for client in clients]
        parts += ["### HTTP versions of WebSocket requests to the proxies", table(["Client", *through], rows)]
    failures: dict[tuple[str, str, str], list[str]] = {}
    for (client, path), each in results.items():
        for step, result in each.items():
            if result.startswith("FAILED"):
                failures.setdefault((client, path, result), []).append(step)
    if failures:
        failed = [[client, path, ", ".join(found), result] for (client, path, result), found in failures.items()]
        parts += ["### Failures", table(["Client", "Path", "Steps", "Result"], failed)]
    return parts


def summarize_paths(results: dict[str, str]) -> str:
    """The common result of a client on all paths, or the paths on which it failed."""
    found = set(results.values()) - {""}
    if len(found) == 1:
        return found.pop()
    failed = [path for path, result in results.items() if result.startswith("FAILED")]
    return f"FAILED: {', '.join(failed)}" if failed else ", ".join(sorted(found))


BEGIN, END = "<!-- results of `make conformance` -->\n", "<!-- end -->"


def write(path: Path, text: str) -> None:
    """Put `text` between the two comments in a document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    names = [*third_party_clients.CLIENTS, *NETWORK_PATHS, *EVENT_STREAM_CLIENTS, *EVENT_STREAM_PATHS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"autobahn, or cases of it (6.*); event-streams; webtransport; {', '.join(names)}",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables into this document")
    options = parser.parse_args()
    known = {"autobahn", "event-streams", "webtransport", *names}
    if unknown := [name for name in options.only if name not in known and "." not in name]:
        parser.error(f"unknown name: {', '.join(unknown)}")
    text, passed = trio.run(run, options.only)
    print(f"{os.cpu_count()} cores\n\n{text}")
    if options.write:
        write(options.write, text)
    if not passed:
        sys.exit("there were unexpected failures")


if __name__ == "__main__":
    main()
