"""Run the manifests under load, without a cluster: renew a certificate, then do a rolling restart.

    python -m tests.k8s --sessions 200 --rate 20

It runs three replicas of the rendered Deployment, PgBouncer, and HAProxy in place of the Ingress; see
`tests/k8s/cluster.py`. Half of the sessions come through the ingress, by WebSocket, and half directly, by WebTransport.
The exit status is 1 if a subscriber lacks a message or gets one twice, or if a publish is not acknowledged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trio

from bench.restart_load import Load, plot
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from tests.k8s.cluster import Cluster, open_cluster
from tests.k8s.image import install_image
from tests.postgres.clusters import open_served_cluster

SECRET = "a secret that all replicas share"
CERTIFICATE_RELOAD_TIME = 2.0
"""Seconds for all replicas to load the new certificate."""


@dataclass
class Outcome:
    """`seconds`: the duration of the restart. `lost`: sessions lost before it, when the certificate was renewed."""

    cluster: Cluster
    load: Load
    seconds: float = 0.0
    lost: int = 0


async def run_load(command: Path, url: str, directory: Path, sessions: int, rate: float) -> Outcome:
    async with open_cluster(command, url, SECRET, directory) as cluster:
        load = Load(cluster.dial, sign(SECRET, client_id="load", grants=Grants(("*",), ("*",))))
        outcome = Outcome(cluster, load)

        async def renew_and_restart() -> None:
            cluster.renew()
            await trio.sleep(CERTIFICATE_RELOAD_TIME)
            outcome.lost = len(load.moves)
            began = trio.current_time()
            await cluster.restart()
            outcome.seconds = trio.current_time() - began

        await load.play(sessions, rate, renew_and_restart)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.k8s", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--rate", type=float, default=20.0, help="messages per second, of all publishers together")
    options = parser.parse_args()
    print("running the steps of the Dockerfile, and starting PostgreSQL ...", flush=True)
    with install_image() as image, open_served_cluster() as postgres, tempfile.TemporaryDirectory() as name:
        print("running ...", flush=True)
        command = image / "bin" / "catbus"
        outcome = trio.run(run_load, command, postgres.url, Path(name), options.sessions, options.rate)
    load, pods = outcome.load, outcome.cluster.all
    pauses = load.pauses
    print("\nreconnects per second:")
    print("\n".join(plot(load.moves)))
    print(
        f"\n| sessions | lost by a renewed certificate | moved | seconds for all replicas | published | acknowledged "
        f"| delivered | lost | repeated | pause p50, p99 in ms |\n|{'---|' * 10}\n"
        f"| {options.sessions} | {outcome.lost} | {len(load.moves) - outcome.lost} | {outcome.seconds:.1f} "
        f"| {load.published} | {load.acknowledged} | {load.delivered} | {load.lost} | {load.repeated} "
        f"| {pauses[len(pauses) // 2] * 1e3:.0f}, {pauses[len(pauses) * 99 // 100] * 1e3:.0f} |"
    )
    for pod in pods:
        failures = ", ".join(pod.failures) or "no failures"
        print(f"{pod.name}: status {pod.status}, {pod.stopped_in:.1f} s to end; {failures}")
    failed = load.lost or load.repeated or load.published != load.acknowledged or any(pod.failures for pod in pods)
    sys.exit(bool(failed or outcome.lost))


if __name__ == "__main__":
    main()
