"""catbus.testing.BrokerMachine: it agrees with the broker, and with no broker that makes a mistake."""

from __future__ import annotations

import re
import unittest
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from hypothesis import HealthCheck, settings
from trio.testing import MockClock

from catbus.auth.grants import Grants
from catbus.cli.commands.fuzz import command
from catbus.config import DatabaseSettings
from catbus.postgres.roles.role_store import open_roles
from catbus.testing import BrokerMachine, TestServer, open_test_broker, open_test_server
from catbus.testing.fuzz import FuzzTarget, fuzz
from tests.fuzz.mistakes import MISTAKES, ROLE_MISTAKES, WEBTRANSPORT_MISTAKES, keep_a_removed_message
from tests.mistakes import MistakePlanter
from tests.postgres.sql import open_sql

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "fuzzing.md").read_text(encoding="utf-8")
SEED = 1
SEEDS: dict[Callable[[MistakePlanter], None], int] = {keep_a_removed_message: 10}
"""Seeds of the mistakes that `SEED` does not find soon."""
LIMIT = 120.0
"""Seconds within which a mistake has to be found."""


def target(broker: TestServer, certificate: Path | None = None) -> FuzzTarget:
    """All of its channels are ours. With a file for the broker's certificate, over WebTransport alone."""
    if certificate is None:
        return FuzzTarget([(broker.url, None)], secret=broker.secret, root="")
    assert broker.webtransport_url is not None
    assert broker.certificate is not None
    certificate.write_text(broker.certificate)
    return FuzzTarget([(broker.webtransport_url, str(certificate))], secret=broker.secret, root="")


def test_broker_agrees_with_the_model() -> None:
    with open_test_server() as broker:
        result = fuzz(target(broker), 0, SEED)
    assert result.found is None
    assert result.examples >= 10
    assert result.steps > 100
    assert result.attacks > 10


@pytest.mark.parametrize("mistake", [*MISTAKES, *WEBTRANSPORT_MISTAKES], ids=lambda mistake: mistake.__name__)
def test_the_machine_finds_a_planted_mistake(
    mistake: Callable[[MistakePlanter], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(BrokerMachine, "reply_timeout", 1.0)
    monkeypatch.setattr(BrokerMachine, "delivery_timeout", 0.3)
    quic = mistake in WEBTRANSPORT_MISTAKES
    with open_test_server(webtransport=quic) as broker, monkeypatch.context() as patch:
        planter = MistakePlanter(patch)
        mistake(planter)
        seed = SEEDS.get(mistake, SEED)
        result = fuzz(target(broker, tmp_path / "certificate.pem" if quic else None), LIMIT, seed)
        assert result.found is not None, result
        print(f"{mistake.__name__}: {result.examples} examples, {result.steps} steps: {result.found.error}")
        planter.check()


def role_setter(database_url: str) -> Callable[[str, Grants], str]:
    """Return a function that gives a role exactly these grants, and returns its token."""
    made: dict[str, tuple[str, bytes]] = {}

    async def set_role(name: str, grants: Grants) -> str:
        if name not in made:
            async with open_roles(DatabaseSettings(url=database_url)) as roles:
                token, role = await roles.create(name, grants)
                made[name] = token, role.key
            return token
        token, key = made[name]
        async with open_sql(database_url) as sql:
            await sql.fetch(
                "WITH wanted AS (SELECT * FROM unnest($2::text[], $3::text[]) AS w (permission, pattern)), gone AS ("
                "DELETE FROM catbus.role_grants WHERE role = $1 "
                "AND (permission, pattern) NOT IN (SELECT permission, pattern FROM wanted)) "
                "INSERT INTO catbus.role_grants (role, permission, pattern) "
                "SELECT $1, permission, pattern FROM wanted ON CONFLICT DO NOTHING",
                key,
                ["read"] * len(grants.read) + ["write"] * len(grants.write),
                [*grants.read, *grants.write],
            )
        return token

    return lambda name, grants: trio.run(set_role, name, grants)


@pytest.mark.parametrize("mistake", [None, *ROLE_MISTAKES], ids=lambda mistake: getattr(mistake, "__name__", "none"))
def test_the_machine_changes_roles_of_connected_clients(
    mistake: Callable[[MistakePlanter], None] | None, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """Roles are in PostgreSQL. It agrees with the broker, and not with one that ignores their changes."""
    with open_test_server(database_url=database_url) as broker, monkeypatch.context() as patch:
        planter = MistakePlanter(patch)
        if mistake is not None:
            monkeypatch.setattr(BrokerMachine, "delivery_timeout", 2.0)
            mistake(planter)
        result = fuzz(
            replace(target(broker), set_role=role_setter(database_url)), 0 if mistake is None else LIMIT, SEED
        )
        planter.check()
    if mistake is None:
        assert result.found is None
    else:
        assert result.found is not None, result
        print(f"{mistake.__name__}: {result.examples} examples, {result.steps} steps")


EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


async def test_outage_of_the_document_runs(autojump_clock: MockClock) -> None:
    names: dict[str, Any] = {"open_test_broker": open_test_broker, "trio": trio}
    exec(EXAMPLES[0], names)
    await names["test_an_outage"](autojump_clock)


def test_machine_of_the_document_runs() -> None:
    """As it is written there, but for where the broker is."""
    with open_test_server() as broker:
        example = EXAMPLES[1].replace("what tokens are signed with", broker.secret)
        names: dict[str, Any] = {}
        exec(example.replace("ws://127.0.0.1:8080/ws", broker.url), names)
        case = names["TestMyBroker"]
        case.settings = settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
    assert (result.testsRun, result.wasSuccessful()) == (1, True), result


def test_fuzz_workflow_runs_the_documented_command() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "fuzz.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["fuzz"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ['make fuzz FUZZ_MINUTES="$FUZZ_MINUTES"']
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "python -m tests.fuzz --minutes $(FUZZ_MINUTES) --script found.py" in makefile
    kept = {step["with"]["path"] for step in steps if "path" in step.get("with", {})}
    [keep] = [option.default for option in command.params if option.name == "keep"]
    assert kept == {keep, "found.py"}


def test_document_names_every_planted_mistake() -> None:
    for mistake in (*MISTAKES, *WEBTRANSPORT_MISTAKES, *ROLE_MISTAKES):
        assert f"\n| {mistake.__name__.replace('_', ' ')} |\n" in DOCUMENT
