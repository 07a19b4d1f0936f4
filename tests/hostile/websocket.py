"""Attacks on WebSocket, most of them before `auth`."""

from __future__ import annotations

import itertools

from .attacks import Ended, Target, attack, pace
from .peers import BINARY, CLOSE, PING, PONG, WebSocketPeer, frame, keep, pump, request

BURST = 65_536
MEGABYTE = 1_000_000
MESSAGE = 16 * 65_536
"""Bytes of the largest message that the broker accepts in one piece."""


def repeat(target: Target, data: bytes, *, first: bytes = b"", rate: float = 0.0, token: str | None = None) -> None:
    """Send the same forever, in bursts of 64 KB, as fast as the broker reads or at `rate` bytes per second. Received
    bytes are dropped."""
    peer = WebSocketPeer(target, token)
    peer.send(first)
    burst = data * max(1, BURST // len(data))
    for _ in pace(rate / len(burst)) if rate else itertools.repeat(None):
        peer.send(burst)
        peer.drain()


# Fragments


@attack(
    "websocket",
    "empty fragments",
    "a message of empty fragments that does not end, 1 MB/s",
    like="bytes",
)
@attack(
    "websocket",
    "empty fragments, 4 connections",
    "the same, 4 times",
    like="bytes",
    processes=4,
)
def empty_fragments(target: Target) -> None:
    repeat(target, frame(b"", 0, final=False), first=frame(b"", final=False), rate=MEGABYTE)


@attack("websocket", "fragments of one byte", "a message of fragments of a byte, 1 MB/s", like="bytes")
def tiny_fragments(target: Target) -> None:
    repeat(target, frame(b"x", 0, final=False), first=frame(b"x", final=False), rate=MEGABYTE)


@attack(
    "websocket",
    "unfinished messages",
    "500 connections send a megabyte of a message that does not end",
    like="bytes",
)
def unfinished_messages(target: Target) -> None:
    part = frame(b"x" * (MESSAGE - 10), final=False)
    keep([WebSocketPeer(target) for _ in range(500)], part)


@attack(
    "websocket", "frames that claim to be huge", "the header of a frame of 2^62 bytes, and then bytes", like="bytes"
)
def huge_frames(target: Target) -> None:
    repeat(target, bytes(BURST), first=b"\x81\xff" + (1 << 62).to_bytes(8, "big") + bytes(4), rate=8 * MEGABYTE)


@attack("websocket", "messages that are too large", "the largest message and a byte, again and again", like="bytes")
def large_messages(target: Target) -> None:
    peer = WebSocketPeer(target)
    while True:
        peer.send(frame(b" " * (MESSAGE + 1)))


# Frames


@attack("websocket", "pings", "as fast as they are taken, pongs are read", like="bytes", processes=2)
def pings(target: Target) -> None:
    repeat(target, frame(b"", PING))


@attack("websocket", "pings without reading pongs", "pings of 125 bytes without end", like="bytes", processes=2)
def unread_pongs(target: Target) -> None:
    peer = WebSocketPeer(target)
    while True:
        peer.send(frame(bytes(125), PING) * 500)


@attack("websocket", "pongs", "unsolicited, as fast as they are taken", like="bytes", processes=2)
def pongs(target: Target) -> None:
    repeat(target, frame(b"", PONG))


@attack(
    "websocket", "empty messages", "whole text frames of no bytes, as fast as they are taken", like="bytes", processes=2
)
def empty_messages(target: Target) -> None:
    repeat(target, frame(b""))


@attack("websocket", "empty messages, 100 connections", "the same, a little on each of them", like="bytes", processes=2)
def many_empty_messages(target: Target) -> None:
    pump([WebSocketPeer(target) for _ in range(50)], frame(b"") * 10_000)


@attack("websocket", "pings, 200 connections", "of 125 bytes, on each as many as go", like="bytes", processes=2)
def many_pings(target: Target) -> None:
    pump([WebSocketPeer(target) for _ in range(100)], frame(bytes(125), PING) * 500)


@attack("websocket", "binary messages of a space", "which are passed on one by one", like="bytes", processes=2)
def binary_messages(target: Target) -> None:
    repeat(target, frame(b" ", BINARY))


@attack("websocket", "text that is not ASCII", "messages of a letter with an accent", like="bytes", processes=2)
def accents(target: Target) -> None:
    repeat(target, frame('{"é":1}'.encode()))


@attack("websocket", "a byte in a packet", "messages whose bytes come one by one", processes=2, like="bytes")
def byte_by_byte(target: Target) -> None:
    peer = WebSocketPeer(target)
    for byte in itertools.cycle(frame(b" ")):
        peer.send(bytes((byte,)))


@attack(
    "websocket", "on after the Close frame", "a Close frame, and then messages without end", processes=2, like="bytes"
)
def after_close(target: Target) -> None:
    peer = WebSocketPeer(target)
    peer.send(frame(b"\x03\xe8", CLOSE))
    while True:
        peer.send(frame(b" " * 1000) * 60)


# Objects


@attack("websocket", "a message of line ends", "messages in which there are only empty lines", like="bytes")
def line_ends(target: Target) -> None:
    repeat(target, frame(b"\n" * (MESSAGE - 16)))


@attack("websocket", "objects of braces", "objects of 64 KB in which every byte counts for the framer", like="bytes")
def braces(target: Target) -> None:
    repeat(target, frame(b"{" + b"{}" * 32_000 + b"}"))


@attack("websocket", "payloads of empty arrays", "publishes of 60 KB, whose depth is looked for", like="bytes")
def brackets(target: Target) -> None:
    repeat(target, frame(b'{"type":"publish","channel":"a","payload":[' + b"[]," * 20_000 + b"[]]}"))


@attack("websocket", "payloads of empty arrays, 50 connections", "the same", like="bytes", processes=2)
def many_brackets(target: Target) -> None:
    line = b'{"type":"publish","channel":"a","payload":[' + b"[]," * 20_000 + b"[]]}"
    pump([WebSocketPeer(target) for _ in range(25)], frame(line))


@attack("websocket", "objects of backslashes", "strings of 64 KB in which every other byte is escaped", like="bytes")
def backslashes(target: Target) -> None:
    repeat(target, frame(b'{"' + b'\\"' * 32_000 + b'":1}'))


@attack(
    "websocket",
    "empty objects",
    "each of two bytes, and answered with an error that is not read",
    processes=4,
    like="bytes",
)
def empty_objects(target: Target) -> None:
    peer = WebSocketPeer(target)
    while True:
        peer.send(frame(b"{}" * 30_000))


@attack(
    "websocket", "empty objects, errors read", "each of two bytes, answered with an error", like="bytes", processes=4
)
def empty_objects_read(target: Target) -> None:
    repeat(target, frame(b"{}" * 30_000))


@attack(
    "websocket", "the beginnings of objects", "60 KB of an object on 1,000 connections, before `auth`", like="bytes"
)
def beginnings(target: Target) -> None:
    keep([WebSocketPeer(target) for _ in range(1000)], frame(b'{"type":"' + b"x" * 65_000))


@attack(
    "websocket",
    "silence before auth",
    "2,000 connections shake hands, say nothing, and come back when closed",
    like="connections",
)
def no_auth(target: Target) -> None:
    keep([WebSocketPeer(target) for _ in range(2000)], b"")


@attack(
    "websocket",
    "false tokens",
    "`auth` with tokens of 8 KB, connection after connection",
    processes=4,
    like="connections",
)
def false_tokens(target: Target) -> None:
    line = frame(request("auth", token="sub-" + "A" * 8000 + ".x", protocol=1))
    while True:
        peer = WebSocketPeer(target)
        peer.send(line)
        try:
            peer.wait_for(b"nothing like it")
        except Ended:
            continue


@attack(
    "websocket",
    "the beginnings of tokens",
    "16 KB of an `auth` in fragments on 1,000 connections, which come again when they are closed",
    processes=2,
    like="connections",
)
def beginnings_of_tokens(target: Target) -> None:
    begun = frame(b'{"type":"auth","token":"' + b"x" * 8000, final=False)
    rest = frame(b"x" * 8000, 0, final=False)
    keep([WebSocketPeer(target) for _ in range(500)], begun + rest)


@attack(
    "websocket",
    "frames of a byte after the Close frame",
    "a Close frame, and then the smallest frames",
    processes=2,
    like="bytes",
)
def small_frames_after_close(target: Target) -> None:
    while True:
        peer = WebSocketPeer(target)
        peer.send(frame(b"\x03\xe8", 8))
        try:
            for _ in range(20):
                peer.send(frame(b"x") * 9000)
        except Ended:
            continue


@attack("websocket", "numbers of 15,000 digits", "the `seq` of pings, of which each is to be read", like="bytes")
def long_numbers(target: Target) -> None:
    repeat(target, frame(b'{"type":"ping","seq":' + b"9" * 15_000 + b"}"))


@attack("websocket", "objects in 2,700 objects", "each in the one before, to be refused for their depth", like="bytes")
def deep_objects(target: Target) -> None:
    repeat(target, frame(b'{"a":' * 2700 + b"1" + b"}" * 2700))
