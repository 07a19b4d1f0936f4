"""A renewed certificate and a rolling restart of the rendered manifests, under load."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.k8s.__main__ import run_load

SESSIONS = 30
RATE = 20.0


async def test_rolling_restart_under_load_loses_and_repeats_nothing(
    image: Path, database_url: str, tmp_path: Path
) -> None:
    with trio.fail_after(180):
        outcome = await run_load(image / "bin" / "catbus", database_url, tmp_path, SESSIONS, RATE)
    load, pods = outcome.load, outcome.cluster.all
    assert (load.lost, load.repeated) == (0, 0)
    assert load.published == load.acknowledged > 0
    assert outcome.lost == 0, "a renewed certificate closed a session"
    assert len(load.moves) >= SESSIONS, "every session must move"
    assert [pod.failures for pod in pods] == [[]] * 6
    assert [pod.status for pod in pods[:3]] == [0, 0, 0]
