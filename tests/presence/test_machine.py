"""The simulation of presence finds nothing wrong, and finds mistakes that are made on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from catbus.presence import member_state
from catbus.presence.batches import PresenceBatch, PresenceBatches
from catbus.presence.member_state import MemberState, SessionState
from catbus.presence.mirror import Mirror
from catbus.presence.own_members import Membership, OwnMembers
from catbus.presence.table_follower import ChangesPage, TableFollower
from tests.mistakes import MistakePlanter

from .machine import PresenceMachine

FEW = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
ENOUGH = settings(FEW, max_examples=2000, phases=[Phase.generate])
"""For mistakes: the first failing example will do, and it comes much sooner."""

read_page = TableFollower._apply
note_heartbeats = Mirror.note_heartbeats
note_written = PresenceBatches.note_written
drop = Mirror._drop


def hold_nobody(self: Mirror) -> None:
    """Whoever is missing in another table is gone."""


def resume_without_holding(self: TableFollower) -> None:
    """After an outage, leaves are announced before replicas can write who came back."""


def forget_lost_batches(self: OwnMembers, taken: Iterable[Membership]) -> None:
    """What may not have been written is not written again."""


def ignore_rejections(self: PresenceBatches, batch: PresenceBatch) -> None:
    """A replica that the table has forgotten writes only what has changed since then."""
    self._own.give_back(batch.memberships)


def end_nothing(self: PresenceBatches, batch: PresenceBatch, version: int, *, complete: bool) -> None:
    """Memberships that a replica did not write again stay."""
    note_written(self, batch, version, complete=complete)
    self._ends_below = None


def ignore_purges(self: TableFollower, page: ChangesPage, now: float) -> bool:
    """A reader that was away for long does not see that others have ended."""
    return read_page(self, replace(page, purged=0), now)


def ignore_incarnations(self: TableFollower, page: ChangesPage, now: float) -> bool:
    """Versions of one table are taken for those of another."""
    return read_page(self, replace(page, incarnation="same"), now)


def skip_full_pages(self: TableFollower, page: ChangesPage, now: float) -> bool:
    """The newest version of the table is taken for the newest that was read."""
    return read_page(self, replace(page, full=False), now)


def trust_lost_replicas(self: Mirror, replicas: Set[str]) -> None:
    """Members of killed replicas stay."""
    note_heartbeats(self, self._reported | replicas)


def expect_nobody(self: Mirror, session: SessionState, expected: float | None, now: float) -> None:
    """There is no grace."""
    drop(self, session, None, now)


def overlook_short_sessions(self: MemberState, until: float) -> None:
    """A client that came back, and went again between two readings, was not there."""


def prefer_the_first(membership: Membership) -> tuple[int, str, int]:
    """The first info counts."""
    return -membership.at, membership.replica, membership.session


MISTAKES: list[tuple[Any, str, Callable[..., Any]]] = [
    (Mirror, "hold", hold_nobody),
    (TableFollower, "resume", resume_without_holding),
    (PresenceBatches, "note_rejected", ignore_rejections),
    (PresenceBatches, "note_written", end_nothing),
    (TableFollower, "_apply", ignore_purges),
    (OwnMembers, "give_back", forget_lost_batches),
    (TableFollower, "_apply", ignore_incarnations),
    (TableFollower, "_apply", skip_full_pages),
    (Mirror, "_drop", expect_nobody),
    (MemberState, "expect_again", overlook_short_sessions),
    (Mirror, "note_heartbeats", trust_lost_replicas),
    (member_state, "_by_age", prefer_the_first),
]


def test_watchers_are_told_what_is_true() -> None:
    run_state_machine_as_test(PresenceMachine, settings=FEW)


@pytest.mark.parametrize(("owner", "name", "wrong"), [pytest.param(*each, id=each[2].__name__) for each in MISTAKES])
def test_mistake_in_presence_is_found(
    owner: Any, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planter = MistakePlanter(monkeypatch)
    planter.replace(owner, name, wrong)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(PresenceMachine, settings=ENOUGH)
    planter.check()
