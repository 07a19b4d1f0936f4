"""What the connections of an endpoint share."""

from __future__ import annotations

import pytest

from catbus.endpoints.roster import Roster


async def test_a_mistake_that_peers_set_off_again_and_again_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    roster = Roster()
    for _ in range(1000):
        roster.fault("a request failed", KeyError("ours"))
    roster.fault("a session failed", KeyError("ours"))
    assert roster.faults == 1001
    assert [record.getMessage() for record in caplog.records] == ["a request failed", "a session failed"]
    assert all(record.exc_info for record in caplog.records)
