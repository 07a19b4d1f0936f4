"""The incarnations of the log that the database knows of, and how a cursor of one stands in the present one."""

from __future__ import annotations

from collections.abc import Sequence

from ...log import Resumption


class EpochHistory:
    """The epochs, oldest first, each with the seq after which it began."""

    def __init__(self, known: Sequence[tuple[str, int]] = ()) -> None:
        self._known = list(known)

    def __contains__(self, epoch: str) -> bool:
        return any(name == epoch for name, _ in self._known)

    def common(self, epoch: str) -> int | None:
        """Up to where the newest epoch has the entries of this one, which must be known; None if it is the newest."""
        names = [name for name, _ in self._known]
        return min((after for _, after in self._known[names.index(epoch) + 1 :]), default=None)

    def parted(self, other: EpochHistory) -> tuple[int | None, int | None]:
        """Up to where the newest epochs of `other` and of these have the entries of the last one that both know.

        Each is None where that epoch is the newest itself, and both are None where there is no such epoch.
        """
        shared = next((name for name, _ in reversed(self._known) if name in other), None)
        return (None, None) if shared is None else (other.common(shared), self.common(shared))

    def resume(self, since: int, epoch: str) -> Resumption:
        """Where a subscription that was complete up to `since` in `epoch` goes on in the newest one.

        Whatever a later epoch took over unchanged, which is what stands at or below the seq it began after, the
        subscription has; of the rest nobody can say. With an unknown epoch, of nothing: not even what retention has
        taken meanwhile was had, and reading from the very beginning tells of that too.
        """
        if epoch not in self:
            return Resumption(0, "epoch")
        common = self.common(epoch)
        return Resumption(since) if common is None or since <= common else Resumption(common, "epoch")
