"""`catbus init`: creating the schema, and a new epoch after a restore."""

from __future__ import annotations

import re

from tests.postgres.server import execute

from .conftest import Command, Start

SECONDS_TO_EXIT = 60


def test_schema_is_created_once(catbus: Command, empty_database_url: str) -> None:
    status, output, errors = catbus("init", "--database", empty_database_url)
    assert (status, errors) == (0, "")
    assert ": applied 001_log.sql, " in output
    status, output, errors = catbus("init", "--database", empty_database_url)
    assert (status, errors) == (0, "")
    assert output.endswith(": the schema is up to date\n")


def test_broker_and_commands_name_a_schema_of_another_build(catbus: Command, start: Start, database_url: str) -> None:
    execute(database_url, "ALTER TABLE catbus.schema_version DROP COLUMN digest")
    for command in ("init", "consumer list", "check"):
        status, output, errors = catbus(*command.split(), "--database", database_url)
        assert status == 1
        assert "another build of Catbus has made the schema" in output + errors
    broker = start("run", "--database", database_url, "--ws-bind", "127.0.0.1:0")
    _, errors = broker.communicate(timeout=SECONDS_TO_EXIT)
    assert broker.returncode == 1
    assert "another build of Catbus has made the schema of this database" in errors
    assert "trying again" not in errors


def test_new_epoch_begins_each_time_it_is_requested(catbus: Command, database_url: str) -> None:
    epochs = set()
    for _ in range(2):
        status, output, errors = catbus("init", "--new-epoch", "--database", database_url)
        assert (status, errors) == (0, "")
        found = re.search(r": epoch (\S+) begins after message 0\n$", output)
        assert found
        epochs.add(found[1])
    assert len(epochs) == 2
