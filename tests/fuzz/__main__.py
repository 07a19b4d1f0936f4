"""Play `BrokerMachine` to the real broker for as long as one likes.

    python -m tests.fuzz --minutes 60

Prints how many examples and steps there were; on a failure, what Hypothesis has made of it, and ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
import time

from hypothesis import settings

from catbus.testing import open_test_broker

from .machines import QUICK, Count, run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=50, help="in an example, at the most")
    options = parser.parse_args()
    count, began = Count(), time.monotonic()
    how = settings(QUICK, max_examples=50, stateful_step_count=options.steps)
    with open_test_broker() as broker:
        while (spent := time.monotonic() - began) < 60 * options.minutes:
            run(broker, how, count)
            print(f"{spent / 60:6.1f} min: {count.examples} examples, {count.steps} steps", flush=True)
    print(f"nothing was found in {count.examples} examples with {count.steps} steps")
    sys.exit(0)


if __name__ == "__main__":
    main()
