"""Presence: which clients are members of which channels.

`interface` defines what sessions use. A replica's own members are in `own_members`, and what it knows of the members in
watched channels is in `mirror`: both are pure. `replica_presence` puts them together. `local` has the presence of a
single replica, and `catbus.postgres.presence` that of replicas with a common database.
"""

from .interface import Member, MembersPage, Presence, PresenceAction, PresenceStatistics, Watcher

__all__ = ["Member", "MembersPage", "Presence", "PresenceAction", "PresenceStatistics", "Watcher"]
