"""catbus.limits.connections_per_address."""

from __future__ import annotations

import pytest

from catbus.limits.connections_per_address import ConnectionsPerAddress


def test_network_has_at_most_the_limit_of_connections() -> None:
    limit = ConnectionsPerAddress(2)
    with limit.counted("a", 0.0) as first, limit.counted("a", 0.0) as second, limit.counted("b", 0.0) as other:
        assert first and second and other
        with limit.counted("a", 0.0) as third:
            assert not third
        assert limit.count("a") == 2
    assert limit.count("a") == 0
    assert not limit._connections


def test_connections_without_a_network_have_no_limit() -> None:
    limit = ConnectionsPerAddress(1)
    for _ in range(10):
        limit.add("")
        assert limit.allows("", 0.0)
    limit.remove("")
    assert not limit._connections


def test_warning_names_the_setting_once_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    limit = ConnectionsPerAddress(1)
    limit.add("192.0.2.7")
    for second in range(59):
        assert not limit.allows("192.0.2.7", float(second))
    [record] = caplog.records
    assert "websocket.trusted_proxies" in record.getMessage()
    assert (record.network, record.limit) == ("192.0.2.7", 1)  # type: ignore[attr-defined]
