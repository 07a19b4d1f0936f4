"""What the rules of `BrokerMachine` have in common: the settings, the model, and the connected clients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, precondition

from ..auth.grants import Grants
from ..auth.tokens import sign
from .administration import disconnect_client
from .blocking_connection import BlockingConnection
from .event_stream import EventStream
from .protocol_client import Message, ProtocolClient
from .reference_model import ModelMessage, ModelSession, ReferenceModel, matches

CHANNELS = ("a", "a.b", "a.b.c", "ab", "b")
PATTERNS = ("*", "a", "a.*", "a.b", "a.b.*", "b", "b.*")
ALL = Grants(("*",), ("*",))

some_channels = st.sampled_from(CHANNELS)
some_patterns = st.sampled_from(PATTERNS)
several_patterns = st.lists(some_patterns, min_size=1, max_size=3, unique=True)
some_grants = st.just(ALL) | st.builds(
    Grants,
    read=st.lists(some_patterns, max_size=3, unique=True).map(tuple),
    write=st.lists(some_patterns, max_size=3, unique=True).map(tuple),
)

has_administrator = precondition(lambda self: self.http_url and self.varied_grants and self.one_replica)

F = TypeVar("F", bound=Callable[..., Any])


def recorded(step: F) -> F:
    """Record this step and its arguments in `steps`, so that `replay` can take it again."""

    @wraps(step)
    def wrapper(self: MachineState, **arguments: Any) -> Any:
        self.steps.append((step.__name__, arguments))
        return step(self, **arguments)

    return cast(F, wrapper)


class MachineState(RuleBasedStateMachine):
    """The settings of `BrokerMachine`, which it describes, and what its rules share."""

    secret = ""
    root = ""
    varied_grants = True
    hostile_root = ""
    http_url = ""
    roles = False
    one_replica = True
    """Whether all connections reach the same replica. Otherwise no client is disconnected by an administrator: another
    replica may do so a moment later, and close the session that the client has opened since."""
    reply_timeout = 10.0
    """Seconds to wait for a reply."""
    delivery_timeout = 5.0
    """Seconds to wait for acknowledged messages, which may come through another replica."""

    def connect(self) -> BlockingConnection:
        """Open a connection without authenticating."""
        raise NotImplementedError

    def connect_first_version(self) -> BlockingConnection:
        """Open a connection for a client of the first version of the protocol; by default, as `connect` does."""
        return self.connect()

    def open_events(
        self, token: str, patterns: Sequence[str], last_id: str = "", since: str = "", options: Sequence[str] = ()
    ) -> EventStream:
        """Request an event stream; by default, from `http_url`. The arguments are those of `EventStream`."""
        return EventStream(self.http_url, token, patterns, last_id=last_id, since=since, options=options)

    def token(self, name: str, grants: Grants) -> str:
        """Return a token with these grants for the client id `name`."""
        return sign(self.secret, client_id=name, grants=grants)

    def set_role(self, name: str, grants: Grants) -> str:
        """Give the role of the client id `name` exactly these grants, and return its token. It may be a new role."""
        raise NotImplementedError

    def disconnect(self, name: str) -> None:
        """Have an administrator close all sessions of a client; by default, at `http_url`."""
        disconnect_client(self.http_url, self.token("administrator", ALL), name)

    clients: Bundle[str] = Bundle("clients")
    absent: Bundle[str] = Bundle("absent")

    def __init__(self) -> None:
        super().__init__()
        self.model = ReferenceModel()
        self.steps: list[tuple[str, dict[str, Any]]] = []
        """The steps taken so far: names of methods and their arguments."""
        self._clients: dict[str, ProtocolClient] = {}
        self._sessions: dict[str, ModelSession] = {}
        self._role_tokens: dict[str, str] = {}
        """Tokens of the clients that have a role."""
        self._names = (f"client-{number}" for number in itertools.count(1))
        self._payloads = itertools.count(1)
        self._ids = itertools.count(1)
        self._producers = itertools.count(1)
        self._ephemeral: dict[int, tuple[str, str | None]] = {}
        """Published ephemeral messages: channel and sender, by payload."""

    def _below_root(self, name: str) -> str:
        """Return a channel or pattern below the root."""
        return f"{self.root}.{name}" if self.root else name

    def _grants_below_root(self, grants: Grants) -> Grants:
        return Grants(tuple(map(self._below_root, grants.read)), tuple(map(self._below_root, grants.write)))

    # Publishing

    def _publishes(self, name: str, channels: Iterable[str]) -> list[Message]:
        """Return publish requests with ids, for those channels that the client may publish to."""
        client, session = self._clients[name], self.model.sessions[name]
        return [
            client.with_id({"type": "publish", "channel": channel, "payload": next(self._payloads)})
            for channel in map(self._below_root, channels)
            if session.may_write(channel)
        ]

    def _send_publishes(self, name: str, channels: Iterable[str]) -> list[Message]:
        requests = self._publishes(name, channels)
        for request in requests:
            self._clients[name].send(request)
        return requests

    def _wait_replies(self, name: str, requests: Iterable[Message]) -> None:
        """Wait for the replies. The seqs must be in the order of the requests."""
        for request in requests:
            self._check_published(name, request, self._clients[name].wait_reply(request))

    def _check_published(self, name: str, request: Message, reply: Message, *, echo: bool = True) -> None:
        channel, payload, head = request["channel"], request["payload"], self.model.head
        seq = reply.get("seq") if self.root else None
        retain = request.get("retain", False)
        wanted = self.model.publish(name, channel, payload, echo=echo, seq=seq, retain=retain)
        if wanted is None:
            assert (reply["type"], reply.get("code")) == ("publish_error", "unauthorized"), reply
        else:
            assert (reply["type"], reply.get("seq")) == ("published", wanted), f"{reply}, and it should be {wanted}"
            assert wanted > head, f"{reply}, after {head} was acknowledged"

    # Comparing

    def _check_ephemeral(self, who: str, message: Message, patterns: Iterable[str], received: set[Any]) -> None:
        """Check an ephemeral message for a subscription, which has `received` these payloads before."""
        payload = message["payload"]
        published = self._ephemeral.get(payload)
        found = message["channel"], message.get("sender", published and published[1])
        assert published == found, f"{who} received {message}, which no client has published"
        assert any(matches(pattern, message["channel"]) for pattern in patterns), f"{who} got {message}"
        assert payload not in received, f"{who} got {message} twice"
        received.add(payload)


def identities(messages: Iterable[Message] | Iterable[ModelMessage]) -> list[tuple[Any, ...]]:
    """Return what must be equal in received and expected messages."""
    return [
        (each.seq, each.channel, each.payload, each.sender)
        if isinstance(each, ModelMessage)
        else (each["seq"], each["channel"], each["payload"], each.get("sender"))
        for each in messages
    ]


def compare(received: list[Message], wanted: list[ModelMessage]) -> bool:
    """Return whether all expected messages were received. Raises `AssertionError` if what came is no prefix of them."""
    found, expected = identities(received), identities(wanted)
    assert found == expected[: len(found)], f"received {found}, expected {expected}"
    return len(found) == len(expected)
