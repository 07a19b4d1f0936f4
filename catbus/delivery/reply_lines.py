"""Replies that a send queue has to tell from others, because it may drop them or replace them while they wait."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Self


class HeadLine(bytes):
    """A `head` line: all subscriptions of the send queue are complete up to its seq.

    The client takes the messages before it as delivered, so it is never sent without them.
    """

    __slots__ = ()


class HistoryLine(bytes):
    """A page of history, with the seqs of its messages, and the reply to send instead if one of them is erased."""

    seqs: array[int]
    instead: bytes

    def __new__(cls, line: bytes, seqs: Iterable[int], instead: bytes) -> Self:
        history_line = super().__new__(cls, line)
        history_line.seqs = array("q", seqs)
        history_line.instead = instead
        return history_line


class PresenceLine(bytes):
    """A `members` or `presence` line for one pattern. It is not sent when the permission for that was withdrawn."""

    pattern: str

    def __new__(cls, line: bytes, pattern: str) -> Self:
        presence_line = super().__new__(cls, line)
        presence_line.pattern = pattern
        return presence_line


class SubscriptionLine(bytes):
    """A `live` or `gap` line: the same for one pattern."""

    pattern: str

    def __new__(cls, line: bytes, pattern: str) -> Self:
        subscription_line = super().__new__(cls, line)
        subscription_line.pattern = pattern
        return subscription_line
