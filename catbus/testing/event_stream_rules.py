"""The rules of `BrokerMachine` about event streams: each is a session with one cursor for all its patterns."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, consumes, invariant, precondition, rule

from ..auth.grants import Grants
from ..close_codes import CloseCode
from .event_stream import EventBlock, EventStream
from .known_members import KnownMembers
from .machine_state import (
    ALL,
    MachineState,
    compare,
    has_administrator,
    recorded,
    several_patterns,
    some_channels,
    some_grants,
)
from .protocol_client import Message, retain
from .reference_model import ModelMessage, ModelSession

has_event_streams = precondition(lambda self: self.http_url)
some_options = st.lists(st.sampled_from(["retained", "presence"]), unique=True)


class EventStreamClient(KnownMembers):
    """A client of one event stream, and what it has received since the last comparison."""

    def __init__(self, name: str, token: str, patterns: list[str], options: list[str]) -> None:
        super().__init__(name)
        self.token = token
        self.patterns = patterns
        self.options = options
        self.state: dict[str, int] | None = None
        """The seqs of the retained messages that it shows, by channel. None if the stream began without a snapshot."""
        self.has_snapshot = True
        """Whether the snapshot, if there is one, is complete."""
        self.stream: EventStream | None = None
        self.last_id = ""
        self.compared = 0
        """The seq up to which received and expected messages were compared."""
        self.received: list[Message] = []
        self.ephemeral: list[Message] = []
        self.ephemeral_received: set[Any] = set()
        self.told = 0
        """The greatest seq of an `id` without a message."""

    @property
    def position(self) -> int:
        """The seq of the last id."""
        return int(self.last_id.partition(".")[0])

    def begin(self, stream: EventStream, *, snapshot: bool = False) -> None:
        """Read from this stream, which may begin with a snapshot of the retained messages."""
        self.stream = stream
        if snapshot and "retained" in self.options:
            self.state, self.has_snapshot = {}, False
        for pattern in self.patterns if "presence" in self.options else ():
            self.begin_members(pattern)

    def cut(self) -> None:
        """Close the connection, and forget what was not read of it."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def handle(self, block: EventBlock) -> None:
        """Keep a block. Its `id` must not go back, and must be that of its message."""
        if block.id:
            before = self.position if self.last_id else 0
            self.last_id = block.id
            assert self.position >= before, f"the id {block.id} came after {before}"
            assert self.has_snapshot, f"the id {block.id} came before the end of the snapshot"
        if block.event == "message" and "seq" in block.data:
            assert block.data["seq"] == self.position, f"{block} has another id than its message"
            self.received.append(block.data)
            if self.state is not None and block.data.get("retain"):
                retain(self.state, block.data)
        elif block.event == "retained":
            assert self.state is not None and not self.has_snapshot, f"{self.name} received {block}"
            for message in block.data["messages"]:
                retain(self.state, message)
            self.has_snapshot = block.data["complete"]
        elif block.event == "members":
            self.add_page(block.data)
        elif block.event == "presence":
            self.apply_change(block.data)
        elif block.event == "message":
            assert not block.id, f"{block} is an ephemeral message, and moves the position"
            self.ephemeral.append(block.data)
        elif block.id:
            assert block.event in ("", "live"), block
            self.told = max(self.told, self.position)


