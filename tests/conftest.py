"""What all tests share: the event loop of coroutine tests, Hypothesis profiles, the marker `integration`, and the
distribution over processes.

A test is an integration test if it is in an integration folder, if its module imports something that starts processes
or opens sockets, or if it uses a fixture that does. All others are unit tests: `make quick` runs them alone.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

pytest_plugins = ["tests.postgres.server"]

# A failed assertion of a class that tests inherit shows the values.
pytest.register_assert_rewrite("tests.log")

ROOT = Path(__file__).parents[1]

INTEGRATION_FOLDERS = frozenset(
    {
        "browser",
        "cli",
        "conformance",
        "foreign",
        "fuzz",
        "fuzz_bytes",
        "hostile",
        "javascript",
        "k8s",
        "openapi",
        "postgres",
        "simulation",
        "workers",
    }
)
INTEGRATION_IMPORTS = frozenset(
    {"h11", "multiprocessing", "socket", "subprocess", "tests.brokers", "tests.programs"}
    | {f"tests.{folder}" for folder in INTEGRATION_FOLDERS}
)
INTEGRATION_FIXTURES = frozenset({"catbus_broker", "catbus_server", "database_url"})

SLOW_TESTS = frozenset(
    {
        "test_catching_up_meets_live_delivery_without_gap_or_repeat_in_20000_interleavings",
        "test_frames_of_broker_and_library_are_never_mixed_or_lost",
        "test_library_reads_the_same_from_three_frames_split_anywhere",
        "test_mistake_in_presence_is_found",
        "test_overlapping_patterns_are_complete_in_2000_interleavings",
        "test_stream_in_any_three_pieces_is_split",
    }
)
"""Unit tests of several seconds each, which `make quick` leaves out."""

OF_A_MISTAKE = re.compile(r"test_(\w+_)?(mistake_(\w+_)?is_found|finds_a_(planted_)?mistake)")
"""Tests of planted mistakes. They show that other tests find something, so `make test` runs one in `EVERY` of each, and
`make mistakes` the rest."""
EVERY = 5

TOGETHER = frozenset({"browser", "k8s"})
"""Folders whose tests run in one process, because they share what takes long to make: browsers, and an image."""

# The machines that run the tests are shared, so the time that an example takes means nothing. Tests that need another
# number of examples take a multiple of that of the profile.
settings.register_profile("catbus", deadline=None, print_blob=True)
settings.register_profile("quick", deadline=None, print_blob=True, max_examples=20)
# Where a change is checked before it lands, each run has the same examples, so a failure is due to the change. They are
# fewer, because a workflow looks for others every night.
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None, max_examples=50)
settings.register_profile("long", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("ci" if "CI" in os.environ else "catbus")


# What the tests import stays to the end, so the garbage collector visits it neither meanwhile nor during the tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark integration tests and those of mistakes, and run coroutine tests on Trio, except those of anyio's plugin.

    pytest-trio's `trio_mode` would take those too, and run them on Trio whatever their backend is.
    """
    mistakes = Counter[str]()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if OF_A_MISTAKE.fullmatch(function.rpartition("::")[2]):
            if mistakes[function] % EVERY:
                item.add_marker(pytest.mark.mistake)
            mistakes[function] += 1
        if not INTEGRATION_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())) or _is_integration_module(item.path):
            item.add_marker(pytest.mark.integration)
        if item.name.partition("[")[0] in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)
        test = getattr(item, "obj", None)
        test = getattr(getattr(test, "hypothesis", None), "inner_test", test)
        if inspect.iscoroutinefunction(test) and item.get_closest_marker("anyio") is None:
            item.add_marker(pytest.mark.trio)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import integration modules for a run without them: imports are a good part of its time."""
    unit_tests = "not integration" in config.getoption("markexpr").split(" and ")
    is_module = collection_path.match("test_*.py")
    return True if unit_tests and is_module and _is_integration_module(collection_path) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute files, as `--dist loadfile` does, except that the files of some folders stay together."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    class FolderScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            _, folder, *_ = nodeid.split("/")
            return folder if folder in TOGETHER else super()._split_scope(nodeid)

    return FolderScheduling(config, log) if config.getoption("dist") == "loadfile" else None


@cache
def _is_integration_module(path: Path) -> bool:
    if path.relative_to(ROOT).parts[1] in INTEGRATION_FOLDERS:
        return True
    return any(name == each or name.startswith(f"{each}.") for name in _imports(path) for each in INTEGRATION_IMPORTS)


def _imports(path: Path) -> Iterator[str]:
    """Yield the full names of everything that a test module imports, at its top or in a function."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [*(package[: -node.level] if node.level else ()), *filter(None, [node.module])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)
