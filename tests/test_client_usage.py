"""catbus.limits.client_usage"""

from __future__ import annotations

import pytest

from catbus.errors import PeerError
from catbus.limits.client_usage import ClientUsages


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("limit", range(1, 16))
def test_subscriptions_at_once_are_as_many_as_one_after_the_other(limit: int, number: int) -> None:
    """A client that subscribes to several patterns at once gets no more than its share."""
    usages = ClientUsages(1, limit)
    usage = usages.add_session("client")
    possible = 0
    try:
        for _ in range(number):
            usages.check_subscriptions(usage)
            usages.add_subscriptions(usage, 1)
            possible += 1
    except PeerError:
        pass
    usages.add_subscriptions(usage, -possible)
    if possible == number:
        usages.check_subscriptions(usage, number)
    else:
        with pytest.raises(PeerError):
            usages.check_subscriptions(usage, number)