class EventStreamRules(MachineState):
    """Opens event streams, cuts them while messages arrive, and resumes them."""

    event_streams: Bundle[str] = Bundle("event_streams")
    absent_event_streams: Bundle[str] = Bundle("absent_event_streams")

    def __init__(self) -> None:
        super().__init__()
        self._event_streams: dict[str, EventStreamClient] = {}

    def teardown(self) -> None:
        for client in self._event_streams.values():
            client.cut()
        super().teardown()

    @has_event_streams
    @rule(
        target=event_streams,
        patterns=several_patterns,
        grants=some_grants,
        back=st.none() | st.integers(0, 10),
        options=some_options,
    )
    @recorded
    def open_event_stream(self, patterns: list[str], grants: Grants, back: int | None, options: list[str]) -> str:
        """Open a stream for several patterns, from now on or since a seq. It needs a grant for each of them.

        Now, it can begin with the retained messages; and the members can be watched.

        Without the grants, it is opened with all of them afterwards.
        """
        name, patterns = next(self._names), list(map(self._below_root, patterns))
        since = None if back is None else max(self.model.base, self.model.head - back)
        grants = self._grants_below_root(grants if self.varied_grants else ALL)
        session = ModelSession(name, grants, 0)
        stream = self._request_events(
            client := EventStreamClient(name, self.token(name, grants), patterns, options), since
        )
        if not all(map(session.may_read, patterns)):
            assert stream.status == 403, f"{stream.status} for {patterns} with {grants}"
            stream.close()
            client.token = self.token(name, self._grants_below_root(ALL))
            stream = self._request_events(client, since)
        assert stream.status == 200, f"{stream.status} for {patterns} with {grants}"
        client.begin(stream, snapshot=since is None)
        self._event_streams[name] = client
        if since is None:
            # The first id says where the stream begins: a lagging replica begins at its own position.
            self._read_block(name, client, time.monotonic() + self.reply_timeout, until_id=True)
            assert self.root or client.position <= self.model.head, f"{client.last_id} is above the head"
            # Messages that follow a snapshot may come before `live`.
            since = client.received[0]["seq"] - 1 if client.received else client.position
        client.compared = since
        return name

    def _request_events(self, client: EventStreamClient, since: int | None) -> EventStream:
        since_text = "" if since is None else str(since)
        return self.open_events(client.token, client.patterns, since=since_text, options=client.options)

    @rule(name=consumes(event_streams), target=absent_event_streams)
    @recorded
    def leave_event_stream(self, name: str) -> str:
        self._event_streams[name].cut()
        return name

    @rule(name=consumes(absent_event_streams), target=event_streams)
    @recorded
    def resume_event_stream(self, name: str) -> str:
        """Open the stream again after its last id."""
        self._resume(self._event_streams[name])
        return name

    @rule(
        name=event_streams,
        publisher=MachineState.clients,
        channels=st.lists(some_channels, min_size=1, max_size=20),
        blocks=st.integers(0, 10),
    )
    @recorded
    def cut_event_stream_while_publishing(self, name: str, publisher: str, channels: list[str], blocks: int) -> None:
        """Cut a stream after some blocks of what is published, and resume it. Nothing may be missing or repeated."""
        client = self._event_streams[name]
        self._wait_replies(publisher, self._send_publishes(publisher, channels))
        for _ in range(blocks):
            if len(client.received) < len(self._expected(client)):
                self._read_block(name, client, time.monotonic() + self.delivery_timeout)
        client.cut()
        self._resume(client)

    @has_administrator
    @rule(name=event_streams)
    @recorded
    def disconnect_event_stream_as_administrator(self, name: str) -> None:
        """Have the stream closed, which says so at its end, and resume it."""
        client = self._event_streams[name]
        assert client.stream is not None
        self.disconnect(name)
        deadline = time.monotonic() + self.reply_timeout
        try:
            while (block := client.stream.receive(deadline - time.monotonic())) is not None and block.event != "close":
                client.handle(block)
            assert block is not None, f"the event stream of {name} ended without a reason"
            assert block.data["code"] == CloseCode.DISCONNECTED, block
            assert client.stream.receive(deadline - time.monotonic()) is None, f"{name} got more after {block}"
        except TimeoutError:
            raise AssertionError(f"the broker does not end the event stream of {name}") from None
        client.cut()
        self._resume(client)

    def _resume(self, client: EventStreamClient) -> None:
        last_id = client.last_id
        stream = self.open_events(
            client.token, client.patterns, last_id, "" if last_id else str(client.compared), client.options
        )
        assert stream.status == 200, stream.status
        client.begin(stream)

    def _expected(self, client: EventStreamClient) -> list[ModelMessage]:
        return self.model.expected_events(client.patterns, client.compared)

    def _read_block(self, name: str, client: EventStreamClient, deadline: float, *, until_id: bool = False) -> None:
        assert client.stream is not None
        while True:
            try:
                block = client.stream.receive(deadline - time.monotonic())
            except TimeoutError:
                raise AssertionError(
                    f"{name} received {client.received} of {client.patterns} after {client.compared}, "
                    f"expected {self._expected(client)}; it knows the members {client.watched}"
                ) from None
            assert block is not None, f"the broker ended the event stream of {name}"
            client.handle(block)
            if block.id or not until_id:
                return

    @invariant()
    def every_event_stream_has_its_messages(self) -> None:
        for name, client in self._event_streams.items():
            if client.stream is None:
                continue
            deadline = time.monotonic() + self.delivery_timeout
            while not compare(client.received, wanted := self._expected(client)):
                self._read_block(name, client, deadline)
                self._check_position(name, client)
            self._drain(name, client)
            compare(client.received, wanted)
            if client.state is not None:
                state = self.model.retained(client.patterns)
                assert client.state == state, f"{name} has the state {client.state}, and it should be {state}"
            deadline = time.monotonic() + self.delivery_timeout
            while not all(client.knows_members_of(self.model, pattern) for pattern in client.watched):
                self._read_block(name, client, deadline)
            for message in client.ephemeral:
                self._check_ephemeral(name, message, client.patterns, client.ephemeral_received)
            client.received, client.ephemeral, client.compared = [], [], max(client.compared, self.model.head)

    def _drain(self, name: str, client: EventStreamClient) -> None:
        """Take what has arrived besides, without waiting."""
        assert client.stream is not None
        while True:
            try:
                block = client.stream.receive(0.0)
            except TimeoutError:
                return
            assert block is not None, f"the broker ended the event stream of {name}"
            client.handle(block)
            self._check_position(name, client)

    def _check_position(self, name: str, client: EventStreamClient) -> None:
        """Check that no `id` says that the stream is complete up to a message that it has not received."""
        missing = [each for each in self._expected(client)[len(client.received) :] if each.seq <= client.told]
        assert not missing, f"{name} was told the id {client.last_id} before {missing}"
