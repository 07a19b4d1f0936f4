"""Have Atheris look for bytes that a target cannot take.

    python -m tests.fuzz_bytes messages --runs 10000000
    python -m tests.fuzz_bytes all --seconds 60

What makes a target fail is written to `found-TARGET-*`, and `--input FILE` plays it again. `--keep` adds what reached
something new to the corpora, as small as it can be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz_bytes.targets import CORPORA, TARGETS, seeds

# libFuzzer ends the process that it runs in.
CHILD = """
import sys
import atheris
with atheris.instrument_imports(include=["catbus", "h11", "wsproto"]):
    from tests.fuzz_bytes.targets import TARGETS
atheris.Setup(sys.argv, TARGETS[sys.argv.pop(1)])
atheris.Fuzz()
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_bytes", description="Find bytes that break something.")
    parser.add_argument("target", choices=[*TARGETS, "all"], help="what takes the bytes")
    parser.add_argument("--runs", type=int, default=-1, help="how many inputs (default: no limit)")
    parser.add_argument("--seconds", type=int, default=0, help="for how long (default: no limit)")
    parser.add_argument("--input", type=Path, help="play this file alone")
    parser.add_argument("--keep", action="store_true", help="add what reached something new to the corpora")
    given = parser.parse_args()
    if given.input is not None:
        TARGETS[given.target](given.input.read_bytes())
        return
    found = [name for name in (TARGETS if given.target == "all" else [given.target]) if not fuzz(name, given)]
    if found:
        sys.exit(f"found something: {', '.join(found)}")


def fuzz(name: str, given: argparse.Namespace) -> bool:
    """Look for bytes that break a target; returns whether there were none."""
    print(f"{name}: {TARGETS[name].__doc__}", flush=True)
    command = [sys.executable, "-c", CHILD, name, f"-artifact_prefix=found-{name}-", "-max_len=1500"]
    with tempfile.TemporaryDirectory() as work:
        for number, seed in enumerate(seeds(name)):
            Path(work, f"seed-{number}").write_bytes(seed)
        limits = [f"-runs={given.runs}", f"-max_total_time={given.seconds}"]
        if subprocess.run([*command, *limits, work], check=False).returncode:
            return False
        if given.keep:
            kept = CORPORA / name
            kept.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-merge=1", str(kept), work], check=True)
    return True


if __name__ == "__main__":
    main()
