"""The counter of lost packets.

aioquic keeps no count, but reports each loss to its congestion control, which can be replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

CONGESTION_CONTROL = "catbus-reno"
"""The name of aioquic's default algorithm with a counter."""


class LostPacketCounter:
    """The `count` of packets that servers of this process sent and that were declared lost."""

    def __init__(self) -> None:
        self.count = 0


lost_packets = LostPacketCounter()


class _CountingReno(RenoCongestionControl):
    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        lost = list(packets)
        lost_packets.count += len(lost)
        super().on_packets_lost(now=now, packets=lost)


register_congestion_control(CONGESTION_CONTROL, _CountingReno)
