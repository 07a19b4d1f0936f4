"""Pages of members that are bounded in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..delivery.page_size import MAX_PAGE_BYTES
from .interface import MAX_MEMBERS, Member, MembersPage, Presence, encode_position

MEMBER_BYTES = 100
"""Bytes of a member in JSON besides its texts, approximately."""


def members_that_fit(members: Sequence[Member], size: int) -> Sequence[Member]:
    """Return the first members, as many as have about `size` bytes in JSON, and at least one if there is any."""
    sizes = accumulate(
        MEMBER_BYTES + len(each.channel) + len(each.client_id or "") + len(each.info or b"") for each in members
    )
    return members[: max(1, sum(total <= size for total in sizes))]


async def read_members(presence: Presence, pattern: str, after: str | None, limit: int) -> MembersPage:
    """Read a page of members that fits into a reply, as `Presence.members` does. The limit may be any above 0."""
    page = await presence.members(pattern, after, min(limit, MAX_MEMBERS))
    kept = members_that_fit(page.members, MAX_PAGE_BYTES)
    return page if len(kept) == len(page.members) else MembersPage(kept, encode_position(kept[-1].position))
