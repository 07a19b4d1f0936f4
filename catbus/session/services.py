"""The services of a replica that its sessions use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..auth.live_permissions import LivePermissions
from ..auth.revocations import Revocations
from ..config import Config
from ..delivery.fan_out import Delivery
from ..delivery.flusher import Flusher
from ..delivery.message_pages import ClientTurns
from ..limits.client_usage import ClientUsages
from ..limits.cpu_scheduler import CpuScheduler
from ..limits.publish_rate import PublishRateLimits
from ..limits.unauthenticated import UnauthenticatedPeers
from ..log import Log
from ..observability.runtime_statistics import RuntimeStatistics
from ..presence import Presence
from .authentication import Authentication
from .hooks import Hooks
from .presence_watch import PresenceFeeder
from .publishing import Publisher


@dataclass(frozen=True, slots=True)
class SessionServices:
    """All that a session may use of its replica. The sessions of a replica share one of these."""

    config: Config
    log: Log
    delivery: Delivery
    flusher: Flusher
    authentication: Authentication
    publisher: Publisher
    hooks: Hooks
    permissions: LivePermissions
    revocations: Revocations
    publish_rates: PublishRateLimits
    client_usages: ClientUsages
    unauthenticated: UnauthenticatedPeers
    cpu_scheduler: CpuScheduler
    statistics: RuntimeStatistics
    presence: Presence
    presence_feeder: PresenceFeeder
    member_turns: ClientTurns
    """Turns of reading members from the database."""
    replica_id: str
    reconnect_delay: Callable[[], float | None]
    """Returns after how many seconds a client should reconnect to another replica, at random; None unless draining."""
