"""The incarnations of the log that the database knows of, and how a cursor of one stands in the present one."""

from __future__ import annotations

from collections.abc import Sequence

from ..log import Resumption


class Epochs:
    """The epochs, oldest first, each with the seq after which it began."""

    def __init__(self, known: Sequence[tuple[str, int]] = ()) -> None:
        self._known = list(known)

    def began(self, epoch: str) -> int | None:
        """After which seq an epoch began; None for one that is not known."""
        return next((after for name, after in self._known if name == epoch), None)

    def resume(self, since: int, epoch: str, floor: int) -> Resumption:
        """Where a subscription that was complete up to `since` in `epoch` goes on in the newest one.

        Whatever a later epoch took over unchanged, which is what stands at or below the seq it began after, the
        subscription has; of the rest nobody can say.
        """
        names = [name for name, _ in self._known]
        if epoch not in names:
            return Resumption(floor - 1, "epoch")
        later = [after for _, after in self._known[names.index(epoch) + 1 :]]
        common = min(later, default=since)
        return Resumption(since) if since <= common else Resumption(common, "epoch")
