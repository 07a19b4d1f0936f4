"""The polling interval, which depends on what notifications announce."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catbus.postgres.listen.polling_interval import (
    BUSY_INTERVAL,
    BUSY_TIME,
    DISTRUST_TIME,
    IDLE_INTERVAL,
    NOTIFICATION_GRACE,
    NOTIFIED_INTERVAL,
    PollingInterval,
)


class Clock:
    """A virtual clock that polls when the interval has passed, or on request."""

    def __init__(self, *, listening: bool = True, head: int = 10) -> None:
        self.pace = PollingInterval()
        self.pace.begin(listening=listening)
        self.now = 100.0
        self.head = head
        assert self.poll()

    def poll(self) -> bool:
        """Poll, and return whether the head is accepted at once."""
        self.pace.begin_poll()
        self.believed = self.pace.note_poll(self.head, self.now)
        return self.believed == self.head

    def wait(self) -> float:
        """Advance to the next poll, poll, and return the pause."""
        pause = self.pace.seconds_to_next(self.now)
        self.now += pause
        self.poll()
        return pause

    def commit(self, *, told: bool = True) -> None:
        self.head += 1
        if told:
            self.pace.note_notification(self.head)


def test_polls_are_rare_while_notifications_announce_everything() -> None:
    clock = Clock()
    for _ in range(10):
        clock.commit()
        assert clock.wait() == NOTIFIED_INTERVAL
    assert (clock.pace.polling, clock.pace.unannounced) == (False, 0)


def test_poll_may_precede_the_notification() -> None:
    clock = Clock()
    clock.commit(told=False)
    assert not clock.poll()
    assert clock.pace.seconds_to_next(clock.now) == NOTIFICATION_GRACE
    clock.pace.note_notification(clock.head)
    assert clock.pace.seconds_to_next(clock.now) == NOTIFIED_INTERVAL
    clock.now += NOTIFICATION_GRACE
    clock.poll()
    assert (clock.pace.polling, clock.pace.unannounced) == (False, 0)


def test_unannounced_commit_is_found_and_makes_polls_frequent() -> None:
    clock = Clock()
    clock.commit(told=False)
    assert not clock.poll()
    clock.now += NOTIFICATION_GRACE
    assert clock.poll()
    assert clock.pace.unannounced == 1
    clock.commit(told=False)
    assert clock.poll()
    assert clock.pace.seconds_to_next(clock.now) == BUSY_INTERVAL
    clock.now += BUSY_TIME
    assert clock.poll()
    assert clock.pace.seconds_to_next(clock.now) == IDLE_INTERVAL


def test_notifications_are_trusted_again_after_a_long_time_without_a_miss() -> None:
    clock = Clock()
    clock.commit(told=False)
    clock.poll()
    clock.now += NOTIFICATION_GRACE
    clock.poll()
    end = clock.now + DISTRUST_TIME
    while clock.now < end - 1:
        clock.commit()
        clock.poll()
        clock.now += 0.5
        assert clock.pace.polling
    clock.commit(told=False)
    clock.poll()
    clock.now += NOTIFICATION_GRACE
    clock.poll()
    assert clock.pace.unannounced == 2
    end = clock.now + DISTRUST_TIME
    # Without commits nothing shows whether notifications work.
    clock.now = end + DISTRUST_TIME
    clock.poll()
    assert clock.pace.polling
    clock.commit()
    clock.poll()
    clock.now += NOTIFICATION_GRACE
    clock.poll()
    assert not clock.pace.polling
    assert clock.pace.seconds_to_next(clock.now) == NOTIFIED_INTERVAL


def test_polling_replaces_missing_notifications() -> None:
    clock = Clock(listening=False)
    assert clock.pace.polling
    clock.now += DISTRUST_TIME * 2
    assert clock.wait() == IDLE_INTERVAL
    clock.commit(told=False)
    assert clock.poll()
    assert clock.wait() == BUSY_INTERVAL
    clock.pace.begin(listening=True)
    clock.commit(told=False)
    assert clock.poll(), "what the first poll finds is always news"
    clock.commit(told=False)
    assert not clock.poll()
    assert (clock.pace.polling, clock.pace.seconds_to_next(clock.now)) == (False, NOTIFICATION_GRACE)


def test_false_notification_hides_nothing() -> None:
    clock = Clock()
    clock.pace.note_notification(1 << 60)
    clock.commit(told=False)
    clock.poll()
    clock.now += NOTIFICATION_GRACE
    assert clock.poll()
    assert clock.pace.unannounced == 1


def test_old_notifications_announce_nothing_after_the_log_was_set_back() -> None:
    clock = Clock(head=100)
    clock.commit()
    clock.poll()
    clock.head = 50
    clock.poll()
    clock.commit(told=False)
    assert not clock.poll()
    clock.now += NOTIFICATION_GRACE
    assert clock.poll()
    assert clock.pace.unannounced == 1


@given(st.lists(st.sampled_from(["told", "untold", "poll", "false"]), max_size=50), st.booleans())
def test_every_commit_is_announced_in_time(events: list[str], listening: bool) -> None:
    """A notification announces it, or a poll that follows in time."""
    clock = Clock(listening=listening)
    pace, announced = clock.pace, clock.head
    for event in events:
        clock.now += 0.01
        match event:
            case "told":
                clock.commit()
                announced = clock.head
            case "untold":
                clock.commit(told=False)
            case "false":
                pace.note_notification(clock.head + 5)
            case "poll":
                clock.poll()
                announced = max(announced, clock.believed)
    began = clock.now
    while announced < clock.head:
        clock.now += pace.seconds_to_next(clock.now)
        assert clock.now <= began + 2 * NOTIFIED_INTERVAL + NOTIFICATION_GRACE
        clock.poll()
        announced = max(announced, clock.believed)
