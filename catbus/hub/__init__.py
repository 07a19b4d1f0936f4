"""The middle of a replica: `Hub` is what its sessions share, and `Client` is one of those who are connected."""

from .client import MAX_HISTORY, QUIET, STOPPING, Client, Streams
from .replica import Hub, HubStatistics

__all__ = ["MAX_HISTORY", "QUIET", "STOPPING", "Client", "Hub", "HubStatistics", "Streams"]
