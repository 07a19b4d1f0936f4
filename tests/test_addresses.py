"""How many connections an address may have."""

from __future__ import annotations

import pytest

from catbus.limits.connections_per_address import ConnectionsPerAddress


def test_network_has_no_more_connections_than_it_may() -> None:
    limit = ConnectionsPerAddress(2)
    with limit.holding("a", 0.0) as first, limit.holding("a", 0.0) as second, limit.holding("b", 0.0) as other:
        assert first and second and other
        with limit.holding("a", 0.0) as third:
            assert not third
        assert limit.of("a") == 2
    assert limit.of("a") == 0
    assert not limit._connections


def test_connections_without_a_network_have_no_limit() -> None:
    limit = ConnectionsPerAddress(1)
    for _ in range(10):
        limit.enter("")
        assert limit.has_room("", 0.0)
    limit.leave("")
    assert not limit._connections


def test_log_says_what_to_set_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    limit = ConnectionsPerAddress(1)
    limit.enter("192.0.2.7")
    for second in range(59):
        assert not limit.has_room("192.0.2.7", float(second))
    [record] = caplog.records
    assert "websocket.trusted_proxies" in record.getMessage()
    assert (record.network, record.limit) == ("192.0.2.7", 1)  # type: ignore[attr-defined]
