"""Attack a broker in every way, and measure the latency of honest clients.

    python -m tests.hostile
    python -m tests.hostile --only "empty fragments" "ClientHello of 16 MB" --seconds 10
    python -m tests.hostile --tree ../before --json before.json

Each attack has its own `catbus run`, of this tree or of another one. An honest client publishes 50 messages per second
to another one, and new clients connect, resume, read history and publish over HTTP 4 times per second: first without
an attack, then during it, then beside four honest clients that send no more bytes, packets or connections than the
attack did. They use WebTransport for attacks on QUIC, and WebSocket for the others. Attackers and the honest load are
processes with a lower priority. Attackers reconnect when the broker has closed their connections.

A broker withstands an attack if the honest p99 is at most twice that beside the honest load, or 10 ms more; if no
honest client is rejected and no message is lost; and if memory, files and connections are as before within 10 s. The
exit status is 1 if the broker fails an attack that it should withstand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import frames, http, limits, publishing, quic, short, subscribing, tls, tokens, websocket
from .attacks import ATTACKS, Attack
from .broker import ROOT
from .measure import HEAD, Result, measure, row

MODULES = (http, tokens, websocket, quic, frames, publishing, limits, subscribing, tls)
"""Each of these modules adds its attacks to the table."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these attacks, or those of a layer")
    parser.add_argument("--seconds", type=float, default=6, metavar="N", help="how long each of them goes on (6)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run each so often, and take the best (1)")
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="PATH", help="attack the broker of this checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--short", action="store_true", help="only what does not depend on time, in a second each")
    parser.add_argument("--database", default="", metavar="URL", help="for those that need PostgreSQL, with --short")
    parser.add_argument("--list", action="store_true", help="only say which attacks there are")
    options = parser.parse_args()
    chosen = [a for a in ATTACKS.values() if not options.only or {a.name, a.layer} & set(options.only)]
    if unknown := set(options.only or ()) - {name for a in ATTACKS.values() for name in (a.name, a.layer)}:
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    if options.list:
        print(*table(chosen), sep="\n")
        return
    # Brokers and attackers end with this process, also when it is terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.short:
        for name, faults in short.run([each for each in chosen if each.stands and not each.drains], options.database):
            print(json.dumps([name, faults]), flush=True)
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}, {options.seconds:g} s for each attack\n")
    print(HEAD, flush=True)
    fallen = False
    for attack in chosen:
        results: list[Result] = []
        for _ in range(options.repeat):
            try:
                results.append(measure(attack, options.seconds, options.tree.resolve()))
            except (OSError, RuntimeError, EOFError, AssertionError):
                traceback.print_exc()
        if not results:
            print(f"| {attack.name} | | | | | | | | | | | | did not run |", flush=True)
            fallen = True
            continue
        best = min(results, key=lambda result: (len(result.verdict()), result.during.at(0.99)))
        print(row(best), flush=True)
        fallen = fallen or (attack.stands and bool(best.verdict()))
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(_plain(best)) + "\n")
    sys.exit(fallen)


def table(attacks: Iterable[Attack]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the attacks."""
    yield "| Attack | Layer | Token | Tested | What it sends |"
    yield "|---|---|---|---|---|"
    for attack in attacks:
        words = ("yes" if attack.token else "no", "yes" if attack.stands else "no")
        yield f"| {attack.name} | {attack.layer} | {' | '.join(words)} | {attack.about} |"


def _plain(result: Result) -> dict[str, object]:
    """Return the figures without values that JSON does not have."""
    return {
        "attack": result.attack.name,
        "verdict": result.verdict(),
        **{
            name: {
                "p50": span.at(0.5),
                "p99": span.at(0.99),
                "lost": span.lost,
                "delivered": len(span.latencies),
                "refused": span.refused,
            }
            | {"failures": span.failures}
            for name, span in (("calm", result.calm), ("during", result.during), ("beside", result.beside))
        },
        **{
            each.name: getattr(result, each.name)
            for each in dataclasses.fields(result)
            if each.name in ("peak", "busy", "calmed", "size", "units", "load", "endings", "codes", "logged", "exit")
        },
        "before": result.before._asdict(),
        "after": result.after._asdict(),
    }


if __name__ == "__main__":
    main()
