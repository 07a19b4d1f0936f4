"""`catbus init`: preparing a database, and saying that it was restored."""

from __future__ import annotations

import re

from .conftest import Command


def test_a_database_is_prepared_once(catbus: Command, empty_database_url: str) -> None:
    status, output, errors = catbus("init", "--database", empty_database_url)
    assert (status, errors) == (0, "")
    assert ": applied 001_log.sql, " in output
    status, output, errors = catbus("init", "--database", empty_database_url)
    assert (status, errors) == (0, "")
    assert output.endswith(": the schema is up to date\n")


def test_a_new_epoch_begins_each_time_that_it_is_asked_for(catbus: Command, database_url: str) -> None:
    epochs = set()
    for _ in range(2):
        status, output, errors = catbus("init", "--new-epoch", "--database", database_url)
        assert (status, errors) == (0, "")
        found = re.search(r": epoch (\S+) begins after message 0\n$", output)
        assert found
        epochs.add(found[1])
    assert len(epochs) == 2
