"""`catbus init`: creating the schema, and a new epoch after a restore."""

from __future__ import annotations

import re

from .conftest import Command


def test_schema_is_created_once(catbus: Command, empty_database_url: str) -> None:
    status, output, errors = catbus("init", "--database", empty_database_url)
    assert (status, errors) == (0, "")
    assert ": applied 001_log.sql, " in output
    status, output, errors = catbus("init", "--database", empty_database_url)
    assert (status, errors) == (0, "")
    assert output.endswith(": the schema is up to date\n")


def test_new_epoch_begins_each_time_it_is_requested(catbus: Command, database_url: str) -> None:
    epochs = set()
    for _ in range(2):
        status, output, errors = catbus("init", "--new-epoch", "--database", database_url)
        assert (status, errors) == (0, "")
        found = re.search(r": epoch (\S+) begins after message 0\n$", output)
        assert found
        epochs.add(found[1])
    assert len(epochs) == 2
