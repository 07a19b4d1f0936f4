"""The epoch history: it maps a cursor of an older epoch to the present one."""

from __future__ import annotations

import pytest

from catbus.log import Resumption
from catbus.postgres.follow.epoch_history import EpochHistory

EPOCHS = EpochHistory([("first", 0), ("second", 100), ("third", 80), ("fourth", 90)])


@pytest.mark.parametrize(
    ("epoch", "since", "expected"),
    [
        ("fourth", 500, Resumption(500)),
        ("third", 90, Resumption(90)),
        ("third", 91, Resumption(90, "epoch")),
        # The third took over the second's entries only up to 80, so what the fourth has above them is the third's.
        ("second", 80, Resumption(80)),
        ("second", 85, Resumption(80, "epoch")),
        ("first", 80, Resumption(80)),
        ("first", 100, Resumption(80, "epoch")),
        ("never", 10, Resumption(0, "epoch")),
    ],
)
def test_cursor_resumes_exactly_where_all_later_epochs_agree(epoch: str, since: int, expected: Resumption) -> None:
    assert EPOCHS.resume(since, epoch) == expected


def test_newest_epoch_keeps_an_older_one_up_to_their_common_seq() -> None:
    assert [EPOCHS.common_seq(epoch) for epoch in ("first", "second", "third", "fourth")] == [80, 80, 90, None]
    assert "third" in EPOCHS
    assert "never" not in EPOCHS
