"""The epochs of the log, and where a cursor of an older epoch continues in the newest one."""

from __future__ import annotations

from collections.abc import Sequence

from ...log import Resumption


class EpochHistory:
    """The epochs, oldest first, each with the seq after which it began."""

    def __init__(self, known: Sequence[tuple[str, int]] = ()) -> None:
        self._known = list(known)

    def __contains__(self, epoch: str) -> bool:
        return any(name == epoch for name, _ in self._known)

    def common_seq(self, epoch: str) -> int | None:
        """The seq up to which the newest epoch has the entries of this known one; None for the newest itself."""
        names = [name for name, _ in self._known]
        return min((after for _, after in self._known[names.index(epoch) + 1 :]), default=None)

    def divergence(self, other: EpochHistory) -> tuple[int | None, int | None]:
        """The seqs up to which the newest epochs of `other` and of this one contain their last common epoch.

        A seq is None if the common epoch is the newest itself. Both are None if there is no common epoch.
        """
        shared = next((name for name, _ in reversed(self._known) if name in other), None)
        return (None, None) if shared is None else (other.common_seq(shared), self.common_seq(shared))

    def resume(self, since: int, epoch: str) -> Resumption:
        """Where a subscription that was complete up to `since` in `epoch` continues in the newest epoch.

        A later epoch takes over the entries up to the seq after which it began, and the subscription has those. About
        all others nothing is known. An unknown epoch has nothing in common: the subscription reads from the very
        beginning, and its gap includes what retention has removed.
        """
        if epoch not in self:
            return Resumption(0, "epoch")
        common_seq = self.common_seq(epoch)
        return Resumption(since) if common_seq is None or since <= common_seq else Resumption(common_seq, "epoch")
