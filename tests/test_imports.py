"""Dependencies point downwards only, and each library behind a seam has one importer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "catbus"

# From the bottom up. A part may import itself and what stands on a line below its own.
LAYERS = (
    {"bucket", "errors", "loggers", "histogram", "memory", "release"},
    {"addresses", "keys", "quotas", "strangers", "topics", "turns", "wire"},
    {"refusals"},
    {"framing", "auth"},
    {"config", "webtransport"},
    {"log", "certificates"},
    {"mailbox"},
    {"subscription"},
    {"session", "delivery", "flush", "permissions"},
    {"vitals"},
    {"hub"},
    {"postgres", "endpoints", "client", "local"},
    {"metrics"},
    {"broker"},
    {"testing"},
    {"cli"},
    {"__main__"},
)

# Parts that have less to do with the others than their line would allow.
NARROWER = {
    "certificates": {"errors", "loggers", "config", "webtransport"},
    "client": {"errors", "topics", "wire", "framing", "webtransport"},
    "config": {"errors"},
    "postgres": {"errors", "loggers", "topics", "auth", "config", "histogram", "log"},
    "webtransport": {"errors"},
}

# Libraries that only these may import: a module, or a package with all in it.
ONLY_IMPORTERS = {
    "aioquic": {"catbus.webtransport"},
    "asyncpg": {"catbus.postgres.access.asyncpg_bridge"},
    "click": {"catbus.cli"},
    "prometheus_client": {"catbus.metrics"},
    "hypothesis": {"catbus.testing"},
    "trio_asyncio": {"catbus.postgres.access.asyncpg_bridge"},
    "trio_websocket": {"catbus.endpoints.websocket"},
}

# The core is told what came in and what time it is; it opens nothing and waits for nothing.
PURE = {
    "addresses",
    "auth",
    "bucket",
    "quotas",
    "strangers",
    "errors",
    "framing",
    "histogram",
    "keys",
    "mailbox",
    "refusals",
    "session",
    "subscription",
    "topics",
    "wire",
}
IMPURE = {
    "anyio",
    "asyncio",
    "click",
    "os",
    "pathlib",
    "select",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "trio",
}
MAY = {"auth": {"os"}}  # random bytes


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """The full names of all that a module imports, where it stands and whatever for."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from catbus import wire` imports catbus.wire.
            yield from (f"{module}.{alias.name}" if module == "catbus" else module for alias in node.names)


def part_of(module: str) -> str | None:
    """`session` for `catbus.session`, `log` for `catbus.log.memory`; None outside, and for the package itself."""
    first, *rest = module.split(".")
    return rest[0] if first == "catbus" and rest else None


def layer_of(part: str) -> int:
    for number, layer in enumerate(LAYERS):
        if part in layer:
            return number
    pytest.fail(f"catbus.{part} has no place in LAYERS yet")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"catbus"}))
def test_a_module_imports_only_what_is_below_it(module: str) -> None:
    part = part_of(module)
    assert part is not None
    below = set().union(*LAYERS[: layer_of(part)])
    allowed = NARROWER.get(part, below) | {part}
    for imported in imports(MODULES[module]):
        other = part_of(imported)
        if imported.split(".")[0] == "catbus":
            assert other in allowed, f"{module} imports {imported}"


def test_the_public_names_come_from_below_the_command() -> None:
    for imported in imports(MODULES["catbus"]):
        assert part_of(imported) not in ("cli", "testing", "__main__"), imported


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTERS))
def test_a_library_behind_a_seam_has_one_importer(library: str) -> None:
    importers = {module for module, path in MODULES.items() for name in imports(path) if name.split(".")[0] == library}
    allowed = ONLY_IMPORTERS[library]
    strangers = {module for module in importers if not any(f"{module}.".startswith(f"{one}.") for one in allowed)}
    assert not strangers


@pytest.mark.parametrize("part", sorted(PURE))
def test_the_core_does_no_io(part: str) -> None:
    found = {
        name.split(".")[0] for module, path in MODULES.items() if part_of(module) == part for name in imports(path)
    }
    assert not (found & IMPURE) - MAY.get(part, set())


def test_only_the_command_configures_logging() -> None:
    for module, path in MODULES.items():
        if part_of(module) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in (
                "configure",
                "basicConfig",
                "dictConfig",
                "addHandler",
            ):
                pytest.fail(f"{module}, line {node.lineno}: {node.attr}")


def test_the_parser_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "catbus" / "log" / "memory.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import trio, asyncpg.pool\nfrom .. import wire, errors\nfrom ..hub import Hub\nfrom .base import Log\n"
        "from catbus import broker\nfrom catbus.cli.commands.run import x\ndef f():\n    from ..client import connect\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert set(imports(module)) == {
        "trio", "asyncpg.pool", "catbus.wire", "catbus.errors", "catbus.hub", "catbus.log.base", "catbus.broker",
        "catbus.cli.commands.run", "catbus.client",
    }  # fmt: skip
