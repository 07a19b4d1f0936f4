"""How many packets were lost: aioquic tells its congestion control, which is ours to choose, and keeps no count."""

from __future__ import annotations

from collections.abc import Iterable

from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

ALGORITHM = "catbus-reno"
"""aioquic's default, and counted."""


class Losses:
    """`packets`: those sent by servers in this process that were found to be lost, so far."""

    def __init__(self) -> None:
        self.packets = 0


losses = Losses()


class _CountingReno(RenoCongestionControl):
    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        lost = list(packets)
        losses.packets += len(lost)
        super().on_packets_lost(now=now, packets=lost)


register_congestion_control(ALGORITHM, _CountingReno)
