"""Dependencies point downwards only, and each library behind a seam has one importer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "catbus"

# From the bottom up. A part may import itself and what stands on a line below its own.
LAYERS = (
    {"close_codes", "error_codes"},
    {"errors", "malloc_trim", "version", "observability.histogram", "observability.loggers"},
    {"protocol", "observability.audit_log"},
    {"limits"},
    {"auth"},
    {"config", "webtransport"},
    {"log", "certificates", "processes.worker", "webhooks"},
    {"delivery", "session.appends", "session.effects", "session.error_replies", "session.hooks"},
    {"presence"},
    {"session.state_machine"},
    {"observability.runtime_statistics"},
    {
        "session.authentication",
        "session.heads",
        "session.presence_watch",
        "session.publishing",
        "session.session_log",
        "session.transport_streams",
    },
    {"session.services"},
    {"session.session_presence"},
    {"session.session_subscriptions"},
    {"session.driver"},
    {"session.session_report"},
    {"session.message_fate", "session.session_events"},
    {"replica"},
    {"postgres", "endpoints", "client", "http", "in_process"},
    {"observability.metric_sources", "worker"},
    {"observability.metric_table"},
    {"observability.metrics"},
    {"broker"},
    {"processes", "testing"},
    {"cli"},
    {"__main__"},
)

# Parts that have less to do with the others than their line would allow.
NARROWER = {
    "certificates": {"close_codes", "error_codes", "errors", "observability.loggers", "config", "webtransport"},
    "client": {"close_codes", "error_codes", "errors", "protocol", "webtransport"},
    "config": {"close_codes", "error_codes", "errors"},
    "http": {"close_codes", "error_codes", "errors", "protocol"},
    "postgres": {
        "close_codes",
        "error_codes",
        "errors",
        "observability.loggers",
        "protocol.channels",
        "auth",
        "config",
        "observability.histogram",
        "log",
        "presence",
        "webhooks",
    },
    "webhooks": {"version"},
    "webtransport": {"close_codes", "error_codes", "errors"},
    "worker": {"errors", "observability.loggers", "client.reconnect_policy"},
}

# Libraries that only these may import: a module, or a package with all in it.
ONLY_IMPORTERS = {
    "aioquic": {"catbus.webtransport"},
    "asyncpg": {"catbus.postgres.access.asyncpg_bridge", "catbus.worker.async_worker"},
    "click": {"catbus.cli"},
    "prometheus_client": {"catbus.observability.metrics"},
    "httpcore": {"catbus.webhooks.webhook_sender"},
    "hypothesis": {"catbus.testing"},
    "psycopg": {"catbus.worker.async_sessions", "catbus.worker.blocking_sessions"},
    "sqlalchemy": {"catbus.worker.async_sessions", "catbus.worker.blocking_sessions"},
    "trio_asyncio": {"catbus.postgres.access.asyncpg_bridge", "catbus.worker.trio_session"},
    "trio_websocket": {"catbus.endpoints.websocket"},
}

# The core is told what came in and what time it is; it opens nothing and waits for nothing.
PURE = {
    "close_codes",
    "error_codes",
    "auth.base64url",
    "auth.claims",
    "auth.grants",
    "auth.jwt_keys",
    "auth.role_tokens",
    "auth.token_errors",
    "auth.tokens",
    "delivery.catch_up",
    "delivery.send_queue",
    "delivery.subscription",
    "delivery.topic_tree",
    "errors",
    "limits.client_usage",
    "limits.connections_per_address",
    "limits.publish_rate",
    "limits.token_bucket",
    "limits.unauthenticated",
    "observability.histogram",
    "presence.batches",
    "presence.interface",
    "presence.member_state",
    "presence.mirror",
    "presence.own_members",
    "presence.table_follower",
    "processes.merged_metrics",
    "processes.restart_policy",
    "protocol",
    "session.appends",
    "session.error_replies",
    "session.state_machine",
    "webhooks.delivery_schedule",
    "webhooks.public_addresses",
    "webhooks.signed_request",
    "webhooks.verdicts",
    "webtransport.connection_ids",
    "worker.database_errors",
    "worker.work_cycle",
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
MAY = {"auth.role_tokens": {"os"}, "auth.tokens": {"os"}}  # random bytes


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """The full names of all modules that a module imports, in functions and for annotations, too."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from catbus import broker` imports the module catbus.broker, `from catbus.log import Log` catbus.log.
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield f"{module}.{alias.name}" if is_module else module


PARTS = frozenset().union(*LAYERS)


def part_of(module: str) -> str | None:
    """The part of LAYERS that a module belongs to: `log` for `catbus.log.in_memory`. None outside of all parts."""
    names = module.split(".")
    for length in range(len(names), 1, -1):
        part = ".".join(names[1:length])
        if names[0] == "catbus" and part in PARTS:
            return part
    return None


def layer_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_each_module_has_a_layer() -> None:
    """Packages whose modules are in several layers contain nothing themselves."""
    for module in MODULES.keys() - {"catbus"}:
        if part_of(module) is None:
            assert any(f"catbus.{part}".startswith(f"{module}.") for part in PARTS), module
            assert not list(imports(MODULES[module])), module


@pytest.mark.parametrize("module", sorted(module for module in MODULES if part_of(module) is not None))
def test_module_imports_only_lower_layers(module: str) -> None:
    part = part_of(module)
    assert part is not None
    below = set().union(*LAYERS[: layer_of(part)])
    allowed = NARROWER.get(part, below) | {part}
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] == "catbus":
            assert any(f"{imported}.".startswith(f"catbus.{one}.") for one in allowed), f"{module} imports {imported}"


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Neither at run time nor for annotations."""
    above = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in sorted(above[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_public_names_come_from_layers_below_the_command() -> None:
    for imported in imports(MODULES["catbus"]):
        assert part_of(imported) not in ("cli", "testing", "__main__"), imported


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTERS))
def test_each_wrapped_library_has_one_importer(library: str) -> None:
    importers = {module for module, path in MODULES.items() for name in imports(path) if name.split(".")[0] == library}
    allowed = ONLY_IMPORTERS[library]
    unauthenticated = {module for module in importers if not any(f"{module}.".startswith(f"{one}.") for one in allowed)}
    assert not unauthenticated


@pytest.mark.parametrize("part", sorted(PURE))
def test_core_does_no_io(part: str) -> None:
    modules = [path for module, path in MODULES.items() if f"{module}.".startswith(f"catbus.{part}.")]
    assert modules
    found = {name.split(".")[0] for path in modules for name in imports(path)}
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


def test_parser_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "catbus" / "log" / "in_memory.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import trio, asyncpg.pool\n"
        "from .. import version, errors\n"
        "from ..replica import Replica\n"
        "from .interface import Log\n"
        "from catbus import broker\n"
        "from catbus.cli.commands.run import x\n"
        "def f():\n    from ..client import connect\n"
    )
    for name in ("version", "errors", "broker"):
        (tmp_path / "catbus" / f"{name}.py").touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(module) == {
        "trio", "asyncpg.pool", "catbus.version", "catbus.errors", "catbus.replica", "catbus.log.interface",
        "catbus.broker", "catbus.cli.commands.run", "catbus.client",
    }  # fmt: skip
