"""What runs of the shop: its worker, and what the web server calls."""

import json
import os
import sys
from email.message import Message
from functools import partial
from pathlib import Path

import trio

from . import shop
from .mailer import verify

WORKER = Path(__file__).parent / "worker.py"


class Shop:
    """The shop, in the database of the broker, with the process of its worker. Most of its methods block."""

    def __init__(self, database: str) -> None:
        self.database = database
        self._secret = ""
        self._worker: trio.Process | None = None

    async def run(self, mailer: str, *, task_status: trio.TaskStatus[None]) -> None:
        """Make the tables, and run a worker. When it has ended, start another one. `mailer` is the URL for webhooks."""
        await trio.to_thread.run_sync(shop.run, self.database, shop.set_up)
        self._secret = await trio.to_thread.run_sync(shop.run, self.database, shop.deliver_mails_to, mailer)
        task_status.started()
        command = [sys.executable, str(WORKER)]
        environment = {**os.environ, "DATABASE_URL": self.database}
        while True:
            async with trio.open_nursery() as nursery:
                # Ctrl-C is for this process alone.
                start = partial(trio.run_process, command, env=environment, check=False, process_group=0)
                self._worker = await nursery.start(start)
            await trio.sleep(0.1)  # One that cannot start must not keep the machine busy.

    def list_orders(self) -> str:
        return json.dumps(shop.run(self.database, shop.list_orders))

    def place_order(self, customer: str, item: str) -> None:
        shop.run(self.database, shop.place_order, customer, item)

    def kill_worker(self) -> str:
        if self._worker is None or self._worker.returncode is not None:
            return "There is no worker at the moment."
        self._worker.kill()
        return f"Process {self._worker.pid} was killed. Its transaction is rolled back, and the next process goes on."

    def send_mails(self, headers: Message, body: bytes) -> bool:
        """Whether the webhook comes from the broker."""
        messages = verify(self._secret, headers, body)
        if messages:
            shop.run(self.database, shop.send_mails, [message["payload"]["id"] for message in messages])
        return messages is not None
