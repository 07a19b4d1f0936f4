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

from ..auth import Grants, sign
from ..client.transport import make_ssl_context
from ..errors import Code, Refused, Unavailable
from .connections import Dialled, dial
from .machine import BrokerMachine, Client

EXAMPLES = 10
"""How many are played between two looks at the clock."""
STEPS = 40
"""Of an example, at the most."""
PATIENCE = 10.0
"""Seconds to be let in."""

Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """A broker to be fuzzed. `find_target` makes one.

    The `places` take turns: URLs of any number of replicas and transports of one broker, each with who may have signed
    its certificate. With a `secret` there are clients with all kinds of grants; otherwise everybody shows `token`,
    which has to allow reading and writing for `root.*`. All channels are below `root`; with an empty one they are
    anywhere, and nobody else may publish.
    """

    places: Sequence[tuple[str, str | None]]
    token: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    root: str = "fuzz"

    def sign(self, name: str, grants: Grants) -> str:
        if self.secret is not None:
            return sign(self.secret, client_id=name, grants=grants)
        assert self.token is not None, "there is neither a secret nor a token"
        return self.token

    def connect(self, number: int) -> Dialled:
        url, ca = self.places[number % len(self.places)]
        return dial(url, ca=ca)


def find_target(
    urls: Sequence[str],
    *,
    token: str | None = None,
    secret: str | None = None,
    ca: str | None = None,
    root: str = "fuzz",
) -> Target:
    """A broker by its URLs, and by WebTransport, too, where all of them are WebSockets that tell of it.

    Raises `CatbusError` where one of them does not answer, or does not let in who is to be let in.
    """
    places = [(url, ca) for url in urls]
    if all(url.startswith(("ws://", "wss://")) for url in urls):
        places += [found for url in urls if (found := _discover(url, ca)) is not None]
    target = Target(places, token, secret, root)
    for number, (url, _) in enumerate(places):
        _check(target, number, url)
    return target


def _discover(url: str, ca: str | None) -> tuple[str, str | None] | None:
    """WebTransport of the same replica, and the certificate where it is self-made (section 3.2)."""
    parts = urlsplit(url)
    where = urlunsplit(("https" if parts.scheme == "wss" else "http", parts.netloc, "/.well-known/catbus", "", ""))
    context = make_ssl_context(ca) if parts.scheme == "wss" else None
    try:
        with urlopen(where, timeout=PATIENCE, context=context) as answer:  # noqa: S310  # http or https, see above
            found = json.load(answer)
        return (found["webtransport"], found.get("certificate", ca)) if "webtransport" in found else None
    except (OSError, ValueError, TypeError):
        return None


def _check(target: Target, number: int, url: str) -> None:
    everything = Grants((f"{target.root}.*",), (f"{target.root}.*",))
    connection = target.connect(number)
    try:
        client = Client(connection, url, count(1), PATIENCE)
        client.authenticate(target.sign("fuzz", everything))
        for request, kind in (
            ({"type": "subscribe", "pattern": f"{target.root}.*"}, "subscribed"),
            ({"type": "publish", "channel": f"{target.root}.hello", "payload": None, "ephemeral": True}, "published"),
        ):
            reply = client.ask(request)
            if reply["type"] != kind:
                raise Refused(Code(reply["code"]), f"{request['type']} {target.root}.*: {reply['message']}")
    except AssertionError as error:
        raise Unavailable(f"{url}: {error}") from None
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Finding:
    """What went wrong, and after which steps of one example."""

    error: BaseException
    steps: list[Step]


@dataclass(slots=True)
class Tally:
    """What has been done so far. `first` is what was found, and `smallest` the same when it had been made smaller."""

    examples: int = 0
    steps: int = 0
    attacks: int = 0
    first: Finding | None = None
    smallest: Finding | None = None

    def add(self, steps: list[Step], error: BaseException | None) -> None:
        self.examples += 1
        self.steps += len(steps)
        self.attacks += sum(name.startswith("be_hostile") for name, _ in steps)
        if error is not None:
            found = Finding(error, steps)
            self.first = self.first or found
            # What follows may be another story: a broker that has crashed is not there.
            if type(error) is type(self.first.error):
                self.smallest = min(found, self.smallest or found, key=lambda each: len(each.steps))


def make_machine(target: Target, tally: Tally, watch: Callable[[], None] = lambda: None) -> type[BrokerMachine]:
    """A machine for `target`, which adds what it does to `tally`, and calls `watch` after each example."""
    run = secrets.token_hex(4)
    examples = count(1)

    class Machine(BrokerMachine):
        varied = target.secret is not None
        hostile_root = f"{target.root}.{run}.hostile" if target.root else ""

        def __init__(self) -> None:
            super().__init__()
            self.root = f"{target.root}.{run}.{next(examples)}" if target.root else ""
            self._connections = count()

        def connect(self) -> Dialled:
            return target.connect(next(self._connections))

        def token(self, name: str, grants: Grants) -> str:
            return target.sign(name, grants)

        def teardown(self) -> None:
            error = sys.exc_info()[1]
            broken = isinstance(error, Exception) and not isinstance(error, HypothesisException)
            tally.add(self.steps, error if broken else None)
            super().teardown()
            watch()

    return Machine


def fuzz(
    target: Target,
    seconds: float,
    seed: int,
    *,
    keep: str | None = None,
    shrink: bool = True,
    watch: Callable[[Tally], None] | None = None,
) -> Tally:
    """Play examples until `seconds` have passed or something is found: then `Tally.first` says what.

    It is made smaller then, unless `shrink` is False. What was found is kept in the directory `keep`, and tried first
    the next time. The same `seed` draws the same examples again. `watch` is called after each example.
    """
    tally = Tally()
    if keep is not None:
        set_hypothesis_home_dir(keep)
    machine = make_machine(target, tally, lambda: watch(tally) if watch else None)
    how = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
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
            if tally.first is None:
                raise
        if tally.first is not None or time.monotonic() >= end:
            return tally
    raise AssertionError("numbers do not end")


def replay(target: Target, steps: Sequence[Step]) -> None:
    """Take the steps again, and compare after each. Raises `AssertionError` where it goes wrong again."""
    machine = make_machine(target, Tally())()
    try:
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.everyone_has_what_it_is_owed()
    finally:
        machine.teardown()


def replays(target: Target, finding: Finding, tries: int = 3) -> bool:
    """Whether it goes wrong again when the same steps are taken, within some tries."""
    for _ in range(tries):
        try:
            replay(target, finding.steps)
        except Exception:  # noqa: BLE001  # whatever it was
            return True
    return False


def write_script(urls: Sequence[str], finding: Finding, *, ca: str | None, root: str) -> str:
    """A program that takes the steps of a finding again. It holds no secret: it reads the environment."""
    options = "".join(f", {name}={value!r}" for name, value in (("ca", ca), ("root", root)) if value is not None)
    steps = "".join(f"        ({name!r}, {arguments!r}),\n" for name, arguments in finding.steps)
    return f"""import os

from catbus.auth import Grants
from catbus.testing.fuzz import find_target, replay

token, secret = os.environ.get("CATBUS_TOKEN"), os.environ.get("CATBUS_SECRET")
replay(
    find_target({list(urls)!r}, token=token, secret=secret{options}),
    [
{steps}    ],
)
"""
