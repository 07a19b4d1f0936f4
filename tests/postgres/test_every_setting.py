"""Catbus works with every setting of a role or a database at values other than its default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from tests.postgres.every_setting import PLACES, Laboratory, Place, listed, rounds


@pytest.fixture(scope="module")
def laboratory(postgres_server: str) -> Iterator[Laboratory]:
    laboratory = Laboratory(postgres_server)
    yield laboratory
    laboratory.close()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.where}-{'pooled' if place.pooled else 'direct'}")
def test_catbus_works_with_every_setting(laboratory: Laboratory, place: Place) -> None:
    """Half of the groups are set for the database, and the other half for the roles."""
    carried, _ = laboratory.find_trials()
    groups = rounds([trial for trial in carried if trial not in listed(place)])
    for group in groups[place.where == "role" :: 2]:
        assert trio.run(laboratory.find_failures, group, place) == []
