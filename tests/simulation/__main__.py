"""Run random cases for some time: `python -m tests.simulation --minutes 10`."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from multiprocessing import Process

from .case_runner import PromiseBroken, random_case
from .simulated_runner import minimize_case, play, simulation_settings


def run(seed: int, seconds: float) -> None:
    source = random.Random(seed)
    began = time.monotonic()
    number = episodes = 0
    with simulation_settings():
        while time.monotonic() < began + seconds:
            case = random_case(source)
            number += 1
            try:
                episodes += play(case)
            except PromiseBroken:
                minimal, broken = minimize_case(case)
                print(f"seed {seed}, case {number}: {minimal}\n{broken}", flush=True)
                sys.exit(1)
    took = time.monotonic() - began
    print(f"seed {seed}: {episodes} episodes in {took:.0f} s, {episodes / took * 60:.0f} a minute", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    processes = [Process(target=run, args=(options.seed + i, options.minutes * 60)) for i in range(options.processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
