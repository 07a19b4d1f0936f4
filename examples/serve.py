"""Serve the examples, with a broker in the same process, for browsers on this machine.

    python examples/serve.py

Settings of the broker come from the environment, as for `catbus run`. By default it has a PostgreSQL of its own.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio
from assistant import model_server
from orders.running_shop import Shop
from orders.shop import MENU

import catbus
from catbus import AuthenticatedClient, ClientInfo, ErrorCode, Refused
from catbus.config import default_state_directory

DEFAULTS = {
    "websocket.bind": "127.0.0.1:0",
    "webtransport.bind": [],
    "database.url": "embedded",
    "webhooks.allow": ["127.0.0.1/32"],
    "state": str(default_state_directory(os.environ) / "examples"),
}
READ = ["todo.*", "chat.*", "typing.*", "orders.*", "answers.{user}.*", "tokens.{user}.*"]
WRITE = ["todo.*", "chat.*", "typing.*", "answers.{user}.*"]
ASSISTANT = "the assistant"

HERE = Path(__file__).parent
CLIENT = HERE.parent / "clients" / "javascript"
MODULES = CLIENT / "node_modules"
BUNDLE = [str(MODULES / ".bin" / "esbuild"), "--bundle", "--format=esm", "--jsx=automatic", "--log-level=error"]
BUNDLE += [f"--alias:@catbus/client={CLIENT}/src/catbus.js", f"--alias:@catbus/client/react={CLIENT}/src/react.js"]

users: dict[str, str] = {}  # by token; a real application has them in its database


def bundle(source: Path) -> str:
    """A page's script with React and the client, made from JSX at each request. An application has Vite for this."""
    try:
        environment = {**os.environ, "NODE_PATH": str(MODULES)}
        command = [*BUNDLE, str(source)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    except FileNotFoundError:
        problem = f"The pages with React need packages of npm: npm ci --prefix {CLIENT}"
    except subprocess.CalledProcessError as error:
        problem = error.stderr
    else:
        return done.stdout
    return f"document.body.textContent = {json.dumps(problem)};"


async def run_assistant(url: str, model: str) -> None:
    """Run the worker of the assistant. When it has ended, start another one."""
    token = secrets.token_urlsafe(32)
    users[token] = ASSISTANT
    command = [sys.executable, str(HERE / "assistant" / "worker.py")]
    environment = {**os.environ, "CATBUS_URL": url, "CATBUS_TOKEN": token, "MODEL_URL": model}
    while True:
        # Ctrl-C is for this process alone.
        await trio.run_process(command, env=environment, check=False, process_group=0)
        await trio.sleep(0.1)  # One that cannot start must not keep the machine busy.


class PageHandler(SimpleHTTPRequestHandler):
    """The files of this folder, and what their scripts ask for."""

    def __init__(self, *arguments: Any, broker: catbus.Broker, shop: Shop | None, **more: Any) -> None:
        self.broker = broker
        self.shop = shop
        super().__init__(*arguments, directory=str(HERE), **more)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match url.path:
            case "/token":
                # The demo believes every name. A real application takes the user from its own login.
                [user] = parse_qs(url.query).get("user", [""])[-1:]
                if re.fullmatch(r"\w{1,20}", user):
                    token = secrets.token_urlsafe(32)
                    users[token] = user
                    self.send_text(token)
                else:
                    self.send_error(HTTPStatus.BAD_REQUEST, "user: 1 to 20 letters and digits")
            case "/broker":
                # Behind a proxy, browsers reach the broker at another URL.
                self.send_text(os.environ.get("CATBUS_URL") or self.broker.urls[0])
            case "/catbus.js":
                self.send_response(HTTPStatus.FOUND)
                self.send_header("Location", f"{self.broker.http_urls[0]}/catbus.js")
                self.end_headers()
            case "/todo/react.js" | "/chat/react.js":
                self.send_text(bundle(HERE / f".{url.path}x"), "text/javascript")
            case "/orders/list" if self.shop:
                self.send_text(self.shop.list_orders(), "application/json")
            case _:
                super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1_000_000))
        user = users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        match self.path, body.decode(errors="replace"):
            case "/orders/mail", _ if self.shop:
                genuine = self.shop.send_mails(self.headers, body)
                self.send_text("", status=HTTPStatus.OK if genuine else HTTPStatus.UNAUTHORIZED)
            case "/orders/place", item if self.shop and user and item in MENU:
                self.shop.place_order(user, item)
                self.send_text("")
            case "/orders/kill", _ if self.shop and user:
                self.send_text(self.shop.kill_worker())
            case "/v1/chat/completions", text:
                self.complete_chat(json.loads(text))
            case _:
                self.send_error(HTTPStatus.FORBIDDEN)

    def complete_chat(self, request: Any) -> None:
        """Answer a request to the language model."""
        if not request.get("stream"):
            self.send_text(model_server.whole_answer(request), "application/json")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with suppress(ConnectionError):  # Its client has ended the request.
            for chunk in model_server.chunks(request):
                self.wfile.write(chunk)

    def send_text(self, text: str, kind: str = "text/plain", status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


async def authenticate(token: str, client: ClientInfo) -> AuthenticatedClient | None:
    user = users.get(token)
    if user is None:
        return None
    if user == ASSISTANT:
        return AuthenticatedClient(user, read=["answers.*", "tokens.*"], write=["answers.*", "tokens.*"])
    read, write = ([pattern.format(user=user) for pattern in patterns] for patterns in (READ, WRITE))
    return AuthenticatedClient(user, read=read, write=write)


async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
    """Refuse what the pages do not send, so that they need not check what they receive."""
    if client.client_id == ASSISTANT:
        return
    match channel.partition(".")[0], payload:
        case "todo", None:
            return
        case "todo", {"text": str(), "done": bool()}:
            return
        case "chat", {"text": str()}:
            return
        case "typing", True:
            return
        case "answers", {"question": str(), "text": str(), "state": "asked" | "cancelling"}:
            return
    raise Refused(ErrorCode.BAD_MESSAGE, "not a message of this application")


async def find_database(config: catbus.Config, broker: catbus.Broker) -> str | None:
    """The URL of the broker's database, when it is ready. None if the log is in memory."""
    url = config.database.url
    if url == "memory":
        return None
    while True:
        try:
            await broker.history("orders.*", limit=1)
            break
        except catbus.Unavailable:  # It is still preparing the database.
            await trio.sleep(0.1)
    if url == "embedded":
        directory = config.state_directory / "postgres"
        password = (directory / "cluster" / "password").read_text()
        url = f"postgres://catbus:{password}@/catbus?host={directory / 'sockets'}"
    return url


async def main() -> None:
    config = catbus.load(None, os.environ, defaults=DEFAULTS)
    host, _, port = os.environ.get("EXAMPLES_BIND", "127.0.0.1:8000").rpartition(":")
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            serve = partial(catbus.serve, config, authenticate=authenticate, on_publish=on_publish)
            broker = await nursery.start(serve)
            # Without a database, all examples work but the orders.
            database = await find_database(config, broker)
            shop = Shop(database) if database else None
            handler = partial(PageHandler, broker=broker, shop=shop)
            with ThreadingHTTPServer((host, int(port)), handler) as pages:
                threading.Thread(target=pages.serve_forever).start()
                async with trio.open_nursery() as children:
                    if shop:
                        await children.start(shop.run, f"http://127.0.0.1:{pages.server_port}/orders/mail")
                    model = f"http://127.0.0.1:{pages.server_port}/v1/chat/completions"
                    children.start_soon(run_assistant, broker.urls[0], model)
                    print("broker:", broker.urls[0], flush=True)
                    print(f"examples: http://{host}:{pages.server_port}/", flush=True)
                    await anext(signals)
                    children.cancel_scope.cancel()
                await trio.to_thread.run_sync(pages.shutdown)
            broker.stop()


if __name__ == "__main__":
    trio.run(main)
