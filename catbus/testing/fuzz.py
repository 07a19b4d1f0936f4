"""What `catbus fuzz` does: `BrokerMachine`, with hostile clients beside it, on a broker that runs, for a while."""

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
from ..errors import Disconnected, ErrorCode, Refused, Unavailable
from .blocking_connection import ThreadedConnection, dial
from .broker_state_machine import BrokerMachine
from .protocol_client import ProtocolClient
from .shrinking import minimize

EXAMPLES = 10
"""How many are played between two looks at the clock."""
MAX_STEPS = 40
"""Of an example, at the most."""
CONNECT_TIMEOUT = 10.0
"""Seconds to be let in."""

REPLAY_ATTEMPTS = 3
"""How often what was found is tried again before it is said that it does not recur."""

Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """A broker to be fuzzed. `find_target` makes one.

    The `places` take turns: URLs of any number of replicas and transports of one broker, each with who may have signed
    its certificate. With a `secret` there are clients with all kinds of grants; otherwise everybody shows `token`,
    which has to allow reading and writing for `root.*`. All channels are below `root`; with an empty one they are
    anywhere, and nobody else may publish.
    """

    endpoints: Sequence[tuple[str, str | None]]
    token: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    root: str = "fuzz"
    unreachable: Sequence[str] = ()
    """Why places that the broker tells of cannot be reached from here."""

    def sign(self, name: str, grants: Grants) -> str:
        if self.secret is not None:
            return sign(self.secret, client_id=name, grants=grants)
        assert self.token is not None, "there is neither a secret nor a token"
        return self.token

    def connect(self, number: int) -> ThreadedConnection:
        url, ca = self.endpoints[number % len(self.endpoints)]
        return dial(url, ca=ca)


def find_target(
    urls: Sequence[str],
    *,
    token: str | None = None,
    secret: str | None = None,
    ca: str | None = None,
    root: str = "fuzz",
) -> FuzzTarget:
    """A broker by its URLs, and by WebTransport, too, where all of them are WebSockets that tell of it.

    Raises `CatbusError` where one of the URLs does not answer, or does not let in who is to be let in.
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
    return FuzzTarget(endpoints, token, secret, root, unreachable)


def _discover(url: str, ca: str | None) -> tuple[str, str | None] | None:
    """WebTransport of the same replica, and the certificate where it is self-made (section 3.2)."""
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
    """What went wrong, and after which steps of one example."""

    error: BaseException
    steps: list[Step]


@dataclass(slots=True)
class FuzzResult:
    """What has been done so far, and what was found by it. `attacks` are the steps of hostile clients."""

    examples: int = 0
    steps: int = 0
    attacks: int = 0
    found: FuzzFinding | None = None

    def add(self, steps: list[Step], error: BaseException | None) -> None:
        self.examples += 1
        self.steps += len(steps)
        self.attacks += sum(name.startswith("attack_") for name, _ in steps)
        if error is not None:
            # What follows is the same, or another story: a broker that has crashed is not there.
            self.found = self.found or FuzzFinding(error, steps)


def make_machine(
    target: FuzzTarget, result: FuzzResult, on_example: Callable[[], None] = lambda: None
) -> type[BrokerMachine]:
    """A machine for `target`, which adds what it does to `tally`, and calls `watch` after each example."""
    run = secrets.token_hex(4)
    examples = count(1)

    class Machine(BrokerMachine):
        varied_grants = target.secret is not None
        hostile_root = f"{target.root}.{run}.hostile" if target.root else ""

        def __init__(self) -> None:
            super().__init__()
            self.root = f"{target.root}.{run}.{next(examples)}" if target.root else ""
            self._connections = count()

        def connect(self) -> ThreadedConnection:
            return target.connect(next(self._connections))

        def token(self, name: str, grants: Grants) -> str:
            return target.sign(name, grants)

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
    """Play examples until `seconds` have passed or something is found: then `Tally.found` says what.

    That is kept in the directory `keep`, and tried first the next time. The same `seed` draws the same examples again.
    `watch` is called after each example.
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
        # Broken brokers are seldom broken each time, and they answer late: `make_smaller` is made for that.
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
    raise AssertionError("numbers do not end")


def replay(target: FuzzTarget, steps: Sequence[Step]) -> None:
    """Take the steps again, and compare after each. Raises `AssertionError` where it goes wrong again."""
    machine = make_machine(target, FuzzResult())()
    try:
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.every_client_has_its_messages()
    finally:
        machine.teardown()


def shrink(target: FuzzTarget, found: FuzzFinding, seconds: float) -> FuzzFinding | None:
    """The same without the steps, and without what is in their lists, that it does not need; None if it does not recur.

    After `seconds` it is as small as it has become.
    """
    until = time.monotonic() + seconds
    smallest = None

    def broken(steps: Sequence[Step]) -> bool:
        nonlocal smallest
        try:
            replay(target, steps)
        except Exception as error:  # noqa: BLE001  # compared
            # Steps that make no sense without others fail otherwise.
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
    """A program that takes the steps of a finding again. It holds no secret: it reads the environment."""
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
