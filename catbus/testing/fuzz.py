"""What `catbus fuzz` runs: `BrokerMachine` and hostile clients against a running broker, for some time."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import HypothesisException
from hypothesis.stateful import run_state_machine_as_test

from ..auth.grants import Grants
from ..auth.tokens import sign
from ..client.broker_address import make_ssl_context
from ..error_codes import ErrorCode
from ..errors import Disconnected, Refused, Unavailable
from .administration import disconnect_client
from .blocking_connection import ThreadedConnection, dial
from .broker_state_machine import BrokerMachine
from .event_stream import EventStream
from .machine_state import ALL
from .protocol_client import ProtocolClient
from .shrinking import minimize

EXAMPLES = 10
"""Examples between two checks of the time."""
MAX_STEPS = 40
"""Maximum number of steps of an example."""
CONNECT_TIMEOUT = 10.0
"""Seconds to wait while the target is checked."""

REPLAY_ATTEMPTS = 3
"""Attempts to reproduce a finding."""

Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """A broker to fuzz. `find_target` makes one.

    Connections rotate over `endpoints`: URLs of any replicas and transports of one broker, each with a file of trusted
    certificate authorities or None. With a `secret`, clients have random grants. Without one, all of them use `token`,
    which must allow reading and writing `root.*`. All channels are below `root`; with an empty root they are anywhere,
    and no one else may publish.
    """

    endpoints: Sequence[tuple[str, str | None]]
    token: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    root: str = "fuzz"
    set_role: Callable[[str, Grants], str] | None = None
    """Gives a role exactly these grants, and returns its token. With it, and a secret, clients also have roles."""
    unreachable: Sequence[str] = ()
    """Why endpoints that the broker advertises cannot be reached from here."""

    def sign(self, name: str, grants: Grants) -> str:
        if self.secret is not None:
            return sign(self.secret, client_id=name, grants=grants)
        assert self.token is not None, "there is neither a secret nor a token"
        return self.token

    def connect(self, number: int) -> ThreadedConnection:
        url, ca = self.endpoints[number % len(self.endpoints)]
        return dial(url, ca=ca)

    def connect_websocket(self, number: int) -> ThreadedConnection:
        """Connect over WebSocket, if there is such an endpoint: over WebTransport, the first version is slow."""
        url, ca = (self._websockets or self.endpoints)[number % len(self._websockets or self.endpoints)]
        return dial(url, ca=ca)

    @property
    def http_urls(self) -> Sequence[tuple[str, str | None]]:
        """The origins of the HTTP endpoints, which are those for WebSocket."""
        return [
            (urlunsplit(("https" if parts.scheme == "wss" else "http", parts.netloc, "", "", "")), ca)
            for url, ca in self._websockets
            if (parts := urlsplit(url))
        ]

    @property
    def _websockets(self) -> Sequence[tuple[str, str | None]]:
        return [(url, ca) for url, ca in self.endpoints if url.startswith(("ws://", "wss://"))]


def find_target(
    urls: Sequence[str],
    *,
    token: str | None = None,
    secret: str | None = None,
    ca: str | None = None,
    root: str = "fuzz",
) -> FuzzTarget:
    """Return a target for these URLs. If all are WebSocket URLs, add the WebTransport endpoints that they advertise.

    Raises `CatbusError` if one of the URLs does not answer or does not accept the credentials.
    """
    endpoints, unreachable = [(url, ca) for url in urls], []
    for place in endpoints:
        _check_access(FuzzTarget([place], token, secret, root))
    if all(url.startswith(("ws://", "wss://")) for url in urls):
        for place in [found for url in urls if (found := _discover(url, ca)) is not None]:
            try:
                _check_access(FuzzTarget([place], token, secret, root))
                endpoints.append(place)
            except Disconnected as error:
                unreachable.append(str(error))
    return FuzzTarget(endpoints, token, secret, root, unreachable=unreachable)


def _discover(url: str, ca: str | None) -> tuple[str, str | None] | None:
    """Return the WebTransport URL of the same replica, and its certificate if it is self-made (section 3.2)."""
    parts = urlsplit(url)
    where = urlunsplit(("https" if parts.scheme == "wss" else "http", parts.netloc, "/.well-known/catbus", "", ""))
    context = make_ssl_context(ca) if parts.scheme == "wss" else None
    try:
        with urlopen(where, timeout=CONNECT_TIMEOUT, context=context) as answer:  # noqa: S310  # http or https, see above
            found = json.load(answer)
        return (found["webtransport"], found.get("certificate", ca)) if "webtransport" in found else None
    except (OSError, ValueError, TypeError):
        return None


def _check_access(target: FuzzTarget) -> None:
    everything = Grants((f"{target.root}.*",), (f"{target.root}.*",))
    [(url, _)], connection = target.endpoints, target.connect(0)
    try:
        client = ProtocolClient(connection, url, count(1), CONNECT_TIMEOUT)
        client.authenticate(target.sign("fuzz", everything))
        for request, kind in (
            ({"type": "subscribe", "pattern": f"{target.root}.*"}, "subscribed"),
            ({"type": "publish", "channel": f"{target.root}.hello", "payload": None, "ephemeral": True}, "published"),
        ):
            reply = client.request(request)
            if reply["type"] != kind:
                raise Refused(ErrorCode(reply["code"]), f"{request['type']} {target.root}.*: {reply['message']}")
    except AssertionError as error:
        raise Unavailable(f"{url}: {error}") from None
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class FuzzFinding:
    """A failure, and the steps of the example that led to it."""

    error: BaseException
    steps: list[Step]


@dataclass(slots=True)
class FuzzResult:
    """What was run so far, and what it found. `attacks` counts the steps of hostile clients."""

    examples: int = 0
    steps: int = 0
    attacks: int = 0
    found: FuzzFinding | None = None

    def add(self, steps: list[Step], error: BaseException | None) -> None:
        self.examples += 1
        self.steps += len(steps)
        self.attacks += sum(name.startswith("attack_") for name, _ in steps)
        if error is not None:
            # Only the first failure counts: after it, the broker may have crashed.
            self.found = self.found or FuzzFinding(error, steps)


def make_machine(
    target: FuzzTarget, result: FuzzResult, on_example: Callable[[], None] = lambda: None
) -> type[BrokerMachine]:
    """Return a machine for `target` that counts its steps in `result` and calls `on_example` after each example."""
    run = secrets.token_hex(4)
    examples = count(1)

    class Machine(BrokerMachine):
        varied_grants = target.secret is not None
        hostile_root = f"{target.root}.{run}.hostile" if target.root else ""
        roles = target.set_role is not None and target.secret is not None
        one_replica = len(target.http_urls) == 1
        http_url = target.http_urls[0][0] if target.http_urls else ""

        def __init__(self) -> None:
            super().__init__()
            self.root = f"{target.root}.{run}.{next(examples)}" if target.root else ""
            self._connections = count()

        def connect(self) -> ThreadedConnection:
            return target.connect(next(self._connections))

        def connect_first_version(self) -> ThreadedConnection:
            return target.connect_websocket(next(self._connections))

        def open_events(
            self, token: str, patterns: Sequence[str], last_id: str = "", since: str = "", options: Sequence[str] = ()
        ) -> EventStream:
            url, ca = target.http_urls[next(self._connections) % len(target.http_urls)]
            return EventStream(url, token, patterns, last_id=last_id, since=since, options=options, ca=ca)

        def token(self, name: str, grants: Grants) -> str:
            # Client ids of its own: an administrator disconnects these clients.
            return target.sign(f"fuzz-{run}-{name}", grants)

        def set_role(self, name: str, grants: Grants) -> str:
            assert target.set_role is not None
            return target.set_role(f"fuzz-{run}-{name}", grants)

        def disconnect(self, name: str) -> None:
            url, ca = target.http_urls[0]
            disconnect_client(url, self.token("administrator", ALL), f"fuzz-{run}-{name}", ca=ca)

        def teardown(self) -> None:
            error = sys.exc_info()[1]
            broken = isinstance(error, Exception) and not isinstance(error, HypothesisException)
            result.add(self.steps, error if broken else None)
            super().teardown()
            on_example()

    return Machine


def fuzz(
    target: FuzzTarget,
    seconds: float,
    seed: int,
    *,
    keep: str | None = None,
    on_example: Callable[[FuzzResult], None] | None = None,
) -> FuzzResult:
    """Run examples until `seconds` have passed or something is found, which `FuzzResult.found` then holds.

    Findings are kept in the directory `keep` and run first the next time. The same `seed` draws the same examples.
    `on_example` is called after each example.
    """
    result = FuzzResult()
    if keep is not None:
        set_hypothesis_home_dir(keep)
    machine = make_machine(target, result, lambda: on_example(result) if on_example else None)
    how = settings(
        max_examples=EXAMPLES,
        stateful_step_count=MAX_STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # A faulty broker may not fail each time, and may be slow to reply. `shrink` is made for that.
        phases=[Phase.reuse, Phase.generate],
        database=None if keep is None else DirectoryBasedExampleDatabase(Path(keep) / "examples"),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )
    end = time.monotonic() + seconds
    for number in count(seed):
        try:
            run_state_machine_as_test(seeded(number)(machine), settings=how)
        except Exception:
            if result.found is None:
                raise
        if result.found is not None or time.monotonic() >= end:
            return result
    raise AssertionError("unreachable")


def replay(target: FuzzTarget, steps: Sequence[Step]) -> None:
    """Take the steps again, and compare after each. Raises `AssertionError` if it fails again."""
    machine = make_machine(target, FuzzResult())()
    try:
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.check()
    finally:
        machine.teardown()


def shrink(target: FuzzTarget, found: FuzzFinding, seconds: float) -> FuzzFinding | None:
    """Return the finding with as few steps and list items as possible, or None if it cannot be reproduced.

    Stops after `seconds` with the smallest one so far.
    """
    until = time.monotonic() + seconds
    smallest = None

    def broken(steps: Sequence[Step]) -> bool:
        nonlocal smallest
        try:
            replay(target, steps)
        except Exception as error:  # noqa: BLE001  # compared
            # Without the steps before it, a step may also fail for another reason.
            if type(error) is type(found.error):
                smallest = FuzzFinding(error, list(steps))
                return True
        return False

    if not any(broken(found.steps) for _ in range(REPLAY_ATTEMPTS)):
        return None
    steps = minimize(found.steps, broken, until)
    for place, (name, arguments) in enumerate(steps):
        for argument, value in arguments.items():
            if isinstance(value, list):

                def without(fewer: Sequence[Any], place: int = place, argument: str = argument) -> bool:
                    name, arguments = steps[place]
                    return broken([*steps[:place], (name, {**arguments, argument: list(fewer)}), *steps[place + 1 :]])

                steps[place] = name, {**steps[place][1], argument: minimize(value, without, until)}
    return smallest


def write_script(urls: Sequence[str], finding: FuzzFinding, *, ca: str | None, root: str) -> str:
    """Return a program that takes the steps of a finding again. It reads secrets from the environment."""
    options = "".join(f", {name}={value!r}" for name, value in (("ca", ca), ("root", root)) if value is not None)
    steps = "".join(f"        ({name!r}, {arguments!r}),\n" for name, arguments in finding.steps)
    return f"""import os

from catbus.auth.grants import Grants
from catbus.testing.fuzz import find_target, replay

token, secret = os.environ.get("CATBUS_TOKEN"), os.environ.get("CATBUS_SECRET")
replay(
    find_target({list(urls)!r}, token=token, secret=secret{options}),
    [
{steps}    ],
)
"""
