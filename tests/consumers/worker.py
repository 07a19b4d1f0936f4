"""A worker in a process of its own: it moves the messages of a consumer into a table, until SIGTERM.

    python -m tests.consumers.worker postgres://... --seed 1

`effects` has no unique constraint, and rows are inserted without ON CONFLICT. With `--early`, the worker is broken on
purpose: the cursor moves in a transaction before that of the effects.
"""

from __future__ import annotations

import argparse
import random
import signal
import threading

import psycopg

CONSUMER = "moved"
RECEIVE = "SELECT seq, channel, payload FROM catbus.receive('moved', %s)"
INSERT = "INSERT INTO public.effects (seq, channel, payload, worker) VALUES (%s, %s, %s, %s)"


def work(connection: psycopg.Connection, rng: random.Random, *, early: bool) -> int:
    """One transaction, which rolls back now and then, as a whole or to a savepoint. Returns the number of messages."""
    with connection.transaction() as transaction:
        messages = connection.execute(RECEIVE, (rng.choice([1, 3, 20, 100]),)).fetchall()
        if early:
            connection.execute("COMMIT; BEGIN")
        if messages and rng.random() < 0.1:
            with connection.transaction(force_rollback=True):
                connection.execute(RECEIVE, (5,))
        rows = [(*message, connection.info.backend_pid) for message in messages]
        with connection.cursor() as cursor:
            cursor.executemany(INSERT, rows)
        if rng.random() < 0.05:
            raise psycopg.Rollback(transaction)
    return len(messages)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--early", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    while not stopping.is_set():
        try:
            with psycopg.connect(arguments.url, autocommit=True) as connection:
                while not stopping.is_set():
                    if not work(connection, rng, early=arguments.early):
                        stopping.wait(0.02)
        except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.Rollback):
            # psycopg raises its Rollback out of the block if the connection is lost in the rollback.
            stopping.wait(0.05)


if __name__ == "__main__":
    main()
